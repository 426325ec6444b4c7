"""Data has a fingerprint, and the published cut takes beginnings of documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.prepare_data import CUTS, cut_documents
from benchmarks.quality_corpus import fingerprint
from lemo.train.data import write_npz


def _write(folder: Path, change: int = 0) -> Path:
    folder.mkdir()
    for domain in ("books", "code"):
        for split in ("train", "validation"):
            tokens = np.arange(100)
            tokens[7] += change * (domain == "code" and split == "validation")
            write_npz(folder / f"{domain}-{split}.npz", [tokens[:40], tokens[40:]])
    return folder


def test_one_token_changes_the_fingerprint(tmp_path: Path):
    first = _write(tmp_path / "a")
    assert fingerprint(first, ("books", "code")) == fingerprint(_write(tmp_path / "b"), ("books", "code"))
    other = _write(tmp_path / "c", change=1)
    assert fingerprint(first, ("books", "code")) != fingerprint(other, ("books", "code"))
    assert fingerprint(first, ("books",)) == fingerprint(other, ("books",)), "of the domains in use"
    write_npz(tmp_path / "c" / "code-validation.npz", [np.arange(41), np.arange(41, 100)])
    assert fingerprint(first, ("books", "code")) != fingerprint(other, ("books", "code")), "borders count"


@pytest.mark.parametrize("split", CUTS)
def test_a_cut_keeps_beginnings_until_there_are_enough(split: str):
    each, enough = (n // 10_000 for n in CUTS[split])
    documents = [list(range(length)) for length in (each // 2, 3 * each, each, 2 * each, *[each] * 20)]
    found = cut_documents(iter(documents), each, enough)
    assert [d[: len(f)] for d, f in zip(documents, found, strict=False)] == found
    assert max(map(len, found)) == each and sum(map(len, found)) >= enough
    assert sum(map(len, found[:-1])) < enough, "none is taken after there are enough"
    assert cut_documents(documents[:1], each, enough) == documents[:1]
