"""Held-out data: both splits together are everything, and nothing stands in both."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemo.config import DataConfig
from lemo.errors import DataError
from lemo.train.data import load_windows, write_npz
from lemo.train.hold_out import split_documents
from lemo.train.sources import Document, Turn
from tests.train.tiny import byte_tokenizer, words


def texts(count, **more):
    return [Document(f"d{i}", f"f, row {i}", text=words(60, seed=i), **more) for i in range(count)]


@given(st.integers(1, 40), st.floats(0.02, 0.6))
def test_the_splits_are_a_partition(count, share):
    documents = texts(count)
    train, held = (list(split_documents(documents, share, split)) for split in ("train", "validation"))
    assert train and held
    if len(train) == len(held) == count:  # the end of each
        assert [a.text + b.text for a, b in zip(train, held, strict=True)] == [d.text for d in documents]
        assert all(document.text.endswith(" ") for document in train)
        taken = sum(len(d.text) for d in held) / sum(len(d.text) for d in documents)
        assert taken == pytest.approx(share, abs=0.06)
    else:
        assert sorted(d.name for d in [*train, *held]) == sorted(d.name for d in documents)


def test_samples_stay_whole():
    documents = texts(3, turns=(Turn("q", "a"),))
    assert [d.name for d in split_documents(documents, 0.1, "validation")] == ["d2"]
    with pytest.raises(DataError, match="one sample"):
        split_documents(documents[:1], 0.1, "train")


def test_tokens_are_cut_like_text(tmp_path):
    write_npz(tmp_path / "d.npz", [np.arange(100)])
    found = {}
    for split in ("train", "validation"):
        config = DataConfig(train=(str(tmp_path / "d.npz"),), held_out_share=0.2, window_tokens=20)
        dataset, _ = load_windows(config, None, split)
        found[split] = np.concatenate([dataset[i]["input_ids"] for i in range(len(dataset))])
    assert found["train"].tolist() == list(range(80)) and found["validation"].tolist() == list(range(80, 100))


def test_one_text_file_is_enough(tmp_path):
    (tmp_path / "book.txt").write_text(words(400))
    config = DataConfig(train=(str(tmp_path / "book.txt"),), held_out_share=0.1, window_tokens=64)
    sizes = [load_windows(config, byte_tokenizer(), split)[1].windows for split in ("train", "validation")]
    assert sizes[0] > 6 * sizes[1] > 0
