"""Reads documents: .txt, .jsonl, .json, .npz, .parquet and Hugging Face datasets folders. Errors name file and row."""

from __future__ import annotations

import gzip
import itertools
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lemo.errors import DataError
from lemo.train.documents import TOOLS, Document, FieldNames, drop_nulls, make_document

# A folder stands for files of these kinds; others are read where they are named.
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".npz")
NAMED_SUFFIXES = (*SUFFIXES, ".parquet", ".json")
MOST_FAULTS, SHOWN_FAULTS = 100, 5  # of rows in a file: counted, and told
_UNREAD = (".parquet", ".json", ".csv", ".tsv", ".arrow", ".jsonl.zst", ".jsonl.bz2", ".json.gz", ".txt.gz")


def list_sources(paths: Sequence[str | Path]) -> list[Path]:
    """Files and datasets folders behind paths; a plain folder stands for the readable files below it, in order.

    These are files of `SUFFIXES` or, where there are none, .parquet files; `describe_unread` names the others.

    Raises:
        DataError: a path does not exist, has a suffix that nothing reads, or a folder holds nothing readable.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        if path.is_file():
            if not path.name.endswith(NAMED_SUFFIXES):
                raise DataError(f"{path}: cannot read this kind of file; readable are {', '.join(NAMED_SUFFIXES)}")
            found.append(path)
        elif _is_datasets_folder(path):
            found.append(path)
        else:
            inside = _inside(path, SUFFIXES) or _inside(path, (".parquet",))
            if not inside:
                unread = [p.name for p in _inside(path, _UNREAD)]
                there = f"; it holds {', '.join(unread[:3])}" if unread else ""
                kinds = ", ".join((*SUFFIXES, ".parquet"))
                raise DataError(f"{path}: the folder holds no {kinds} file and is no datasets folder{there}")
            found.extend(inside)
    if not found:
        raise DataError("no data: name at least one file or folder")
    return found


def describe_unread(paths: Sequence[str | Path]) -> str | None:
    """Which files in folders look like data and are not read, because others beside them are; None when all are."""
    used = set(list_sources(paths))
    folders = [path for path in map(Path, paths) if path.is_dir() and not _is_datasets_folder(path)]
    files = [str(file) for folder in folders for file in _inside(folder, _UNREAD) if file not in used]
    if not files:
        return None
    more = f" and {len(files) - 3:,} more" if len(files) > 3 else ""
    named = ", ".join(files[:3]) + more
    return f"not read beside the other files of their folder: {named} (.parquet and .json are, where they are named)"


def name_sources(sources: Sequence[Path]) -> list[str]:
    """A name for each source, the first part of its samples' ids: the file's own.

    Files of one name in several folders are told apart by as many of their folders as it takes, of the path as it was
    given; the same path given again gets a number.
    """
    depths = dict.fromkeys(sources, 1)

    def name(path: Path) -> str:
        return Path(*path.parts[-depths[path] :]).as_posix()

    while True:
        holders: dict[str, list[Path]] = {}
        for path in depths:
            holders.setdefault(name(path), []).append(path)
        shallow = [
            path for same in holders.values() if len(same) > 1 for path in same if depths[path] < len(path.parts)
        ]
        if not shallow:
            break
        for path in shallow:
            depths[path] += 1
    names: dict[str, None] = {}
    for path in sources:
        first = unique = name(path)
        again = 1
        while unique in names:
            again += 1
            unique = f"{first}~{again}"
        names[unique] = None
    return list(names)


def _inside(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files below a folder with one of the suffixes, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(suffixes))


def needs_tokenizer(paths: Sequence[str | Path]) -> bool:
    """Whether any source holds text; .npz files hold tokens."""
    return not all(path.name.endswith(".npz") for path in list_sources(paths))


def read_documents(
    paths: Sequence[str | Path], *, text_field: str = "text", messages_field: str = "messages"
) -> Iterator[Document]:
    """Documents of all sources, in order.

    Args:
        paths: files or folders, see `list_sources`.
        text_field: key of the text in .jsonl rows and datasets columns.
        messages_field: key of a conversation in them; a row that has one is a conversation.

    Raises:
        DataError: a source or row cannot be read or is empty; the message names it.
    """
    sources = list_sources(paths)
    for path, name in zip(sources, name_sources(sources), strict=True):
        empty = True
        for document in _documents(path, name, FieldNames(text_field, messages_field)):
            empty = False
            yield document
        if empty:
            raise DataError(f"{path}: holds no documents")


def read_first_row(path: Path) -> dict[str, Any] | None:
    """The first row of a source as it stands; None for sources without named fields.

    Raises:
        DataError: it cannot be read.
    """
    if path.name.endswith((".txt", ".npz")) and not path.is_dir():
        return None
    return next((_given(values) for _, values in _rows(path)), None)


def write_npz(path: str | Path, documents: Sequence[Sequence[int] | np.ndarray]) -> None:
    """Writes pre-tokenised documents as two arrays: `tokens` (all documents joined) and `bounds` (int64, D+1).

    Document d is tokens[bounds[d]:bounds[d + 1]]. `tokens` is uint16 when every token fits, else uint32.

    Raises:
        DataError: there is no document, one is empty, or a token is negative or too large for uint32.
    """
    arrays = [np.asarray(document, dtype=np.int64) for document in documents]
    if not arrays:
        raise DataError(f"{path}: nothing to write, there are no documents")
    for row, array in enumerate(arrays):
        if array.ndim != 1 or array.size == 0:
            raise DataError(f"{path}: document {row} must be a non-empty list of tokens")
        if array.min() < 0 or array.max() > np.iinfo(np.uint32).max:
            raise DataError(f"{path}: document {row} has a token outside uint32")
    tokens = np.concatenate(arrays)
    dtype = np.uint16 if tokens.max() <= np.iinfo(np.uint16).max else np.uint32
    bounds = np.concatenate([[0], np.cumsum([array.size for array in arrays])]).astype(np.int64)
    with open(path, "wb") as file:
        np.savez(file, tokens=tokens.astype(dtype), bounds=bounds)


def _documents(path: Path, name: str, fields: FieldNames) -> Iterator[Document]:
    """The documents of one source. One error tells of all rows that cannot be used: nobody repairs one at a time."""
    if not path.is_dir() and path.name.endswith((".txt", ".npz")):
        yield from (_read_txt if path.name.endswith(".txt") else _read_npz)(path, name)
        return
    faults: list[DataError] = []
    for row, values in _rows(path):
        try:
            document = make_document(_given(values), fields, name=f"{name}:{row}", place=f"{path}, row {row}")
        except DataError as error:
            faults.append(error)
            if len(faults) == MOST_FAULTS:
                break
        else:
            if not faults:
                yield document
    if faults:
        raise _together(faults, path) from faults[0]


def _together(faults: list[DataError], path: Path) -> DataError:
    """One error for all rows of a file that cannot be used."""
    if len(faults) == 1:
        return faults[0]
    shown = [str(fault).removeprefix(f"{path}, ") for fault in faults[:SHOWN_FAULTS]]
    least = "at least " if len(faults) == MOST_FAULTS else ""
    rest = [f"and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
    lines = "\n  ".join([*shown, *rest])
    return DataError(f"{path}: {least}{len(faults)} rows cannot be used\n  {lines}")


def _given(values: dict[str, Any] | DataError) -> dict[str, Any]:
    """The fields of a row, or raises what is wrong with it."""
    if isinstance(values, DataError):
        raise values
    return values


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """Rows with named fields, or what is wrong with one, and their numbers."""
    if path.is_dir():
        return _filled(_load_rows(path))
    if path.name.endswith(".parquet"):
        return _filled(_read_parquet(path))
    return _read_json(path) if path.name.endswith(".json") else _read_jsonl(path)


def _read_txt(path: Path, name: str) -> Iterator[Document]:
    """A .txt file is one document."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    yield Document(name, str(path), text=text)


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """Each line of a .jsonl or .jsonl.gz file is one row; blank lines are none, but count."""
    row = 0
    try:
        with _open_text(path) as file:
            for row, line in enumerate(file, start=1):
                if line.strip():
                    yield row, _line(line, f"{path}, row {row}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, row {row + 1}: not UTF-8 text") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}, row {row + 1}: cannot be read ({error})") from error


