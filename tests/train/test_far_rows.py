"""Far rows by repeats: which of the drawn loss rows see all keys depends on what comes back from beyond their view."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lemo.config import RunConfig
from lemo.errors import ConfigError, LabelsError
from lemo.measure.flops import DecoderShape, LayerWork, layer_flops
from lemo.runtime.batch import LOCAL_ROWS, read_layout
from lemo.train.collate import WindowCollator, WindowDataset
from lemo.train.far_rows import GRAM, block_scores, choose_far, repeats_beyond
from lemo.train.loss_rows import LossRows
from lemo.train.planning import training_collator
from lemo.train.windows import Window
from tests.train.test_local_loss_rows import local_blocks
from tests.train.test_loss_rows import sample, supervised_blocks


def repeats_by_search(ids, document, position, window):
    """The definition, row by row."""
    found = torch.zeros(len(ids), dtype=torch.bool)
    for t in range(len(ids)):
        if document[t] < 0 or position[t] < GRAM - 1:
            continue
        near = (int(position[t]) // window - 1) * window
        gram, before = ids[t - GRAM + 1 : t + 1].tolist(), []
        for s in range(GRAM - 1, t):
            inside = document[s] == document[t] and position[s] >= GRAM - 1
            if inside and ids[s - GRAM + 1 : s + 1].tolist() == gram:
                before.append(int(position[s]))
        found[t] = bool(before) and max(before) < near
    return found


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    words=st.integers(1, 4),
    window=st.sampled_from([4, 8, 16]),
    side=st.sampled_from(["right", "left"]),
    seed=st.integers(0, 99),
)
def test_repeats_are_those_of_the_definition(lengths, words, window, side, seed):
    """Packed documents and padding, with few words so that much comes back."""
    draw = np.random.default_rng(seed)
    first = WindowDataset([Window("a", draw.integers(3, 3 + words, sum(lengths)), None, tuple(lengths))])[0]
    other = WindowDataset([Window("b", draw.integers(3, 3 + words, 70), None, (70,))])[0]
    batch = WindowCollator(side=side)([first, other])
    layout = read_layout(batch, None, 4)
    ids_N = batch["input_ids"].reshape(-1)
    found = repeats_beyond(ids_N, layout, window)
    wanted = repeats_by_search(ids_N, layout.document_of_row_N, layout.position_of_row_N, window)
    assert torch.equal(found, wanted)
    scores, block_N = block_scores(ids_N, layout, window), layout.block_of_row_N
    assert torch.equal(scores > 0, torch.bincount(block_N[found], minlength=len(scores)) > 0)


def planted(length: int = 512) -> np.ndarray:
    """A text in which nothing comes back but its first 32 tokens, in rows 384 to 416."""
    text = np.arange(length) + 10
    text[384:416] = text[:32]
    return text


def test_the_run_that_repeats_what_is_far_is_far():
    window = WindowDataset([Window("a", planted(), None, (512,))])[0]
    options = {"block_size": 8, "span": 32, "local_share": 0.5}
    drawn = LossRows(WindowCollator(), 0.0625, **options)
    chosen = LossRows(WindowCollator(), 0.0625, repeats_beyond=64, **options)
    hits = []
    for epoch in range(200):
        for rows in (drawn, chosen):
            rows.set_epoch(epoch)
        before, after = drawn([window]), chosen([window])
        assert torch.equal(before["labels"], after["labels"]), "the same rows carry loss"
        far = [supervised_blocks(b, 8)[1] & ~local_blocks(b, 8)[1] for b in (before, after)]
        assert far[0].sum() == far[1].sum() == 4
        # Rows 386 to 415 repeat three tokens: blocks 48 to 51.
        loss = supervised_blocks(after, 8)[1]
        if loss[48:52].all():
            hits.append((int(far[0][48:52].sum()), int(far[1][48:52].sum())))
    assert len(hits) > 10
    assert min(chosen for _, chosen in hits) >= 2 and sum(chosen for _, chosen in hits) / len(hits) > 3
    assert sum(drawn for drawn, _ in hits) < 0.5 * sum(chosen for _, chosen in hits)


def test_without_repeats_far_rows_are_as_evenly_spread_as_drawn_ones():
    rows = LossRows(WindowCollator(), 0.25, block_size=8, span=16, local_share=0.25, repeats_beyond=16)
    seen, plain = torch.zeros(32), WindowDataset([Window("a", np.arange(256) + 3, None, (256,))])[0]
    for epoch in range(400):
        rows.set_epoch(epoch)
        batch = rows([plain])
        far = supervised_blocks(batch, 8)[1] & ~local_blocks(batch, 8)[1]
        assert int(far.sum()) == 8
        seen += far
    assert (seen / 400 - 0.25).abs().max() < 5 * (0.25 * 0.75 / 400) ** 0.5


@given(
    places=st.sets(st.integers(0, 63), min_size=1, max_size=40),
    share=st.floats(0, 1),
    span=st.sampled_from([1, 2, 4, 16]),
    seed=st.integers(0, 9),
)
def test_far_blocks_are_counted_distinct_and_the_best_runs(places, share, span, seed):
    blocks = torch.tensor(sorted(places))
    score_K = torch.from_numpy(np.random.default_rng(seed).integers(0, 5, 64)).double()
    count = round(share * len(blocks))
    far = choose_far(blocks, score_K, count, span, np.random.default_rng(seed))
    assert len(far) == count == len(far.unique()) and bool((far.diff() > 0).all())
    if span == 1 and 0 < count < len(blocks):
        left = torch.ones(len(blocks), dtype=torch.bool)
        left[far] = False
        assert score_K[blocks[far]].min() >= score_K[blocks[left]].max()


def test_the_token_that_a_row_predicts_is_not_read():
    """Row 66 ends a gram that came before; changing any later token changes nothing up to it."""
    text = torch.cat([torch.arange(64), torch.arange(64)]) + 5
    layout = read_layout({"input_ids": text[None]}, None, 8)
    whole = repeats_beyond(text, layout, 16)
    for cut in (66, 90, 126):
        changed = text.clone()
        changed[cut + 1 :] = torch.arange(127 - cut) + 1000
        assert torch.equal(repeats_beyond(changed, layout, 16)[: cut + 1], whole[: cut + 1])
    assert bool(whole[66]) and not whole[:66].any()


def test_a_dense_twin_and_evaluation_are_left_alone():
    window = WindowDataset([Window("a", planted(), None, (512,))])[0]
    rows = LossRows(WindowCollator(), 0.1, block_size=8, local_share=0.3, repeats_beyond=64)
    with_marks = rows([window])
    rows.marks_local = False
    assert LOCAL_ROWS not in rows([window]) and torch.equal(rows([window])["labels"], with_marks["labels"])
    with rows.all_labels():
        assert (rows([window])["labels"][0, 1:] != -100).all()


@pytest.mark.parametrize("wrong", [0, -1, True, 64.0, "64"])
def test_wrong_windows_are_refused(wrong):
    with pytest.raises(ConfigError, match="repeats_beyond"):
        LossRows(WindowCollator(), 0.1, local_share=0.2, repeats_beyond=wrong)


def test_a_batch_without_tokens_is_refused():
    def embedded(features):
        tokens = torch.arange(64)[None]
        return {"inputs_embeds": torch.zeros(1, 64, 4), "labels": tokens}

    with pytest.raises(LabelsError, match="without input_ids"):
        LossRows(embedded, 0.2, block_size=8, local_share=0.4, repeats_beyond=8)([sample("a", 64)])


def test_recipes_choose_by_repeats_within_the_window_in_force():
    run = RunConfig()
    collator = training_collator(run, None)
    assert run.loss_rows.far == "repeats" and collator.repeats_beyond == run.context_window == 1024
    drawn = replace(run, loss_rows=replace(run.loss_rows, far="random"))
    none = replace(run, loss_rows=replace(run.loss_rows, local_share=0.0))
    assert training_collator(drawn, None).repeats_beyond is None is training_collator(none, None).repeats_beyond


def test_late_far_rows_cost_more_attention_in_both_directions():
    shape = DecoderShape(4, 64, 128, 4, 4, 16, 100)
    works = [
        LayerWork(1.0, 0.1, gradient="keys", context_window=64, local_ratio=0.2, far_place=place)
        for place in (0.25, 0.5, 0.75)
    ]
    early, even, late = (layer_flops(shape, 4096, work) for work in works)
    assert late.forward - even.forward == pytest.approx(even.forward - early.forward)
    assert early.forward < even.forward < late.forward and early.backward < even.backward < late.backward
    with pytest.raises(ConfigError, match="far_place"):
        LayerWork(far_place=1.0)
