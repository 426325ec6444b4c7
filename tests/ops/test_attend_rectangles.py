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
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lemo.ops import attend_forward, plan_rows
from lemo.ops.attend_rows.cuts import Cut, cut_document
from lemo.ops.attend_rows.reference import Segments
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

shapes = {
    "one document": Shape(documents=(400,), heads=2, groups=1, share=0.7, order="NHD"),
    "packed": Shape(documents=(150, 1, 300), gap=3, heads=1, groups=1),
    "runs": Shape(documents=(1500, 700), gap=3, heads=1, groups=1, share=0.3, block=130, head_dim=8),
}
errors, runs = {}, {}
for name, shape in shapes.items():
    inputs = shape.inputs(torch.Generator().manual_seed(0))
    queries, keys = segments_of(inputs)
    exact = tensors = [inputs[n] for n in ("query_HND", "key_GKD", "value_GKD")]
    scaling = inputs["scaling"]
    saved = attend_rows_reference(*exact, queries, keys, scaling=scaling)
    grad = torch.randn(saved[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = *saved, *attend_backward_reference((grad, *exact, *saved), queries, keys, scaling=scaling)
    query, *pair = (t.float() for t in exact)
    cut = stripes.Cut(128, 128, 128, 100)
    marks = plan_rows(queries, keys, cut).marks
    runs[name] = sum(any(c[0] % 128 for c in r.chunks) for *_, r in marks.staircase(32).documents)
    work, dense = tiling.Work.between(queries, keys), vendor.Dense("stand-in", forward, backward)
    found = stripes.forward(query, pair, work, marks, scaling, dense)
    operands = (grad.float(), query, *pair, *(t.float() for t in saved))
    others = [torch.randn_like(t) for t in pair]
    found = *found, *stripes.backward(operands, work, marks, scaling, dense)
    ongoing = stripes.backward(operands, work, marks, scaling, dense, tuple(t.clone() for t in others))
    for what, actual, other, expected in zip(("dk", "dv"), ongoing[1:], others, wanted[3:], strict=True):
        error = float((actual - other - expected).abs().max() / expected.abs().max())
        errors[f"{name}, from a start: {what}"] = error
    for what, actual, expected in zip(("output", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        errors[f"{name}: {what}"] = float((actual - expected).abs().max() / expected.abs().max())
json.dump({"errors": errors, "used": sorted(set(used)), "runs": runs}, sys.stdout)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_rectangles_and_diagonal_make_the_whole():
    source = Path(__file__).resolve().parents[2] / "src"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(source)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["used"] == ["backward", "forward"]  # the rectangles were not empty
    assert found["runs"] == {"one document": 0, "packed": 0, "runs": 2}  # documents cut where runs begin
    assert len(found["errors"]) == 21
    assert all(error < 1e-5 for error in found["errors"].values()), found["errors"]


KEYS = 6000
CUT = Cut(chunk=256, stripe=512, step=128, run=200)
SCATTERED = torch.randperm(KEYS, generator=torch.Generator().manual_seed(0))[:1100].sort().values
RUNS = torch.cat([torch.arange(a, b) for a, b in ((130, 450), (900, 960), (2000, 2800), (3300, 3700))])
POSITIONS = {
    "scattered": SCATTERED,
    "runs": RUNS,
    "runs to both ends": torch.cat([torch.arange(300), torch.arange(3000, 3300), torch.arange(KEYS - 300, KEYS)]),
    "all rows": torch.arange(KEYS),
    "the last row": torch.tensor([KEYS - 1]),
    "the first row": torch.tensor([0]),
}


@pytest.mark.parametrize("tile", [32, 64])
@pytest.mark.parametrize("name", POSITIONS)
def test_rectangles_hold_only_what_every_query_sees(name, tile):
    seen_N = POSITIONS[name] + 1
    found = cut_document(seen_N, KEYS, CUT, tile)
    for parts, size in ((found.chunks, len(seen_N)), (found.stripes, KEYS)):
        assert [part[0] for part in parts] == [0, *(part[1] for part in parts[:-1])] and parts[-1][1] == size
    for begin, end, depth in found.chunks:
        assert end - begin <= CUT.chunk and begin % tile == 0
        assert depth % CUT.step == 0 and depth <= int(seen_N[begin]) < depth + CUT.step
    for begin, end, first in found.stripes:
        assert end - begin <= 2 * CUT.stripe and begin % CUT.step == 0
        assert bool((seen_N[first:] >= end).all()) and (first % tile == 0 or first == len(seen_N))
    assert found.stripes[-1][2] == len(seen_N)


def _left_over(seen_N: torch.Tensor, cut: Cut) -> tuple[int, int]:
    """Pairs that rectangles leave to the other kernels, forward and backward."""
    found, pairs = cut_document(seen_N, KEYS, cut, 64), int(seen_N.sum())
    forward = sum((end - begin) * depth for begin, end, depth in found.chunks)
    backward = sum((end - begin) * (len(seen_N) - first) for begin, end, first in found.stripes)
    return pairs - forward, pairs - backward


def test_cuts_where_runs_begin_leave_less():
    by_runs, even = _left_over(RUNS + 1, CUT), _left_over(RUNS + 1, replace(CUT, run=KEYS))
    assert all(2 * less < more for less, more in zip(by_runs, even, strict=True)), (by_runs, even)
    assert _left_over(SCATTERED + 1, CUT) == _left_over(SCATTERED + 1, replace(CUT, run=KEYS))


def test_documents_without_queries_are_cut_into_keys_alone():
    found = cut_document(torch.tensor([], dtype=torch.int32), 1000, CUT, 64)
    assert found.chunks == () and all(first == 0 for *_, first in found.stripes)


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