def _read_json(path: Path) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """Each element of the list in a .json file is one row."""
    try:
        with _open_text(path) as file:
            rows = _parse(file.read(), str(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: must hold a list of JSON objects, got {type(rows).__name__}; a file with an object in each line "
            "is named .jsonl"
        )
    for row, values in enumerate(rows, start=1):
        yield row, _object(values, f"{path}, row {row}")


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a .parquet file."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading .parquet needs the package `pyarrow`: pip install 'lemo[datasets]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (OSError, ValueError, NotImplementedError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as .parquet ({str(error).splitlines()[0]})") from error


def _open_text(path: Path) -> Any:
    """A text file, unpacked where its name says so; a byte order mark at its beginning is no part of the text."""
    return gzip.open(path, "rt", encoding="utf-8-sig") if path.name.endswith(".gz") else path.open(encoding="utf-8-sig")


def _parse(text: str, place: str) -> Any:
    """What a text in JSON stands for."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"{place}: not valid JSON ({error.msg} at {line}column {error.colno})") from error
    except RecursionError as error:
        raise DataError(f"{place}: not valid JSON (nested too deeply)") from error
    except ValueError as error:  # Python reads no integer of more than some thousand digits
        raise DataError(f"{place}: cannot be read ({str(error).split(';')[0]})") from error


def _line(text: str, place: str) -> dict[str, Any] | DataError:
    """The row that a line of JSON holds, or what is wrong with it."""
    try:
        return _object(_parse(text, place), place)
    except DataError as error:
        return error


def _object(values: Any, place: str) -> dict[str, Any] | DataError:
    """A row, which has named fields, or what is wrong with it."""
    if not isinstance(values, dict):
        return DataError(f"{place}: must be a JSON object, got {type(values).__name__}")
    return values


def _filled(rows: Iterable[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows of an Arrow table, which fills keys that a row lacks with None."""
    for row, values in enumerate(rows, start=1):
        values = dict(values)
        if TOOLS in values:
            values[TOOLS] = drop_nulls(values[TOOLS])
        yield row, values


