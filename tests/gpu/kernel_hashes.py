"""Hashes of the kernels, and where those that passed on a GPU are written down."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PASSED = Path(__file__).resolve().parent / "passed_kernels.json"


def kernel_hashes() -> dict[str, str]:
    """SHA-256 of every kernel.py by its path in the repository."""
    paths = sorted((ROOT / "src").rglob("kernel.py"))
    return {path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
