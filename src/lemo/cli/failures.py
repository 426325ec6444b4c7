"""Errors of the system, of files and of memory, as one line for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

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


def explain_failure(error: BaseException) -> str | None:
    """What to print instead of a traceback; None for an error that nobody outside the code can do anything about."""
    if isinstance(error, BrokenPipeError):
        return None  # the reader of a pipe has seen enough
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, _class_of("safetensors", "SafetensorError")):
        files = _broken_weights(error)
        named = ", ".join(files) if files else f"a {_WEIGHTS} file"
        return f"{named} cannot be read: the file is damaged or was cut off ({_first_line(error)}); copy it anew"
    full = isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
    if full or isinstance(error, _class_of("torch", "OutOfMemoryError")):
        where = "this machine" if full else "the GPU"
        return f"out of memory on {where} ({_first_line(error)}); `lemo estimate RECIPE --fit` says what would fit"
    return None


def _of_system(error: OSError) -> str:
    """Which file or folder, and what could not be done with it."""
    names = [frame.f_code.co_name for frame in _frames(error)]
    deed = next((_DEEDS[name] for name in reversed(names) if name in _DEEDS), "cannot be opened")
    if error.filename is None:
        return _first_line(error)
    return f"{error.filename}: {deed} ({error.strerror or _first_line(error)})"


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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