def _read_npz(path: Path, name: str) -> Iterator[Document]:
    """Pre-tokenised documents, see `write_npz`."""
    try:
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise DataError(f"{path}: holds one array, as np.save writes it; write it with lemo.train.data.write_npz")
        with arrays:
            missing = {"tokens", "bounds"} - set(arrays.files)
            if missing:
                raise DataError(f"{path}: has no array {' and no array '.join(sorted(missing))}")
            tokens, bounds = arrays["tokens"], arrays["bounds"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as .npz ({error})") from error
    if tokens.dtype not in (np.uint16, np.uint32) or tokens.ndim != 1:
        raise DataError(f"{path}: 'tokens' must be a flat uint16 or uint32 array, got {tokens.dtype} {tokens.shape}")
    if bounds.ndim != 1 or len(bounds) < 2 or not np.issubdtype(bounds.dtype, np.integer):
        raise DataError(f"{path}: 'bounds' must be a flat integer array of documents + 1 entries")
    if bounds[0] != 0 or bounds[-1] != len(tokens):
        raise DataError(f"{path}: 'bounds' must start at 0 and end at {len(tokens)}, the number of tokens")
    lengths = np.diff(bounds.astype(np.int64))
    if (lengths <= 0).any():
        row = int(np.flatnonzero(lengths <= 0)[0]) + 1
        raise DataError(f"{path}, row {row}: the document is empty ('bounds' does not ascend there)")
    for row, (start, end) in enumerate(itertools.pairwise(bounds), start=1):
        part = tokens[int(start) : int(end)].astype(np.uint32)
        yield Document(f"{name}:{row}", f"{path}, row {row}", tokens_T=part)


def _is_datasets_folder(path: Path) -> bool:
    """Whether `save_to_disk` of Hugging Face datasets wrote this folder."""
    return (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists()


def _load_rows(path: Path) -> Any:
    """The rows of a datasets folder; they stay on disk until they are asked for."""
    if (path / "dataset_dict.json").exists():
        splits = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise DataError(f"{path}: holds several splits ({', '.join(splits)}); name the folder of one of them")
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{path}: reading a datasets folder needs the package `datasets`: pip install 'lemo[datasets]'"
        ) from error
    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises errors of many kinds for damaged folders
        raise DataError(f"{path}: cannot be read as a datasets folder ({error})") from error
