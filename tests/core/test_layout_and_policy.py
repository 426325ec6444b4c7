"""Properties of layouts and selections over random ragged, packed batches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lemo.core.layout import Layout
from lemo.core.policy import document_budgets, select
from lemo.core.score import Recent, ScoreInputs
from lemo.errors import ConfigError

settings.register_profile("lemo", deadline=None, max_examples=60)
settings.load_profile("lemo")


@st.composite
def layouts(draw):
    """A batch of up to 3 sequences of documents with padding, some rows supervised."""
    tokens, block = draw(st.integers(1, 40)), draw(st.integers(1, 9))
    rows, supervised = [], []
    for _ in range(draw(st.integers(1, 3))):
        ids, document = [], 0
        while len(ids) < tokens:
            length = draw(st.integers(1, tokens))
            document += 1
            ids += [-1 if draw(st.integers(0, 3)) == 0 else document] * length
        rows.append(ids[:tokens])
        supervised.append(draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    return Layout.build(torch.tensor(rows), torch.tensor(supervised), block_size=block), torch.tensor(supervised)


@given(layouts())
def test_blocks_cut_documents_and_nothing_else(drawn):
    """Every real row is in one block of its own document; blocks start at the document's first row."""
    layout, supervised = drawn
    for block in range(len(layout.block_start_K)):
        start, length = int(layout.block_start_K[block]), int(layout.block_length_K[block])
        rows = torch.arange(start, start + length)
        assert torch.equal(layout.block_of_row_N[rows], torch.full((length,), block))
        assert (layout.document_of_row_N[rows] == layout.block_document_K[block]).all()
        assert int(layout.position_of_row_N[start]) % layout.block_size == 0
        assert bool(layout.supervised_K[block]) == bool(supervised.flatten()[rows].any())
    assert int((layout.block_of_row_N >= 0).sum()) == layout.real_rows == int(layout.block_length_K.sum())
    assert bool(((layout.document_of_row_N < 0) == (layout.block_of_row_N < 0)).all())


@given(layouts(), st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.integers(0, 5), st.sampled_from(["topk", "threshold"]))
def test_selection_is_sound(drawn, a, b, seed, policy):
    """Sizes are what the host knew; backward is in forward; forced blocks are in both; skipped is the rest."""
    layout, _ = drawn
    scores = torch.randn(len(layout.block_start_K), generator=torch.Generator().manual_seed(seed))
    forward, backward = max(a, b), min(a, b)
    made = select(layout, scores, forward_ratio=forward, backward_ratio=backward, policy=policy, threshold=0.0)
    real = set((layout.document_of_row_N >= 0).nonzero().flatten().tolist())
    forced = {row for row in real if layout.forced_K[layout.block_of_row_N[row]]}
    chosen = []
    for rows, ratio in ((made.forward, forward), (made.backward, backward)):
        if rows is None:
            chosen.append(real)
            continue
        kept = rows.chosen().tolist()
        assert kept == sorted(set(kept)) and set(kept) <= real and forced <= set(kept)
        assert sum(rows.segment_lengths) == rows.capacity == len(rows.rows_N)
        assert sorted(rows.rows_N.tolist() + rows.skipped_S.tolist()) == sorted(real)
        documents = layout.document_of_row_N[rows.rows_N]
        assert documents.tolist() == sorted(documents.tolist())
        blocks = torch.bincount(
            layout.block_document_K[layout.block_of_row_N[rows.rows_N].unique()], minlength=len(layout.document_start_D)
        )
        assert torch.equal(blocks, document_budgets(layout, ratio))
        chosen.append(set(kept))
    assert chosen[1] <= chosen[0]


@given(layouts(), st.integers(0, 5))
def test_topk_keeps_the_best_competing_blocks(drawn, seed):
    """No block that was left out scores higher than a competing block of its document that was kept."""
    layout, _ = drawn
    scores = torch.randn(len(layout.block_start_K), generator=torch.Generator().manual_seed(seed))
    rows = select(layout, scores, forward_ratio=0.5, backward_ratio=0.5).forward
    if rows is None:
        return
    kept = set(layout.block_of_row_N[rows.rows_N].tolist())
    for document in layout.block_document_K.unique():
        inside = [k for k in kept if layout.block_document_K[k] == document and not layout.forced_K[k]]
        outside = [k for k, d in enumerate(layout.block_document_K) if d == document and k not in kept]
        assert not inside or not outside or scores[inside].min() >= scores[outside].max()


