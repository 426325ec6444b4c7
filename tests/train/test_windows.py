"""Windows: no token is lost without being counted, documents stay apart, only answers are learned."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemo.config import DataConfig
from lemo.errors import ConfigError, DataError
from lemo.train.collate import WindowCollator, WindowDataset
from lemo.train.data import load_windows, token_batches
from lemo.train.documents import Document, Turn
from lemo.train.sources import write_npz
from lemo.train.windows import Window, WindowCutter
from tests.train.tiny import byte_tokenizer


def documents_of(lengths):
    start = np.concatenate([[0], np.cumsum(lengths)])
    return [
        Document(f"d{i}", f"place {i}", tokens_T=np.arange(a, b, dtype=np.uint32))
        for i, (a, b) in enumerate(pairwise(start))
    ]


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=12),
    window=st.integers(2, 32),
    packing=st.booleans(),
    remainder=st.sampled_from(["drop", "keep"]),
)
def test_every_token_is_in_one_window_or_counted_as_lost(lengths, window, packing, remainder):
    cutter = WindowCutter(None, window, packing=packing, remainder=remainder)
    try:
        windows, report = cutter.cut(documents_of(lengths))
    except DataError as error:
        assert "no window" in str(error)
        assert not packing or max(lengths) < 2
        return
    kept = np.concatenate([w.tokens_T for w in windows])
    assert len(np.unique(kept)) == len(kept)
    assert len(kept) + sum(report.lost_tokens.values()) == sum(lengths) == report.tokens
    assert report.kept_tokens == len(kept)
    assert all(len(w.tokens_T) <= window and sum(w.lengths) == len(w.tokens_T) for w in windows)
    if packing or remainder == "keep":
        single_tokens = sum(n % window == 1 for n in lengths)
        assert sum(report.lost_tokens.values()) == single_tokens
    else:
        assert all(len(w.tokens_T) == window for w in windows)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    for w in windows:
        for part in np.split(w.tokens_T, np.cumsum(w.lengths)[:-1]):
            assert (np.diff(part.astype(int)) == 1).all()
            assert len(np.unique(document_of[part])) == 1


def test_packing_uses_few_windows():
    windows, report = WindowCutter(None, 10, packing=True).cut(documents_of([6, 4, 3, 7, 5, 5]))
    assert [len(w.tokens_T) for w in windows] == [10, 10, 10]
    assert report.packed_windows == 3


def test_text_ends_with_the_end_token_and_is_cut_consecutively():
    tokenizer = byte_tokenizer()
    windows, report = WindowCutter(tokenizer, 8).cut([Document("n", "p", text="abcdefghijklmno")])
    joined = np.concatenate([w.tokens_T for w in windows])
    assert tokenizer.decode(joined.tolist()) == "abcdefghijklmno<end>"
    assert report.lost_tokens == {}
    assert [w.sample_id for w in windows] == ["n#0", "n#1"]


def qa_document(context="c" * 20):
    return Document("n", "some place", text=context, turns=(Turn("why", "yes"), Turn("how", "so")))


def test_only_answers_and_their_end_are_learned():
    tokenizer = byte_tokenizer()
    windows, report = WindowCutter(tokenizer, 512, answer_only=True).cut([qa_document()])
    (window,) = windows
    learned = tokenizer.decode(window.tokens_T[window.learned_T].tolist())
    assert learned == " yes<end> so<end>"
    text = tokenizer.decode(window.tokens_T.tolist())
    assert text == "c" * 20 + "\n\nQuestion: why\nAnswer: yes<end>\n\nQuestion: how\nAnswer: so<end>"
    assert report.supervised_rows == len(" yes") + 1 + len(" so") + 1
    sample = WindowDataset(windows)[0]
    assert (sample["labels"] != -100).sum() == report.supervised_rows


def test_a_long_sample_is_an_error_unless_asked():
    tokenizer = byte_tokenizer()
    long = qa_document("c" * 200)
    with pytest.raises(DataError, match=r"some place: the sample has 255 tokens, the window 120"):
        WindowCutter(tokenizer, 120, answer_only=True).cut([long])
    windows, report = WindowCutter(tokenizer, 120, answer_only=True, long_rows="truncate").cut([long])
    assert len(windows[0].tokens_T) == 120
    assert tokenizer.decode(windows[0].tokens_T.tolist()).endswith("Answer: so<end>")
    assert (report.truncated, report.lost_tokens) == (1, {"cut from samples": 135})
    windows, report = WindowCutter(tokenizer, 120, answer_only=True, long_rows="drop").cut([long, qa_document()])
    assert len(windows) == report.dropped == 1
    assert report.lost_tokens == {"in dropped samples": 255}
    with pytest.raises(DataError, match="all samples are longer"):
        WindowCutter(tokenizer, 120, answer_only=True, long_rows="drop").cut([long])
    with pytest.raises(DataError, match="first question and answer alone have 28 tokens"):
        WindowCutter(tokenizer, 40, answer_only=True, long_rows="truncate").cut([long])


def test_truncation_that_loses_questions_says_so():
    windows, report = WindowCutter(byte_tokenizer(), 60, answer_only=True, long_rows="truncate").cut([qa_document()])
    assert len(windows[0].tokens_T) <= 60
    assert report.notes == ["some place: 1 of 2 questions cut off"]


def test_unused_qas_and_missing_qas_are_said():
    _, report = WindowCutter(byte_tokenizer(), 8).cut([qa_document()])
    assert "1 rows have qas that are not used" in report.lines()[-1]
    with pytest.raises(DataError, match="some place: has no 'qas'"):
        WindowCutter(byte_tokenizer(), 8, answer_only=True).cut([Document("n", "some place", text="plain")])


def test_tokens_outside_the_vocabulary_are_refused():
    with pytest.raises(DataError, match=r"place 1: token 9 is outside the model's vocabulary of 9"):
        WindowCutter(None, 2, vocabulary=9).cut(documents_of([5, 5]))


def test_limit_spreads_and_counts(tmp_path):
    write_npz(tmp_path / "t.npz", [range(100)])
    config = DataConfig(train=(str(tmp_path / "t.npz"),), window_tokens=10, max_windows=2)
    dataset, report = load_windows(config, None)
    assert [w.tokens_T[0] for w in dataset.windows] == [20, 70]
    assert (report.lost_tokens, report.unused_windows, report.unused_tokens) == ({}, 8, 80)
    assert (report.windows, report.kept_tokens, report.supervised_rows) == (2, 20, 18)
    with pytest.raises(ConfigError, match=r"data\.validation is empty"):
        load_windows(config, None, "validation")


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_carries_no_label_and_no_attention(side):
    dataset = WindowDataset([Window("a", np.arange(5, 9)), Window("b", np.arange(5, 7))])
    (batch,) = token_batches(dataset, WindowCollator(pad_id=3, side=side), batch_size=2)
    real = batch["attention_mask"].bool()
    assert real.sum(1).tolist() == [4, 2]
    assert (batch["input_ids"][~real] == 3).all()
    assert (batch["labels"][~real] == -100).all()
    assert (batch["labels"] != -100).sum(1).tolist() == [3, 1]
    assert batch["input_ids"][1][real[1]].tolist() == [5, 6]
    assert batch["attention_mask"][1].tolist() == ([1, 1, 0, 0] if side == "right" else [0, 0, 1, 1])
    assert "attention_mask" not in WindowCollator()([dataset[0]])


def test_packed_batches_carry_documents_and_restart_positions():
    packed = Window("a", np.arange(10, 16), lengths=(4, 2))
    batch = WindowCollator()([WindowDataset([packed])[0], WindowDataset([Window("b", np.arange(3))])[0]])
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, -1, -1, -1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 11, 12, 13, -100, 15], [-100, 1, 2, -100, -100, -100]]
    assert "attention_mask" not in batch


def test_packed_documents_never_see_each_other_in_a_plain_model():
    import torch

    from tests.train.tiny import tiny_llama

    model = tiny_llama(layers=2).eval()
    first = np.array([4, 9, 12, 7])

    def second_logits(head):
        window = Window("a", np.concatenate([head, [5, 6, 7]]), lengths=(4, 3))
        batch = WindowCollator()([WindowDataset([window])[0], WindowDataset([Window("b", np.arange(3, 12))])[0]])
        with torch.no_grad():
            return model(**batch, use_cache=False).logits[0, 4:7]

    assert torch.equal(second_logits(first), second_logits(first[::-1].copy()))
