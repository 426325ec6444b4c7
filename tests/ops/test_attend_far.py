"""attend_backward on near keys and a sample of the far ones: against explicit weights, and its mean over draws."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lemo.errors import BackendError
from lemo.ops import attend_backward, attend_forward, draw_far, plan_far
from lemo.ops.attend_rows.cases import Shape, segments_of
from lemo.ops.attend_rows.far import FarKeys, far_counts
from lemo.ops.attend_rows.reference import Segments

STRIPE = 8
SHAPES = {
    "one document": Shape(documents=(90,), heads=4, groups=2),
    "packed": Shape(documents=(37, 5, 16, 17, 64), share=0.6, heads=6, groups=2),
    "gaps between documents": Shape(documents=(50, 41), gap=7, heads=2, groups=1),
    "runs": Shape(documents=(100,), share=0.3, block=12, heads=2, groups=2, order="NHD"),
}


def drawn(lengths, share, seed=0, stripe=STRIPE):
    """Draws for documents of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [-(-n // stripe) for n in lengths]
    return [draw_far(torch.randint(0, 2**62, (s, s), generator=generator), share) for s in sizes]


def operands(shape):
    """Gradient, query, key, value, output and log-sum-exp in fp64, the rows, and keywords."""
    inputs = shape.inputs(torch.Generator().manual_seed(0))
    queries, keys = segments_of(inputs)
    tensors = tuple(inputs[name] for name in ("query_HND", "key_GKD", "value_GKD"))
    saved = attend_forward(*tensors, queries, keys, scaling=inputs["scaling"])
    grad = torch.randn(saved[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return (grad, *tensors, *saved), queries, keys, {"scaling": inputs["scaling"]}


def explicit(tensors, queries, keys, far, scaling):
    """Every pair of the batch with the weight that its stripes say."""
    grad, query, key, value, output, _ = tensors
    repeat = len(query) // len(key)
    keys_HKD, values_HKD = (t.repeat_interleave(repeat, 0) for t in (key, value))
    count = torch.zeros(query.shape[1], key.shape[1], dtype=torch.float64)
    for d, (q, n, k, m) in enumerate(zip(queries.starts, queries.lengths, keys.starts, keys.lengths, strict=True)):
        for i in range(q, q + n):
            for j in range(k, k + m):
                ahead = int(queries.position_N[i]), int(keys.position_N[j])
                a, b = (position // far.stripe for position in ahead)
                if ahead[1] <= ahead[0]:
                    chosen = far.drawn[d][a]
                    count[i, j] = 1.0 if b >= a - 1 else (a - 1) / int(chosen.sum()) if chosen[b] else 0.0
    seen = torch.zeros_like(count, dtype=torch.bool)
    for q, n, k, m in zip(queries.starts, queries.lengths, keys.starts, keys.lengths, strict=True):
        seen[q : q + n, k : k + m] = queries.position_N[q : q + n, None] >= keys.position_N[k : k + m]
    score = (query @ keys_HKD.mT * scaling).masked_fill(~seen, -torch.inf)
    weight = torch.softmax(score, -1).nan_to_num(0.0) * count
    d_score = weight * (grad @ values_HKD.mT - (grad * output).sum(-1, keepdim=True)) * scaling
    pair = (t.unflatten(0, (len(key), repeat)).sum(1) for t in (d_score.mT @ query, weight.mT @ grad))
    return d_score @ keys_HKD, *pair


@pytest.mark.parametrize("share", [0.25, 0.6])
@pytest.mark.parametrize("name", SHAPES)
def test_pairs_count_as_their_stripes_say(name, share):
    tensors, queries, keys, options = operands(SHAPES[name])
    far = plan_far(queries, keys, drawn(keys.lengths, share), keys.lengths, stripe=STRIPE)
    found = attend_backward(*tensors, queries, keys, far=far, **options)
    torch.testing.assert_close(found, explicit(tensors, queries, keys, far, **options))
    full = attend_backward(*tensors, queries, keys, **options)
    assert not torch.allclose(found[1], full[1])


@pytest.mark.parametrize("name", SHAPES)
def test_all_far_keys_are_the_exact_gradient(name):
    tensors, queries, keys, options = operands(SHAPES[name])
    far = plan_far(queries, keys, drawn(keys.lengths, 1.0), keys.lengths, stripe=STRIPE)
    found = attend_backward(*tensors, queries, keys, far=far, **options)
    torch.testing.assert_close(found, attend_backward(*tensors, queries, keys, **options))


@pytest.mark.parametrize("own", [False, True])
def test_the_mean_over_draws_is_the_exact_gradient(own):
    """Within five standard errors of the mean, in every entry that the draws move at all."""
    tensors, queries, keys, options = operands(Shape(documents=(70, 33), heads=2, groups=1, share=0.4, head_dim=4))
    if own:
        own_N = torch.cat([queries.position_N[:28], queries.position_N[28:] + 70])
        options["own"] = tuple(t[:, own_N] for t in tensors[2:4])
    exact = attend_backward(*tensors, queries, keys, **options)
    draws = 600
    found = []
    for seed in range(draws):
        far = plan_far(queries, keys, drawn(keys.lengths, 0.25, seed), keys.lengths, stripe=STRIPE)
        found.append(attend_backward(*tensors, queries, keys, far=far, **options))
    for what, wanted, samples in zip(("dq", "dk", "dv"), exact, zip(*found, strict=True), strict=True):
        sample = torch.stack(samples)
        error, deviation = sample.mean(0) - wanted, sample.std(0) / draws**0.5
        assert bool((error.abs() <= 5 * deviation + 1e-12).all()), what
        assert bool((deviation > 0).any()) != (own and what != "dq")


def test_draws_are_uniform_and_leave_near_stripes_alone():
    generator = torch.Generator().manual_seed(0)
    tables = torch.stack([draw_far(torch.randint(0, 2**62, (9, 9), generator=generator), 0.4) for _ in range(2000)])
    counts = far_counts(9, 0.4)
    assert counts.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert bool((tables.sum(2) == counts).all())
    assert not tables.triu(-1).any()
    for a in range(2, 9):
        share = int(counts[a]) / (a - 1)
        assert bool(((tables[:, a, : a - 1].double().mean(0) - share).abs() < 0.05).all())


def test_documents_of_two_stripes_draw_nothing():
    lengths = (2 * STRIPE, 3, 0)
    rows = Segments((0, 16, 19), lengths, torch.cat([torch.arange(n) for n in lengths]))
    keys = replace(rows)
    assert plan_far(rows, keys, drawn(lengths, 0.25), lengths, stripe=STRIPE) is None


def test_rows_that_are_not_valid_do_not_count():
    """They lie at the end of their document and their gradient is 0."""
    tensors, _, keys, options = operands(Shape(documents=(70,), share=1.0))
    alive = 41
    rows = torch.arange(70) < alive
    mixed = Segments((0,), (70,), torch.cat([torch.arange(alive), torch.randperm(29) + alive]), rows)
    few = Segments((0,), (alive,), torch.arange(alive))
    tables = drawn((70,), 0.3)
    found, expected = [], []
    for side, at, made in ((mixed, slice(None), found), (few, slice(0, alive), expected)):
        far = plan_far(side, keys, tables, (70,), stripe=STRIPE)
        assert far is not None
        cut = [t[:, at] if n in (0, 1, 4, 5) else t for n, t in enumerate(tensors)]
        cut[0] = cut[0] * rows[at, None]
        made += attend_backward(*cut, side, keys, far=far, **options)
    torch.testing.assert_close(found[0][:, :alive], expected[0])
    torch.testing.assert_close(found[1:], expected[1:])
    first = plan_far(mixed, keys, tables, (70,), stripe=STRIPE).read()
    assert first == [0, 8, 16, 24, 32, 40, 41, 41, 41, 70]


def test_what_does_not_fit_is_refused():
    tensors, queries, keys, options = operands(SHAPES["one document"])
    tables = drawn(keys.lengths, 0.3)
    far = plan_far(queries, keys, tables, keys.lengths, stripe=STRIPE)
    with pytest.raises(ValueError, match="window"):
        attend_backward(*tensors, queries, keys, far=far, window=9, **options)
    with pytest.raises(ValueError, match="stripe"):
        plan_far(queries, keys, tables, keys.lengths, stripe=STRIPE + 1)
    with pytest.raises(ValueError, match="documents"):
        plan_far(queries, keys, tables * 2, keys.lengths, stripe=STRIPE)
    with pytest.raises(BackendError, match="CUDA"):
        attend_backward(*tensors, queries, keys, far=far, backend="vendor", **options)
    with pytest.raises(BackendError, match="whole tiles"):
        attend_backward(*tensors, queries, keys, far=far, backend="triton", **options)
    kept = FarKeys(far.drawn, 128)  # some rows of a document are no keys
    with pytest.raises(BackendError, match="not every row"):
        attend_backward(*tensors, queries, keys, far=kept, backend="triton", **options)


PROGRAM = """
import json, sys, torch
from lemo.ops import attend_backward, attend_forward, plan_far
from lemo.ops.attend_rows import far_stripes
from lemo.ops.attend_rows.cases import Shape, segments_of
from tests.ops.test_attend_far import drawn, operands

used = []

def varlen_backward(tensors, spans, scaling):
    grad, query, key, value, output, lse = tensors
    made = [torch.full_like(t, torch.nan) for t in (query, key, value)]
    ends, key_ends = spans.query_S.tolist(), spans.key_S.tolist()
    used.append(len(ends) - 1)
    for q, r, k, c in zip(ends, ends[1:], key_ends, key_ends[1:]):
        assert 0 < r - q <= spans.most[0] and 0 < c - k <= spans.most[1]
        repeat = len(query) // len(key)
        keys, values = (t[:, k:c].repeat_interleave(repeat, 0) for t in (key, value))
        weight = torch.exp(query[:, q:r] @ keys.mT * scaling - lse[:, q:r, None])
        delta = (grad[:, q:r] * output[:, q:r]).sum(-1, keepdim=True)
        d_score = weight * (grad[:, q:r] @ values.mT - delta) * scaling
        made[0][:, q:r] = d_score @ keys
        pair = d_score.mT @ query[:, q:r], weight.mT @ grad[:, q:r]
        for target, found in zip(made[1:], pair):
            target[:, k:c] = found.unflatten(0, (len(key), repeat)).sum(1)
    return made

far_stripes.varlen_backward = varlen_backward
far_stripes.GATHERED_KEYS = 256
shapes = {
    "runs": Shape(documents=(700,), heads=2, groups=1, share=0.3, block=50, order="NHD"),
    "packed": Shape(documents=(150, 1, 400), gap=3, share=0.2, heads=1, groups=1),
}
errors = {}
for name, shape in shapes.items():
    tensors, queries, keys, options = operands(shape)
    if shape.gap:  # queries lie end to end, keys do not
        chosen = torch.cat([torch.arange(s, s + n) for s, n in zip(queries.starts, queries.lengths)])
        starts = [sum(queries.lengths[:d]) for d in range(len(queries.lengths))]
        queries = type(queries)(tuple(starts), queries.lengths, queries.position_N[chosen])
        tensors = [t[:, chosen] if n in (0, 1, 4, 5) else t for n, t in enumerate(tensors)]
    far = plan_far(queries, keys, drawn(keys.lengths, 0.4, stripe=128), keys.lengths, stripe=128)
    single = [t.float() for t in tensors]
    sides = zip(queries.starts, queries.lengths, keys.starts)
    own_N = torch.cat([queries.position_N[q:q + n] + k for q, n, k in sides])
    for what in ("keys", "rows"):
        own = None if what == "keys" else tuple(t[:, own_N] for t in tensors[2:4])
        wanted = attend_backward(*tensors, queries, keys, far=far, own=own, backend="reference", **options)
        own = own and tuple(t.float() for t in own)
        found = {"triton": attend_backward(*single, queries, keys, far=far, own=own, backend="triton", **options)}
        if own is None:
            found["vendor"] = far_stripes.backward(tuple(single), queries, keys, far, options["scaling"], True)
        for backend, actual in found.items():
            for part, got, expected in zip(("dq", "dk", "dv"), actual, wanted, strict=True):
                assert got.dtype == torch.float32
                error = (got - expected).abs().max() / expected.abs().max()
                errors[f"{name}, {what}, {backend}: {part}"] = float(error)
json.dump({"errors": errors, "used": used}, sys.stdout)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_diagonals_and_rectangles_make_the_whole():
    """Kernels in Triton's CPU interpreter, in a process of its own; a stand-in for the vendor's kernel."""
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join((str(root / "src"), str(root)))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert len(found["used"]) > 5 and max(found["used"]) > 1  # several calls, and several sequences in one
    assert len(found["errors"]) == 18
    assert all(error < 1e-5 for error in found["errors"].values()), found["errors"]
