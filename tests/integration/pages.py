"""Commands of documentation pages."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(page: str, language: str) -> list[str]:
    """Code blocks of a page in one language. `sh` is what tests run, `shell` what they do in another way."""
    return [body for found, body in _BLOCK.findall((DOCS / page).read_text(encoding="utf-8")) if found == language]


def commands(page: str) -> list[list[str]]:
    """Commands of a page's shell blocks, split into words, in order."""
    return [shlex.split(line) for block in blocks(page, "sh") for line in whole_lines(block) if line]


def whole_lines(block: str) -> list[str]:
    """Lines of a shell block; one that ends in a backslash goes on in the next."""
    return block.replace("\\\n", " ").splitlines()
