"""Reads documents: .txt, .jsonl, .jsonl.gz, .npz and Hugging Face datasets folders. Errors name file and row."""

from __future__ import annotations

import gzip
import itertools
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lemo.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".npz")


@dataclass(frozen=True)
class Turn:
    """One question with the answer that is learned (the first reference where a row has several)."""

    question: str
    answer: str


@dataclass(frozen=True)
class FieldNames:
    """Keys of .jsonl rows and columns of datasets: of the text, and of a conversation."""

    text: str = "text"
    messages: str = "messages"


@dataclass(frozen=True)
class Document:
    """One document of a source, as text or as tokens.

    Attributes:
        name: file name and row, the same on every machine; part of a sample's id.
        place: path and row, for messages.
        text: the document, or None when it is pre-tokenised.
        tokens_T: uint32 tokens of a pre-tokenised document, else None.
        turns: questions and answers of a `qas` row; empty for plain text.
        messages: a conversation, each message with `role` and `content`; empty for other rows.
    """

    name: str
    place: str
    text: str | None = None
    tokens_T: np.ndarray | None = None
    turns: tuple[Turn, ...] = ()
    messages: tuple[dict[str, Any], ...] = ()

    @property
    def is_sample(self) -> bool:
        """Whether it is one sample as it stands: it has questions, or is a conversation."""
        return bool(self.turns or self.messages)


def list_sources(paths: Sequence[str | Path]) -> list[Path]:
    """Files and datasets folders behind paths; a plain folder stands for the readable files below it, in order.

    Raises:
        DataError: a path does not exist, has a suffix that nothing reads, or a folder holds nothing readable.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        if path.is_file():
            if not path.name.endswith(SUFFIXES):
                raise DataError(f"{path}: cannot read this kind of file; readable are {', '.join(SUFFIXES)}")
            found.append(path)
        elif _is_datasets_folder(path):
            found.append(path)
        else:
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
            if not inside:
                raise DataError(f"{path}: the folder holds no {', '.join(SUFFIXES)} file and is no datasets folder")
            found.extend(inside)
    if not found:
        raise DataError("no data: name at least one file or folder")
    return found


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
    for path in list_sources(paths):
        before = 0
        for document in _reader(path)(path, FieldNames(text_field, messages_field)):
            before += 1
            yield document
        if before == 0:
            raise DataError(f"{path}: holds no documents")


def read_first_row(path: Path) -> dict[str, Any] | None:
    """The first row of a .jsonl file or datasets folder as it stands; None for sources without named fields.

    Raises:
        DataError: it cannot be read.
    """
    if path.is_dir():
        return next((dict(values) for values in _load_rows(path)), None)
    if path.name.endswith((".txt", ".npz")):
        return None
    try:
        with _open_text(path) as file:
            line = next((line for line in file if line.strip()), "null")
        values = json.loads(line)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}, row 1: cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}, row 1: must be a JSON object, got {type(values).__name__}")
    return values


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


def _reader(path: Path):
    """The function that reads a source."""
    if path.is_dir():
        return _read_datasets_folder
    if path.name.endswith(".txt"):
        return _read_txt
    return _read_npz if path.name.endswith(".npz") else _read_jsonl


def _read_txt(path: Path, fields: FieldNames) -> Iterator[Document]:
    """A .txt file is one document."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    yield Document(path.name, str(path), text=text)


def _read_jsonl(path: Path, fields: FieldNames) -> Iterator[Document]:
    """Each line of a .jsonl or .jsonl.gz file is one document; blank lines are no rows."""
    row = 0
    try:
        with _open_text(path) as file:
            for row, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse_row(path, row, line, fields)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, row {row + 1}: not UTF-8 text") from error
    except (OSError, EOFError) as error:
        raise DataError(f"{path}, row {row + 1}: cannot be read ({error})") from error


def _open_text(path: Path) -> Any:
    """A text file, unpacked where its name says so."""
    return gzip.open(path, "rt", encoding="utf-8") if path.name.endswith(".gz") else path.open(encoding="utf-8")


