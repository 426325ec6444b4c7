"""Laws of rank_blocks and select_rows on drawn layouts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lemo.ops import rank_blocks, select_rows
from lemo.ops.select_rows.cases import _inputs, _run, _run_reference
from lemo.ops.select_rows.reference import BlockTable


@st.composite
def drawn(draw):
    options = {
        "documents": tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))),
        "block": draw(st.integers(1, 9)),
        "ratio": draw(st.floats(0.01, 1.0)),
        "forced": draw(st.floats(0, 0.5)),
        "ties": draw(st.booleans()),
        "gap": draw(st.integers(0, 4)),
        "threshold": draw(st.none() | st.floats(-1, 1)),
    }
    return _inputs(torch.Generator().manual_seed(draw(st.integers(0, 2**16))), **options)


@given(drawn())
def test_meets_the_reference(inputs):
    found, expected = _run(**inputs), _run_reference(**inputs)
    assert torch.equal(found.rows_N, expected.rows_N) and torch.equal(found.skipped_S, expected.skipped_S)
    assert found.segment_lengths == expected.segment_lengths
    assert (found.valid_N is None) == (expected.valid_N is None)
    assert found.valid_N is None or torch.equal(found.valid_N, expected.valid_N)


@given(drawn())
def test_rows_partition_the_documents(inputs):
    found = _run(**inputs)
    every = [
        row
        for start, length in zip(inputs["block_start_K"].tolist(), inputs["block_length_K"].tolist(), strict=True)
        for row in range(start, start + length)
    ]
    assert sorted(found.rows_N.tolist() + found.skipped_S.tolist()) == every
    assert sum(found.segment_lengths) == len(found.rows_N)


@given(drawn())
def test_forced_blocks_are_always_chosen(inputs):
    found = _run(**inputs)
    chosen = set((found.rows_N if found.valid_N is None else found.rows_N[found.valid_N]).tolist())
    for k in inputs["forced_K"].nonzero().flatten().tolist():
        start, length = int(inputs["block_start_K"][k]), int(inputs["block_length_K"][k])
        assert chosen.issuperset(range(start, start + length))


@given(drawn(), st.floats(0.1, 4), st.floats(-3, 3))
def test_only_the_order_of_scores_matters(inputs, factor, offset):
    found = _run(**{**inputs, "threshold": None})
    moved = _run(**{**inputs, "threshold": None, "scores_K": torch.atan(inputs["scores_K"]) * factor + offset})
    assert torch.equal(found.rows_N, moved.rows_N)


def test_ranks_forced_first_then_by_score_with_ties_early_and_nan_last():
    scores = torch.tensor([0.0, 5.0, torch.nan, 5.0, torch.inf, -torch.inf, 1.0])
    forced = torch.tensor([False, False, False, False, False, False, True])
    table = BlockTable(torch.arange(7), torch.ones(7, dtype=torch.int64), torch.zeros(7, dtype=torch.int64), forced)
    assert rank_blocks(scores, table).tolist() == [4, 2, 5, 3, 1, 6, 0]


LAYOUT = {
    "start_K": torch.tensor([0, 4, 8]),
    "length_K": torch.tensor([4, 4, 2]),
    "document_K": torch.tensor([0, 0, 0]),
    "forced_K": torch.tensor([False, False, True]),
}


@pytest.mark.parametrize(
    ("budget", "changes", "message"),
    [
        ([0], {}, "budget_D"),
        ([4], {}, "budget_D"),
        ([2], {"forced_K": torch.tensor([False, False, False])}, "one length"),
        ([2], {"forced_K": torch.tensor([False, False])}, "K"),
        ([2], {"start_K": torch.zeros(3, device="meta")}, "on the CPU"),
    ],
)
def test_refuses_what_does_not_fit(budget, changes, message):
    with pytest.raises(ValueError, match=message):
        select_rows(torch.tensor([1, 2, 0]), torch.tensor(budget), BlockTable(**{**LAYOUT, **changes}))


def test_numbers_per_block_must_fit_the_table():
    table = BlockTable(**LAYOUT)
    with pytest.raises(ValueError, match="per block"):
        rank_blocks(torch.zeros(2), table)
    with pytest.raises(ValueError, match="keep_K"):
        select_rows(torch.tensor([1, 2, 0]), torch.tensor([2]), table, keep_K=torch.ones(3))


def test_a_table_is_worked_out_once(monkeypatch):
    """Every layer of a batch asks with the same table and budgets: nothing is copied or counted a second time."""
    from lemo.ops.select_rows import op

    table, copies, copy = BlockTable(**LAYOUT), [], op.send
    monkeypatch.setattr(op, "send", lambda t, device: copies.append(t) or copy(t, device))
    for _ in range(3):
        rank = rank_blocks(torch.randn(3), table)
        select_rows(rank, torch.tensor([2]), table)
    once = len(copies)
    assert once > 0
    select_rows(rank, torch.tensor([3]), table)
    assert len(copies) == once + 1
