"""Kept queries on all keys by rectangles and a diagonal, with stand-ins for the vendors' kernels.

The diagonal's kernels run in Triton's CPU interpreter, which must be chosen before triton is imported: a process of
its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lemo.ops import attend_forward, plan_rows
from lemo.ops.attend_rows.reference import Segments
from lemo.ops.attend_rows.stripes import Cut
from lemo.ops.attend_rows.vendor import refuses, why_not

PROGRAM = """
import json, sys, torch
from lemo.ops import plan_rows
from lemo.ops.attend_rows import stripes, tiling, vendor
from lemo.ops.attend_rows.cases import Shape, segments_of
from lemo.ops.attend_rows.reference import attend_backward_reference, attend_rows_reference

used = []

def forward(query, key, value, causal, scaling):
    used.append("forward")
    repeat = len(query) // len(key)
    score = query @ key.repeat_interleave(repeat, 0).mT * scaling
    return torch.softmax(score, -1) @ value.repeat_interleave(repeat, 0), torch.logsumexp(score, -1)

def backward(grad, query, key, value, output, lse, causal, scaling):
    used.append("backward")
    groups = len(key)
    keys, values = (t.repeat_interleave(len(query) // groups, 0) for t in (key, value))
    weight = torch.exp(query @ keys.mT * scaling - lse[..., None])
    d_score = weight * (grad @ values.mT - (grad * output).sum(-1, keepdim=True)) * scaling
    pair = d_score.mT @ query, weight.mT @ grad
    return d_score @ keys, *(t.unflatten(0, (groups, -1)).sum(1) for t in pair)

def inside(spans):
    first, end, low, high = *spans.query_S.tolist(), *spans.key_S.tolist()
    assert 0 <= end - first <= spans.most[0] and 0 <= high - low <= spans.most[1]
    return slice(first, end), slice(low, high), end > first and high > low

def varlen_forward(query, pair, spans, scaling):
    rows, columns, any_pair = inside(spans)
    made = torch.full_like(query, torch.nan), torch.full(query.shape[:2], torch.nan)
    if any_pair:
        made[0][:, rows], made[1][:, rows] = forward(query[:, rows], *(t[:, columns] for t in pair), False, scaling)
    return made

def varlen_backward(tensors, spans, scaling):
    rows, columns, any_pair = inside(spans)
    made = [torch.full_like(t, torch.nan) for t in tensors[1:4]]
    if any_pair:
        sides = (rows, rows, columns, columns, rows, rows)
        found = backward(*(t[:, side] for t, side in zip(tensors, sides)), False, scaling)
        made[0][:, rows], made[1][:, columns], made[2][:, columns] = found
    return made

stripes.varlen_forward, stripes.varlen_backward = varlen_forward, varlen_backward
shapes = {
    "one document": Shape(documents=(400,), heads=2, groups=1, share=0.7, order="NHD"),
    "packed": Shape(documents=(150, 1, 300), gap=3, heads=1, groups=1),
}
errors = {}
for name, shape in shapes.items():
    inputs = shape.inputs(torch.Generator().manual_seed(0))
    queries, keys = segments_of(inputs)
    exact = tensors = [inputs[n] for n in ("query_HND", "key_GKD", "value_GKD")]
    scaling = inputs["scaling"]
    saved = attend_rows_reference(*exact, queries, keys, scaling=scaling)
    grad = torch.randn(saved[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = *saved, *attend_backward_reference((grad, *exact, *saved), queries, keys, scaling=scaling)
    query, *pair = (t.float() for t in exact)
    marks = plan_rows(queries, keys, stripes.Cut(128, 128, 128)).marks
    work = tiling.Work.between(queries, keys)
    for dense in (vendor.Dense("stand-in", forward, backward), None):
        found = stripes.forward(query, pair, work, marks, scaling, dense)
        operands = (grad.float(), query, *pair, *(t.float() for t in saved))
        others = [torch.randn_like(t) for t in pair]
        found = *found, *stripes.backward(operands, work, marks, scaling, dense)
        ongoing = stripes.backward(operands, work, marks, scaling, dense, tuple(t.clone() for t in others))
        for what, actual, other, expected in zip(("dk", "dv"), ongoing[1:], others, wanted[3:], strict=True):
            error = float((actual - other - expected).abs().max() / expected.abs().max())
            errors[f"{name}, {dense and dense.name}, from a start: {what}"] = error
        for what, actual, expected in zip(("output", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
            error = float((actual - expected).abs().max() / expected.abs().max())
            errors[f"{name}, {dense and dense.name}: {what}"] = error
json.dump({"errors": errors, "used": sorted(set(used))}, sys.stdout)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_rectangles_and_diagonal_make_the_whole():
    source = Path(__file__).resolve().parents[2] / "src"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(source)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["used"] == ["backward", "forward"]  # the rectangles were not empty
    assert len(found["errors"]) == 28
    assert all(error < 1e-5 for error in found["errors"].values()), found["errors"]


def test_rectangles_hold_only_what_every_query_sees():
    generator = torch.Generator().manual_seed(0)
    position = torch.randperm(3000, generator=generator)[:1100].sort().values
    queries, keys = Segments((0,), (1100,), position), Segments((0,), (3000,), torch.arange(3000))
    cut = Cut(chunk=256, stripe=512, step=128)
    marks = plan_rows(queries, keys, cut).marks
    assert marks is not None
    depths, firsts = marks.read()
    assert len(depths) == 5 and len(firsts) == 6
    for at, depth in enumerate(depths):
        seen = int(position[at * cut.chunk]) + 1
        assert depth <= seen < depth + cut.step
    for at, first in enumerate(firsts):
        last = min((at + 1) * cut.stripe, 3000) - 1
        blind = int((position < last).sum())
        assert blind <= first <= blind + cut.step
        assert first == 1100 or int(position[first]) >= last


def test_planned_rows_attend_as_unplanned_ones_where_nothing_is_planned_for():
    queries, keys = (Segments((0,), (n,), torch.arange(0, 20, step)) for n, step in ((10, 2), (20, 1)))
    tensors = [torch.randn(2, n, 8) for n in (10, 20, 20)]
    plain = attend_forward(*tensors, queries, keys, scaling=0.3)
    torch.testing.assert_close(attend_forward(*tensors, plan_rows(queries, keys), keys, scaling=0.3), plain)


def test_sizes_that_let_tiles_cross_borders_are_refused():
    with pytest.raises(ValueError, match="128"):
        Cut(chunk=200)


def test_vendor_kernels_say_what_they_cannot_do():
    query = torch.zeros(1, 4, 8)
    assert "CUDA" in (why_not(query, None) or "")
    assert refuses(query, Segments((0,), (4,), torch.arange(4))) is None
    assert "no rows" in (refuses(query, Segments((0,), (0,), torch.arange(4))) or "")