def _parse_row(path: Path, row: int, line: str, fields: FieldNames) -> Document:
    """One JSON row."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, row {row}: not valid JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}, row {row}: must be a JSON object, got {type(values).__name__}")
    return _document(values, fields, name=f"{path.name}:{row}", place=f"{path}, row {row}")


def _document(values: dict[str, Any], fields: FieldNames, *, name: str, place: str) -> Document:
    """A document from the values of a row."""
    if values.get(fields.messages) is not None:
        return Document(name, place, messages=_messages(values[fields.messages], fields.messages, place))
    if fields.text not in values:
        known = ", ".join(sorted(map(str, values))) or "none"
        raise DataError(f"{place}: has no field {fields.text!r} (fields: {known}); data.text_field names it")
    text = values[fields.text]
    if not isinstance(text, str):
        raise DataError(f"{place}: field {fields.text!r} must be text, got {type(text).__name__}")
    if not text.strip():
        raise DataError(f"{place}: field {fields.text!r} is empty")
    return Document(name, place, text=text, turns=_turns(values.get("qas"), place))


def _messages(messages: Any, field: str, place: str) -> tuple[dict[str, Any], ...]:
    """The messages of a conversation, checked."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: field {field!r} must be a list of messages")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{place}: message {number} of {field!r} has no role")
        if message.get("tool_calls"):
            raise DataError(f"{place}: message {number} of {field!r} calls tools, which is not supported")
        content = message.get("content")
        if not isinstance(content, str) or (message["role"] == "assistant" and not content.strip()):
            raise DataError(f"{place}: message {number} of {field!r} ({message['role']}) has no text in 'content'")
    return tuple(messages)


def _turns(qas: Any, place: str) -> tuple[Turn, ...]:
    """Questions and answers of a row."""
    if qas is None:
        return ()
    if not isinstance(qas, list):
        raise DataError(f"{place}: field 'qas' must be a list, got {type(qas).__name__}")
    turns = []
    for number, qa in enumerate(qas, start=1):
        question = qa.get("question") if isinstance(qa, dict) else None
        answers = qa.get("answers") if isinstance(qa, dict) else None
        answers = [answers] if isinstance(answers, str) else answers
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{place}: item {number} of 'qas' has no question")
        if not isinstance(answers, list) or not answers or not isinstance(answers[0], str) or not answers[0].strip():
            raise DataError(f"{place}: item {number} of 'qas' has no answer")
        turns.append(Turn(question.strip(), answers[0].strip()))
    return tuple(turns)


def _read_npz(path: Path, fields: FieldNames) -> Iterator[Document]:
    """Pre-tokenised documents, see `write_npz`."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = {"tokens", "bounds"} - set(arrays.files)
            if missing:
                raise DataError(f"{path}: has no array {' and no array '.join(sorted(missing))}")
            tokens, bounds = arrays["tokens"], arrays["bounds"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
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
        yield Document(f"{path.name}:{row}", f"{path}, row {row}", tokens_T=part)


def _is_datasets_folder(path: Path) -> bool:
    """Whether `save_to_disk` of Hugging Face datasets wrote this folder."""
    return (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists()


def _read_datasets_folder(path: Path, fields: FieldNames) -> Iterator[Document]:
    """Rows of a folder that `Dataset.save_to_disk` wrote."""
    for row, values in enumerate(_load_rows(path), start=1):
        yield _document(dict(values), fields, name=f"{path.name}:{row}", place=f"{path}, row {row}")


def _load_rows(path: Path) -> Any:
    """The rows of a datasets folder; they stay on disk until they are asked for."""
    if (path / "dataset_dict.json").exists():
        splits = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise DataError(f"{path}: holds several splits ({', '.join(splits)}); name the folder of one of them")
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{path}: reading a datasets folder needs the package `datasets`") from error
    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises errors of many kinds for damaged folders
        raise DataError(f"{path}: cannot be read as a datasets folder ({error})") from error