@pytest.mark.parametrize(
    ("forward", "backward", "message"),
    [(0.0, 0.0, "forward_ratio"), (1.2, 0.5, "forward_ratio"), (0.4, 0.5, "must not exceed"), (True, 0.5, "forward")],
)
def test_bad_ratios_are_refused(forward, backward, message):
    """Ratios lie in (0, 1] and backward does not exceed forward; the message names the one that is wrong."""
    layout = Layout.build(torch.zeros(1, 32, dtype=torch.int64), None, block_size=4)
    with pytest.raises(ConfigError, match=message):
        select(layout, torch.zeros(8), forward_ratio=forward, backward_ratio=backward)


@pytest.mark.parametrize("size", [0, -3, 2.5, True, "64"])
def test_bad_block_sizes_are_refused(size):
    """A block size is a positive integer."""
    with pytest.raises(ConfigError, match="block_size"):
        Layout.build(torch.zeros(1, 8, dtype=torch.int64), None, block_size=size)


def test_bucket_rounds_the_budget_up_and_never_past_the_document():
    """Budgets become multiples of the bucket, so that shapes repeat."""
    layout = Layout.build(torch.zeros(1, 40, dtype=torch.int64), None, block_size=4)
    assert document_budgets(layout, 0.5, bucket=4).tolist() == [8]
    assert document_budgets(layout, 0.95, bucket=16).tolist() == [10]


@pytest.mark.parametrize("ratio", [0.1, 0.15, 0.5, 1.0])
def test_a_ratio_of_the_context_leaves_supervised_blocks_out(ratio):
    supervised = torch.zeros(1, 200, dtype=torch.bool)
    supervised[0, 80:160] = True  # blocks 8 to 15 of 20
    layout = Layout.build(torch.zeros(1, 200, dtype=torch.int64), supervised, block_size=10)
    scores = torch.arange(20.0)
    rows = select(layout, scores, forward_ratio=ratio, backward_ratio=ratio, ratio_of="context").forward
    kept = set(range(20)) if rows is None else set((rows.rows_N // 10).tolist())
    # Of the twelve blocks of context the two guards are always kept.
    assert set(range(8, 16)) | {0, 19} <= kept
    assert len(kept) == 8 + max(2, math.ceil(ratio * 12 - 1e-9))
    assert document_budgets(layout, ratio, 1, "context").tolist() == [len(kept)]
    assert int(document_budgets(layout, ratio)) <= len(kept)
    bare = Layout.build(torch.zeros(1, 200, dtype=torch.int64), None, block_size=10)
    assert torch.equal(document_budgets(bare, ratio, 1, "context"), document_budgets(bare, ratio))
    with pytest.raises(ConfigError, match="ratio_of"):
        select(layout, scores, forward_ratio=ratio, backward_ratio=ratio, ratio_of="rows")


@pytest.mark.parametrize("policy", ["topk", "threshold"])
def test_scores_of_the_host_ask_no_device(policy):
    """The meta device has no values that could be asked for."""
    ids, supervised = torch.zeros(1, 100, dtype=torch.int64), torch.zeros(1, 100, dtype=torch.bool)
    supervised[0, 60:80] = True
    options = {"forward_ratio": 1.0, "backward_ratio": 0.5, "policy": policy, "threshold": -1.5}
    layouts = [Layout.build(ids, supervised, block_size=10, device=device) for device in ("meta", "cpu")]
    far, near = (select(layout, Recent().scores(ScoreInputs(layout)), **options).backward for layout in layouts)
    for name in ("rows_N", "skipped_S", "valid_N"):
        there, here = getattr(far, name), getattr(near, name)
        assert (there is None) == (here is None)
        assert there is None or (there.is_meta and there.shape == here.shape and not here.is_meta)
    assert far.segment_lengths == near.segment_lengths == (50,)
    assert set((near.chosen() // 10).tolist()) == {0, 5, 6, 7, 9}
