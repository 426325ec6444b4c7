"""Held-out data: both splits together are everything, and nothing stands in both."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemo.config import DataConfig
from lemo.errors import DataError
from lemo.train.data import load_windows, write_npz
from lemo.train.documents import Document, Turn
from lemo.train.hold_out import split_documents
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


@given(st.lists(st.integers(0, 12), min_size=2, max_size=60), st.sampled_from([0.1, 0.25, 0.5]))
def test_no_text_stands_in_both_splits(seeds, share):
    documents = [Document(f"d{i}", f"f, row {i}", text=words(60, seed=seed)) for i, seed in enumerate(seeds)]
    notes = []
    train, held = (list(split_documents(documents, share, s, notes=notes)) for s in ("train", "validation"))
    assert train and held and not {d.text for d in train} & {d.text for d in held}
    repeated = len(seeds) - len(set(seeds))
    assert notes == ([f"{repeated} of {len(seeds)} documents repeat the text of another: copies stand in the same "
                      "split"] * 2 if repeated else [])  # fmt: skip
    if not repeated and len(seeds) >= round(1 / share):
        every = round(1 / share)
        assert [d.name for d in held] == [f"d{i}" for i in range(every // 2, len(seeds), every)]


@pytest.mark.parametrize("share", [0.02, 0.07, 0.1, 0.29, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.9])
def test_the_share_is_the_share(share):
    documents = texts(100)
    held = [int(d.name[1:]) for d in split_documents(documents, share, "validation")]
    assert len(held) == round(100 * share)
    for first in range(0, 100, 20):  # evenly spread
        assert abs(len([i for i in held if first <= i < first + 20]) - 20 * share) <= 1


@given(st.integers(2, 60), st.floats(0.005, 0.99))
def test_samples_are_held_out_by_share_and_both_parts_have_one(count, share):
    documents = texts(count, turns=(Turn("q", "a"),))
    train, held = (list(split_documents(documents, share, split)) for split in ("train", "validation"))
    assert train and held and len(train) + len(held) == count
    assert abs(len(held) - count * share) < 1 or len(held) == 1


@pytest.mark.parametrize("every", [2, 3, 4, 5, 7, 10, 20, 50])
def test_whole_shares_hold_out_what_they_always_did(every):
    held = [d.name for d in split_documents(texts(120), 1 / every, "validation")]
    assert held == [f"d{i}" for i in range(every // 2, 120, every)]


def test_questions_about_one_text_are_held_out_by_row():
    documents = [Document(f"d{i}", f"f, row {i}", text="one", turns=(Turn(f"q{i // 2}", "a"),)) for i in range(8)]
    notes = []
    assert [d.name for d in split_documents(documents, 0.25, "validation", notes=notes)] == ["d4", "d5"]
    assert "7 of 8 documents repeat the text of another: all rows are about one text" in notes[0]
    with pytest.raises(DataError, match=r"row 0: all 2 samples of the data are the same, so none can be held out"):
        split_documents(documents[:2], 0.25, "train")


def test_duplicates_are_in_the_report(tmp_path):
    rows = "".join(f'{{"text": "{words(20, seed=i // 2)}"}}\n' for i in range(40))
    (tmp_path / "d.jsonl").write_text(rows)
    config = DataConfig(train=(str(tmp_path / "d.jsonl"),), held_out_share=0.1, window_tokens=16)
    assert load_windows(config, byte_tokenizer())[1].lines()[-1].startswith("20 of 40 documents repeat the text")


@pytest.mark.parametrize(("seeds", "count"), [((3, 90, 5), 2), ((90, 91), 0), ((3, 3), 2)])
def test_validation_that_is_trained_on_is_in_the_report(tmp_path, seeds, count):
    for name, found in (("train", range(20)), ("held", seeds)):
        rows = "".join(f'{{"text": "{words(20, seed=seed)}"}}\n' for seed in found)
        (tmp_path / f"{name}.jsonl").write_text(rows)
    config = DataConfig(
        train=(str(tmp_path / "train.jsonl"),), validation=(str(tmp_path / "held.jsonl"),), window_tokens=16
    )
    train, held = (load_windows(config, byte_tokenizer(), split)[1].lines() for split in ("train", "validation"))
    said = [f"data.validation has text of data.train, in {count} of {len(seeds)} documents"] if count else []
    assert [line.partition(":")[0] for line in train if "data.validation" in line] == said
    (tmp_path / "train.jsonl").unlink()  # evaluation needs no training data
    assert load_windows(config, byte_tokenizer(), "validation")[1].lines() == held


def test_a_part_without_a_window_is_named(tmp_path):
    (tmp_path / "a.txt").write_text(words(100))
    (tmp_path / "b.txt").write_text(words(10))
    found = {}
    for name, keys in {"share": {"held_out_share": 0.1}, "files": {"validation": (str(tmp_path / "b.txt"),)}}.items():
        config = DataConfig(train=(str(tmp_path / "a.txt"),), window_tokens=128, **keys)
        load_windows(config, byte_tokenizer())
        with pytest.raises(DataError) as caught:
            load_windows(config, byte_tokenizer(), "validation")
        found[name] = str(caught.value)
    assert "out of 1 document held out for validation by data.held_out_share=0.1 (" in found["share"]
    assert "raise that share, name files in data.validation, shorten data.window_tokens" in found["share"]
    assert "out of 1 document of data.validation (" in found["files"] and "share" not in found["files"]
    with pytest.raises(DataError, match=r"out of 1 document of data\.train \("):
        load_windows(DataConfig(train=(str(tmp_path / "b.txt"),), window_tokens=128), byte_tokenizer())
