"""LossRows: supervised rows are whole blocks, the share holds, the draw depends on seed, sample and epoch only."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lemo.errors import ConfigError, LabelsError
from lemo.runtime.batch import read_layout, supervised_rows
from lemo.train.collate import WindowCollator, WindowDataset
from lemo.train.loss_rows import LossRows
from lemo.train.windows import Window

PLACEMENTS = ["random", "spread", "tail"]


def sample(name, *lengths):
    total = sum(lengths)
    return WindowDataset([Window(name, np.arange(total) % 50 + 3, lengths=tuple(lengths))])[0]


def supervised_blocks(batch, block_size):
    """(layout, blocks with a supervised row), after checking that they are supervised as a whole."""
    rows_BT = supervised_rows(batch)
    layout = read_layout(batch, rows_BT, block_size)
    rows_N = rows_BT.reshape(-1)
    last_of_document = layout.document_start_D + layout.document_length_D - 1
    for block in layout.supervised_K.nonzero().squeeze(-1).tolist():
        start, length = int(layout.block_start_K[block]), int(layout.block_length_K[block])
        rows = torch.arange(start, start + length)
        # A document's last row predicts nothing.
        rows = rows[~torch.isin(rows, last_of_document)]
        assert rows_N[rows].all()
    assert not rows_N[layout.block_of_row_N < 0].any()
    return layout, layout.supervised_K


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=5),
    other=st.integers(2, 90),
    share=st.sampled_from([0.1, 0.25, 0.4, 0.5, 0.9]),
    placement=st.sampled_from(PLACEMENTS),
    side=st.sampled_from(["right", "left"]),
    block_size=st.sampled_from([1, 4, 8]),
)
def test_supervised_rows_are_whole_blocks_and_the_share_holds(lengths, other, share, placement, side, block_size):
    features = [sample("a", *lengths), sample("b", other)]
    plain = WindowCollator(side=side)
    before, all_blocks = supervised_blocks(plain(features), block_size)
    rows = LossRows(plain, share, placement, seed=3, block_size=block_size)
    batch = rows(features)
    _, drawn = supervised_blocks(batch, block_size)
    assert not (drawn & ~all_blocks).any()
    sequence = before.block_start_K // batch["labels"].shape[1]
    for b in range(2):
        total, count = int(all_blocks[sequence == b].sum()), int(drawn[sequence == b].sum())
        assert count >= 1
        assert abs(count - share * total) < 1
    full = plain(features)["labels"]
    kept = batch["labels"] != -100
    assert torch.equal(batch["labels"][kept], full[kept])
    for key in set(batch) - {"labels"}:
        assert torch.equal(batch[key], plain(features)[key])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_draw_is_a_function_of_seed_sample_and_epoch(placement):
    a, b = sample("a", 128), sample("b", 128)

    def labels(seed, epoch, *features):
        rows = LossRows(WindowCollator(), 0.4, placement, seed=seed, block_size=8)
        rows.set_epoch(epoch)
        return rows(features)["labels"]

    alone, together = labels(1, 0, a), labels(1, 0, b, a)
    assert torch.equal(alone[0], together[1])
    assert torch.equal(labels(1, 0, a), alone)
    if placement == "random":
        assert not torch.equal(together[0], together[1])
        assert not torch.equal(labels(2, 0, a), alone)
        assert not torch.equal(labels(1, 1, a), alone)
    if placement == "tail":
        assert torch.equal(labels(2, 5, a), alone)


def test_every_block_is_drawn_over_epochs():
    rows = LossRows(WindowCollator(), 0.25, "random", block_size=8)
    seen = torch.zeros(16, dtype=torch.bool)
    for epoch in range(30):
        rows.set_epoch(epoch)
        seen |= supervised_blocks(rows([sample("a", 128)]), 8)[1]
    assert seen.all()


def test_spread_leaves_even_gaps_and_tail_takes_each_documents_end():
    _, drawn = supervised_blocks(LossRows(WindowCollator(), 0.25, "spread", block_size=8)([sample("a", 256)]), 8)
    gaps = drawn.nonzero().squeeze(-1).diff()
    assert gaps.tolist() == [4] * 7
    _, drawn = supervised_blocks(LossRows(WindowCollator(), 0.5, "tail", block_size=8)([sample("a", 64, 32)]), 8)
    assert drawn.tolist() == [False] * 4 + [True] * 4 + [False] * 2 + [True] * 2


def test_count_of_labels_is_the_count_of_supervised_rows():
    batch = LossRows(WindowCollator(), 0.5, block_size=8)([sample("a", 64)])
    assert (batch["labels"] != -100).sum() == (batch["labels"][:, 1:] != -100).sum() == supervised_rows(batch).sum()


def test_labels_masked_before_stay_masked():
    window = Window("a", np.arange(64) + 3, np.arange(64) >= 40, (64,))
    batch = LossRows(WindowCollator(), 0.5, "random", block_size=8)([WindowDataset([window])[0]])
    kept = (batch["labels"][0] != -100).nonzero().squeeze(-1)
    assert kept.min() >= 40
    # Rows 39..62 predict the learned tokens: blocks 4..7 hold them, two of the four are drawn.
    assert len(set(((kept - 1) // 8).tolist())) == 2


def test_shift_labels_are_masked_by_row():
    def collator(features):
        tokens = torch.arange(32)[None]
        return {"input_ids": tokens, "shift_labels": tokens.clone()}

    kept = LossRows(collator, 0.5, block_size=8)([{"input_ids": list(range(32))}])["shift_labels"][0] != -100
    assert kept.reshape(4, 8).all(1).sum() == 2
    assert kept.sum() == 16


def test_padding_free_batch_is_cut_by_documents():
    def collator(features):
        ids = torch.tensor([token for f in features for token in f["input_ids"]])[None]
        positions = torch.cat([torch.arange(len(f["input_ids"])) for f in features])[None]
        return {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions}

    features = [{"input_ids": list(range(3, 36))}, {"input_ids": list(range(3, 23))}]
    batch = LossRows(collator, 0.5, block_size=8)(features)
    layout, drawn = supervised_blocks(batch, 8)
    # 33 rows make five blocks of which the last has one row, which predicts nothing; 20 rows make three.
    assert len(layout.block_start_K) == 8
    assert drawn.sum() == round(0.5 * 7)


def test_evaluation_and_full_share_keep_all_labels():
    rows = LossRows(WindowCollator(), 0.3, block_size=8)
    full = WindowCollator()([sample("a", 64)])["labels"]
    with rows.all_labels():
        assert torch.equal(rows([sample("a", 64)])["labels"], full)
    assert not torch.equal(rows([sample("a", 64)])["labels"], full)
    assert torch.equal(LossRows(WindowCollator(), 1.0)([sample("a", 64)])["labels"], full)


def test_other_packages_collators_work():
    from transformers import DataCollatorForLanguageModeling

    from tests.train.tiny import byte_tokenizer

    collator = DataCollatorForLanguageModeling(byte_tokenizer(), mlm=False)
    features = [{"input_ids": list(range(3, 67)), "sample_id": "a"}, {"input_ids": list(range(3, 40))}]
    batch = LossRows(collator, 0.5, block_size=8)(features)
    _, drawn = supervised_blocks(batch, 8)
    assert drawn.sum() == 4 + 2
    assert "sample_id" not in batch


@pytest.mark.parametrize(
    "wrong", [{"share": 0}, {"share": 1.1}, {"share": True}, {"placement": "first"}, {"block_size": 0}]
)
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        LossRows(WindowCollator(), **wrong)


def test_a_batch_without_labels_is_refused():
    with pytest.raises(LabelsError, match="without labels"):
        LossRows(lambda features: {"input_ids": torch.ones(1, 4)}, 0.5)([{"input_ids": [1]}])
