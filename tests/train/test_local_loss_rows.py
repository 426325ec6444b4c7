"""Local loss rows in the collator: drawn besides the others, marked by row, brought to the layers by any Trainer."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer

import lemo
from lemo.core.plan import Plan
from lemo.errors import ConfigError
from lemo.runtime.batch import LOCAL_ROWS, read_layout, supervised_rows
from lemo.train.collate import WindowCollator, WindowDataset
from lemo.train.loss_rows import LossRows
from lemo.train.trainer import LemoTrainer
from lemo.train.windows import Window
from tests.train.test_loss_rows import sample, supervised_blocks
from tests.train.test_trainer import arguments, dataset, seeded_model


def local_blocks(batch, block_size):
    """(layout, blocks of which all rows with loss are marked), after checking that all marks are of such blocks."""
    marks, rows = batch[LOCAL_ROWS], supervised_rows(batch)
    assert marks.dtype == torch.bool and marks.shape == batch["labels"].shape
    assert not (marks & ~rows).any(), "only rows that carry loss are marked"
    layout = read_layout(batch, None, block_size, marks)
    local_K = torch.zeros(len(layout.block_start_K), dtype=torch.bool) if layout.local_K is None else layout.local_K
    marked = marks.flatten() & (layout.block_of_row_N >= 0)
    assert torch.equal(marked, rows.flatten() & local_K[layout.block_of_row_N.clamp(min=0)])
    return layout, local_K


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=4),
    other=st.integers(2, 90),
    shares=st.sampled_from([(0.1, 0.25), (0.12, 0.85), (0.5, 0.5), (0.4, 0.1)]),
    placement=st.sampled_from(["random", "spread"]),
    side=st.sampled_from(["right", "left"]),
    block_size=st.sampled_from([1, 4, 8]),
    span=st.sampled_from([None, 2]),
)
def test_far_rows_stay_and_local_ones_come_on_top(lengths, other, shares, placement, side, block_size, span):
    features, plain = [sample("a", *lengths), sample("b", other)], WindowCollator(side=side)
    options = {"placement": placement, "seed": 3, "block_size": block_size}
    options |= {"span": None if span is None else span * block_size}
    before, candidates = supervised_blocks(plain(features), block_size)
    _, far = supervised_blocks(LossRows(plain, shares[0], **options)(features), block_size)
    batch = LossRows(plain, shares[0], local_share=shares[1], **options)(features)
    _, both = supervised_blocks(batch, block_size)
    _, local = local_blocks(batch, block_size)
    assert torch.equal(both & ~local, far) and not (local & far).any() and not (local & ~candidates).any()
    sequence = before.block_start_K // batch["labels"].shape[1]
    for b in range(2):
        total, count = int(candidates[sequence == b].sum()), int(both[sequence == b].sum())
        assert abs(count - sum(shares) * total) < 1
        assert sum(shares) < 1 or count == total


@pytest.mark.parametrize("placement", ["random", "spread"])
def test_every_block_is_local_as_often_as_any_other_and_in_runs(placement):
    rows = LossRows(WindowCollator(), 0.25, placement, block_size=8, span=16, local_share=0.25)
    seen, pairs = torch.zeros(32), 0
    for epoch in range(400):
        rows.set_epoch(epoch)
        batch = rows([sample("a", 256)])
        far, local = supervised_blocks(batch, 8)[1] & ~local_blocks(batch, 8)[1], local_blocks(batch, 8)[1]
        assert int(local.sum()) == 8
        # Among the blocks that are left, runs of two lie on a circle.
        left = local[~far]
        assert int((left & ~left.roll(1)).sum()) <= 4
        pairs += int((local & local.roll(1)).sum())
        seen += local
    assert (seen / 400 - 0.25).abs().max() < 5 * (0.25 * 0.75 / 400) ** 0.5
    assert pairs / 400 > 2.5, "most runs are whole: far blocks lie inside some"


def test_shift_labels_are_marked_by_row():
    def collator(features):
        tokens = torch.arange(32)[None]
        return {"input_ids": tokens, "shift_labels": tokens.clone()}

    batch = LossRows(collator, 0.25, block_size=8, local_share=0.5)([{"input_ids": list(range(32))}])
    kept, marks = batch["shift_labels"][0] != -100, batch[LOCAL_ROWS][0]
    assert marks.reshape(4, 8).all(1).sum() == marks.reshape(4, 8).any(1).sum() == 2
    assert not (marks & ~kept).any() and kept.sum() == 24


def test_answers_are_never_local(caplog):
    """A document with masked rows before learned ones; plain documents beside it have local rows."""
    learned = np.ones(128, dtype=bool)
    learned[64:100] = False
    mixed = WindowDataset([Window("a", np.arange(128) + 3, learned, (64, 64))])[0]
    answers = WindowDataset([Window("b", np.arange(64) + 3, np.arange(64) >= 20, (64,))])[0]
    rows = LossRows(WindowCollator(), 0.25, block_size=8, local_share=0.5)
    layout, local = local_blocks(rows([mixed]), 8)
    assert local.any() and set(layout.block_document_K[local].tolist()) == {0}
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="lemo"):
        for _ in range(2):
            batch = rows([answers])
            assert not batch[LOCAL_ROWS].any()
    assert [record.message for record in caplog.records if "no local loss rows" in record.message] != []
    assert len(caplog.records) == 1, "said once"
    assert torch.equal(batch["labels"], LossRows(WindowCollator(), 0.25, block_size=8)([answers])["labels"])


def test_labels_that_end_early_are_plain_text():
    """Collators mask the last tokens where padding and end of text are the same."""
    feature = sample("a", 64)
    feature["labels"][-2:] = -100
    batch = LossRows(WindowCollator(), 0.25, block_size=8, local_share=0.75)([feature])
    assert local_blocks(batch, 8)[1].sum() == 6


def test_no_marks_without_a_local_share_or_in_evaluation():
    rows = LossRows(WindowCollator(), 0.25, block_size=8, local_share=0.5)
    with rows.all_labels():
        assert LOCAL_ROWS not in rows([sample("a", 64)])
    assert LOCAL_ROWS not in LossRows(WindowCollator(), 0.25, block_size=8)([sample("a", 64)])


@pytest.mark.parametrize(
    "wrong",
    [
        {"local_share": -0.1},
        {"local_share": True},
        {"local_share": "0.5"},
        {"local_share": 0.6},
        {"local_share": 0.1, "share": 1.0},
        {"local_share": 0.1, "placement": "tail"},
        {"local_share": 0.1, "placement": "hardest", "block_losses": lambda feature: torch.zeros(1)},
        {"local_share": 0.1, "reweight": True},
    ],
)
def test_settings_that_do_not_go_together_are_refused(wrong):
    with pytest.raises(ConfigError, match="local_share"):
        LossRows(WindowCollator(), **({"share": 0.5} | wrong))


@pytest.mark.parametrize("kind", ["lemo", "plain", "plain with columns removed"])
def test_marks_reach_the_layers_and_not_the_model(tmp_path, kind, monkeypatch):
    """The executor parts the rows, in training alone; evaluation sees all labels and no marks."""
    from lemo.runtime import context

    model, parted = seeded_model(), []
    part_rows = context.part_rows

    def watched(plan, layout, rows, *rest):
        found = part_rows(plan, layout, rows, *rest)
        parted.append((len(found.far_n), len(found.near_n)))
        return found

    monkeypatch.setattr("lemo.runtime.step.part_rows", watched)
    plan = Plan.uniform(model, backward_ratio=0.25, block_size=8, gradient="keys", context_window=16, kv="all")
    cls = LemoTrainer if kind == "lemo" else Trainer
    before = [p.detach().clone() for p in model.parameters()]
    with lemo.attach(model, plan, self_test=False) as handle:
        trainer = cls(
            model=model,
            args=arguments(tmp_path, num_train_epochs=1, remove_unused_columns=kind.endswith("removed")),
            train_dataset=dataset(2, tokens=128),
            eval_dataset=dataset(1, seed=5, tokens=128),
            data_collator=LossRows(WindowCollator(), 0.125, block_size=8, local_share=0.25),
            **({"handle": handle} if kind == "lemo" else {}),
        )
        trainer.train()
        assert handle.sparse_batches == 2 and handle.notes == []
        # 2 steps of 2 layers: of 16 blocks two are far and four local; guards without loss are far, too.
        assert len(parted) == 4 and all(near == 32 and 16 <= far <= 32 for far, near in parted)
        if kind == "lemo":
            trainer.evaluate()
            assert len(parted) == 4
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
