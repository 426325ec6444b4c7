"""Files of a run: written in one piece, and looked at before they are relied on."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lemo.errors import ConfigError

LOCK_FILE = "run.lock"
_WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one piece: whatever happens, it has its old content or the new."""
    beside = path.with_name(f"{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process trains into the folder; the system lets go of the lock when this one ends, however.

    Raises:
        ConfigError: another process does.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path = folder / LOCK_FILE
    while True:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"output: another process is training into {folder}; wait for it, or stop it"
                ) from error
            except OSError:  # a file system without locks
                pass
            else:
                if not _is_at(file, path):  # who held it has just ended, and taken it away
                    continue
            try:
                yield
            finally:
                with suppress(OSError):
                    path.unlink()
            return


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether the open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def share_files(folder: Path) -> None:
    """Gives files the rights that others have, since safetensors writes for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o666 & ~mask)


def faults(checkpoint: Path, states: list[str], processes: int) -> list[str]:
    """What is amiss with a Trainer's checkpoint: a word for each file that is not there, or not whole.

    Args:
        checkpoint: folder.
        states: JSON files that must be there, beside the Trainer's own.
        processes: how many wrote it.
    """
    random = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    names = ["trainer_state.json", *states, "optimizer.pt", "scheduler.pt", *random]
    names += [next((name for name in _WEIGHTS if (checkpoint / name).exists()), _WEIGHTS[0])]
    missing = [name for name in names if not (checkpoint / name).exists()]
    return missing or [f"{name} that can be read" for name in names if not _is_whole(checkpoint / name)]


def _is_whole(path: Path) -> bool:
    """Whether a file ends where its kind says: torch's are archives whose index comes last."""
    try:
        if path.suffix == ".json":
            return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(path, framework="pt"):
                    return True
            except SafetensorError:
                return False
        return zipfile.is_zipfile(path)
    except (OSError, ValueError):
        return False
