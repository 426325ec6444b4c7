"""evaluate_loss equals the model's own loss, by position and in all; sparse equals what the attached model computes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lemo
from lemo.core.plan import Plan
from lemo.errors import ConfigError, DataError
from lemo.eval.perplexity import evaluate_loss
from lemo.families import all_families
from lemo.train.collate import WindowCollator, WindowDataset
from lemo.train.data import token_batches
from lemo.train.windows import Window
from tests.train.tiny import tiny_llama


def batches_of(*lengths, batch_size=1, side="right", vocabulary=128):
    rng = np.random.default_rng(0)
    windows = [
        Window(str(i), rng.integers(3, vocabulary, sum(n if isinstance(n, tuple) else (n,))), lengths=n)
        if isinstance(n, tuple)
        else Window(str(i), rng.integers(3, vocabulary, n), lengths=(n,))
        for i, n in enumerate(lengths)
    ]
    return token_batches(WindowDataset(windows), WindowCollator(side=side), batch_size)


def plain_losses(model, batch):
    """Per-row losses from full logits; zero where nothing is predicted."""
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
    shifted = torch.full_like(batch["labels"], -100)
    shifted[:, :-1] = batch["labels"][:, 1:]
    return F.cross_entropy(logits.transpose(1, 2).float(), shifted, reduction="none"), shifted != -100


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "granite", "gpt2"])
def test_dense_loss_is_that_of_full_logits(family):
    from transformers import AutoModelForCausalLM

    described = all_families()[family]
    model = AutoModelForCausalLM.from_config(described.tiny_config(), attn_implementation=described.attention).eval()
    batches = batches_of(50, 30, batch_size=2)
    loss, mask = plain_losses(model, batches[0])
    report = evaluate_loss(model, batches, segment_rows=7)
    assert report.tokens == int(mask.sum()) == 78
    assert report.nats == pytest.approx(float(loss.sum() / mask.sum()), rel=1e-5)
    assert report.perplexity == pytest.approx(math.exp(report.nats))
    means = [float(loss[b].sum() / mask[b].sum()) for b in range(2)]
    assert report.by_sequence == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_are_those_of_the_document(side):
    model = tiny_llama(layers=1).eval()
    batches = batches_of(40, 24, batch_size=2, side=side)
    loss, mask = plain_losses(model, batches[0])
    first = [0, 0 if side == "right" else 16]
    position = torch.arange(40)[None] - torch.tensor(first)[:, None]
    report = evaluate_loss(model, batches, bins=4)
    assert [(p.start, p.end) for p in report.by_position] == [(0, 10), (10, 20), (20, 30), (30, 40)]
    for part in report.by_position:
        inside = mask & (position >= part.start) & (position < part.end)
        assert part.tokens == int(inside.sum())
        assert part.nats == pytest.approx(float(loss[inside].mean()), rel=1e-5)


def test_packed_documents_count_as_if_alone():
    model = tiny_llama(layers=2).eval()
    packed = batches_of((20, 12))
    alone = [
        {k: v[:, part] for k, v in packed[0].items() if k in ("input_ids", "labels")}
        for part in (slice(0, 20), slice(20, 32))
    ]
    assert evaluate_loss(model, packed).nats == pytest.approx(evaluate_loss(model, alone).nats, rel=1e-6)


def test_sparse_and_dense_with_a_plan_attached():
    model = tiny_llama(layers=3)
    model.train()
    batches = batches_of(64, 48, batch_size=2)
    batches[0]["labels"][:, :40] = -100
    plain = evaluate_loss(model, batches)
    plan = lemo.Plan.uniform(3, forward_ratio=0.5, backward_ratio=0.5, block_size=8)
    with lemo.attach(model, plan, unsafe_no_bypass=True, self_test=False) as handle:
        assert evaluate_loss(model, batches, handle=handle) == plain
        sparse = evaluate_loss(model, batches, handle=handle, sparse=True)
        assert (handle.sparse_batches, handle.dense_batches, handle.selections) == (0, 0, {})
        assert evaluate_loss(model, batches, handle=handle, sparse=True) == sparse
        with handle.sparse_evaluation(), handle.loss_only():
            model.eval()
            with torch.no_grad():
                own = model(**batches[0]).loss
            model.train()
        keep_all = lemo.Plan.uniform(3, forward_ratio=1.0, backward_ratio=1.0)
    assert sparse.mode == "sparse (look-ahead)" and plain.mode == "dense"
    assert sparse.tokens == plain.tokens
    assert sparse.nats == pytest.approx(float(own), rel=1e-5)
    assert sparse.nats != pytest.approx(plain.nats, rel=1e-6)
    with lemo.attach(model, keep_all, self_test=False) as handle:
        assert evaluate_loss(model, batches, handle=handle, sparse=True).nats == plain.nats
    assert model.training


def test_a_sparse_evaluation_that_skips_nothing_is_refused():
    model = tiny_llama(layers=3)
    plan = lemo.Plan.uniform(3, forward_ratio=0.5, backward_ratio=0.5, block_size=8)
    with (
        lemo.attach(model, plan, unsafe_no_bypass=True, self_test=False) as handle,
        pytest.raises(ConfigError, match="nothing to skip"),
    ):
        evaluate_loss(model, batches_of(64), handle=handle, sparse=True)


def test_what_cannot_be_evaluated_is_refused():
    model = tiny_llama(layers=1)
    batches = batches_of(8)
    with pytest.raises(ConfigError, match="needs the handle"):
        evaluate_loss(model, batches, sparse=True)
    with pytest.raises(DataError, match="batches with labels"):
        evaluate_loss(model, [{"input_ids": batches[0]["input_ids"]}])
    batches[0]["labels"][:] = -100
    with pytest.raises(DataError, match="no token"):
        evaluate_loss(model, batches)
    assert model.training


def with_labels(batches, keep):
    """The batches with the labels of some positions only."""
    found = []
    for batch in batches:
        labels = batch["labels"].clone()
        labels[:, [i for i in range(labels.shape[1]) if not keep(i)]] = -100
        found.append({**batch, "labels": labels})
    return found


def test_a_subset_of_the_labels_is_measured_in_the_same_forward():
    model = tiny_llama(layers=2).eval()
    batches = batches_of(40, 24, 33)
    some = with_labels(batches, lambda i: i % 8 < 3)
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    report = evaluate_loss(model, batches, subset=some)
    hook.remove()
    assert len(calls) == len(batches)
    alone = evaluate_loss(model, some)
    assert 0 < alone.tokens < report.tokens
    assert report.subset.to_dict() == alone.to_dict()
    assert report.to_dict() == evaluate_loss(model, batches).to_dict()


def test_a_subset_must_be_one():
    model = tiny_llama(layers=1).eval()
    batches = batches_of(40, 24)
    some = with_labels(batches, lambda i: i % 2)
    with pytest.raises(DataError, match="lacks"):
        evaluate_loss(model, some, subset=batches)
    for others in (some[:1], some[::-1], [{"input_ids": b["input_ids"]} for b in batches]):
        with pytest.raises(DataError, match="same batches"):
            evaluate_loss(model, batches, subset=others)
    plan = Plan.uniform(model, forward_ratio=0.5, backward_ratio=0.5)
    with lemo.attach(model, plan, unsafe_no_bypass=True) as handle, pytest.raises(ConfigError, match="needs its own"):
        evaluate_loss(model, batches, handle=handle, sparse=True, subset=some)
