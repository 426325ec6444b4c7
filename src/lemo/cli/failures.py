"""Errors of the system, of files and of memory, as one line for the terminal."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from lemo.errors import first_line

# What was being done, by the function that did it; the innermost counts.
_DEEDS = {
    "mkdir": "the folder cannot be created",
    "makedirs": "the folder cannot be created",
    "write_text": "cannot be written",
    "write_bytes": "cannot be written",
    "save_file": "cannot be written",
    "save_pretrained": "cannot be written",
    "savefig": "cannot be written",
    "check_writable": "cannot be written",
    "read_text": "cannot be read",
    "read_bytes": "cannot be read",
    "rename": "cannot be renamed",
    "replace": "cannot be replaced",
    "unlink": "cannot be removed",
    "rmtree": "cannot be removed",
}
_WEIGHTS = ".safetensors"
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_UNREADABLE = (errno.EIO, errno.EINVAL, errno.ESTALE)
# What PyTorch says of a file that it cannot write; it does not say why.
_UNWRITTEN = ("inline_container.cc", "PytorchStreamWriter failed", "iostream error")
_CUT_OFF = "PytorchStreamReader failed"
# Names under which functions that read and write keep a file's path, the surest first.
_PATHS = ("filename", "file_name", "path", "file", "f", "dst", "save_directory", "output_dir", "folder")


def explain_failure(error: BaseException) -> str | None:
    """What to print instead of a traceback; None for an error that nobody outside the code can do anything about."""
    if isinstance(error, BrokenPipeError):
        return None  # the reader of a pipe has seen enough
    if _is_full(error):
        return _unwritten(error, f"the disk is full ({first_line(error)})")
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, _class_of("safetensors", "SafetensorError")):
        if "while serializing" in str(error):
            return _unwritten(error, first_line(error))
        files = _broken_weights(error)
        named = ", ".join(files) if files else f"a {_WEIGHTS} file"
        return f"{named} cannot be read: the file is damaged or was cut off ({first_line(error)}); copy it anew"
    if isinstance(error, EOFError) or (isinstance(error, RuntimeError) and _CUT_OFF in str(error)):
        named = _file_in_hand(error, "r") or "a file"
        return f"{named} ends too early: it is damaged or was cut off ({first_line(error)})"
    if isinstance(error, RuntimeError) and any(part in str(error) for part in _UNWRITTEN):
        return _unwritten(error, f"the disk may be full ({first_line(error)})")
    full = isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
    if full or isinstance(error, _class_of("torch", "OutOfMemoryError")):
        where = "this machine" if full else "the GPU"
        return f"out of memory on {where} ({first_line(error)}); `lemo estimate RECIPE --fit` says what would fit"
    return None


def _of_system(error: OSError) -> str:
    """Which file or folder, and what could not be done with it."""
    names = [frame.f_code.co_name for frame in _frames(error)]
    deed = next((_DEEDS[name] for name in reversed(names) if name in _DEEDS), "cannot be opened")
    if error.filename is None:
        named = _file_in_hand(error, "r") if error.errno in _UNREADABLE else None
        return f"{named}: cannot be read ({first_line(error)})" if named else first_line(error)
    return f"{error.filename}: {deed} ({error.strerror or first_line(error)})"


def _is_full(error: BaseException) -> bool:
    """Whether an error, of whatever class, is about a disk without room."""
    number = error.errno if isinstance(error, OSError) else None
    return number in _FULL or os.strerror(errno.ENOSPC) in str(error)


def _unwritten(error: BaseException, why: str) -> str:
    """A file that could not be written: the one that the error names, else the one that was being written."""
    named = getattr(error, "filename2", None) or getattr(error, "filename", None) or _file_in_hand(error, "w")
    return f"{named or 'a file'} cannot be written: {why}"


def _file_in_hand(error: BaseException, mode: str) -> str | None:
    """The file that the innermost function had open to read (`r`) or write (`w`), or the path that it was given."""
    for frame in reversed(list(_frames(error))):
        values = frame.f_locals
        for value in values.values():
            if isinstance(value, io.IOBase) and (name := _opened(value, mode)):
                return name
        named = [values.get(name) for name in _PATHS]
        if isinstance(values.get("self"), Path):
            named.append(values["self"])
        for value in named:
            if isinstance(value, str | Path) and str(value) and _can_be(Path(value), mode):
                return str(value)
    return None


def _opened(file: Any, mode: str) -> str | None:
    """Path of a file that was opened in a mode; closed files still say it."""
    name, opened = getattr(file, "name", None), getattr(file, "mode", None)
    if not isinstance(name, str | Path) or opened is None:
        return None
    writes = opened != 1 if isinstance(opened, int) else bool(set(opened) & set("wax+"))  # gzip counts: 1 reads
    return str(name) if writes == (mode == "w") else None


def _can_be(path: Path, mode: str) -> bool:
    """Whether a path can be that of a file that is read, or of a file or folder that is written."""
    try:
        if mode == "r":
            return path.is_file()
        return path.exists() or (path.name != str(path) and path.parent.is_dir())
    except OSError:
        return False


def _class_of(package: str, name: str) -> type[BaseException] | tuple[()]:
    """An error class of a package, when the package was loaded: else it cannot have raised any."""
    return getattr(sys.modules.get(package), name, ())


def _frames(error: BaseException) -> Iterator[FrameType]:
    """Frames that the error passed, the outermost first."""
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _broken_weights(error: BaseException) -> list[str]:
    """Files of weights that the loading functions had in hand and that cannot be opened: the error names none."""
    from safetensors import SafetensorError, safe_open

    seen: dict[str, None] = {}
    for frame in _frames(error):
        for value in frame.f_locals.values():
            seen.update(dict.fromkeys(_weight_files(value)))
    broken = []
    for file in seen:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except SafetensorError:
            broken.append(file)
        except OSError:
            continue
    return broken


def _weight_files(value: Any) -> list[str]:
    """Paths of weights in a value or a list of them."""
    values = value if isinstance(value, list | tuple) else [value]
    return [str(v) for v in values if isinstance(v, str | Path) and str(v).endswith(_WEIGHTS)]
