"""Triton kernels in Triton's CPU interpreter. It must be chosen before triton is imported: a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import importlib, json, sys, torch
from functools import partial
from lemo.testing import check_error_budget, outputs_and_gradients, poisoned_allocations

module = importlib.import_module(f"lemo.ops.{sys.argv[1]}.cases")
SPECS = getattr(module, "SPECS", None) or [module.SPEC]
cases = [(SPEC, case) for SPEC in SPECS for case in SPEC.cases if case.kernel]
failed = {}
for SPEC, case in cases:
    for dtype in (torch.float32, torch.float16):
        exact = outputs_and_gradients(SPEC.reference, case.inputs(0, torch.float64), case.gradients)
        working = outputs_and_gradients(SPEC.reference, case.inputs(0, dtype), case.gradients)
        try:
            with poisoned_allocations():
                run = partial(SPEC.run, backend="triton")
                actual = outputs_and_gradients(run, case.inputs(0, dtype), case.gradients)
            for name in exact:
                check_error_budget(actual[name], working[name], exact[name], ulps=case.ulps, what=name)
        except Exception as error:
            failed[f"{SPEC.name}, {case.name}, {dtype}"] = f"{type(error).__name__}: {error}"
for SPEC in (SPEC for SPEC in SPECS if SPEC.kernel_call):
    op, arguments = SPEC.kernel_call(next(c for c in SPEC.cases if c.kernel).inputs(0, torch.float32))
    torch.library.opcheck(op, arguments)
json.dump({"cases": len(cases), "failed": failed}, sys.stdout)
"""

STARTED = """
import torch
from lemo.ops.attend_local import op, vendor
from lemo.ops.attend_local.plan import plan_local
from lemo.ops.attend_local.reference import attend_local_reference
from lemo.ops.attend_rows.reference import Segments
from lemo.testing import poisoned_allocations

def batched(query, key, value, causal, scaling):
    score = query.float() @ key.float().repeat_interleave(2, 1).mT * scaling
    if causal:
        score = score.masked_fill(torch.ones(score.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    output = torch.softmax(score, -1) @ value.float().repeat_interleave(2, 1)
    return output.to(query.dtype), torch.logsumexp(score, -1)

vendor.batched_kernel = lambda *arguments: batched
vendor.MOST_ROWS = 32
lengths = (85, 4, 1, 17, 32)
starts = tuple(sum(lengths[:i]) for i in range(len(lengths)))
rows = Segments(starts, lengths, torch.cat([torch.arange(n) for n in lengths]))
draw = torch.Generator().manual_seed(0)
query, key, value = (torch.randn(h, sum(lengths), 16, generator=draw).half() for h in (4, 2, 2))

def run():
    local = plan_local(rows, rows, chunk=16, sink=4, whole=True)
    return op._kernels(query, (key, value), local, 0.3, True)

first = run()
with poisoned_allocations():
    second = run()
assert all(torch.equal(a, b) for a, b in zip(first, second))
expected = attend_local_reference(query, key, value, plan_local(rows, rows, chunk=16, sink=4), scaling=0.3)
for found, wanted in zip(first, expected):
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3, check_dtype=False)
"""

COPIES = """
import torch
from lemo.ops.attend_local.kernel import sum_copies
from lemo.testing import poisoned_allocations

draw = torch.Generator().manual_seed(0)
for width, dtype in ((48, torch.float16), (2100, torch.float32)):  # no power of two; more than one program takes
    table = torch.randn(30, width, generator=draw).to(dtype)
    counts = torch.tensor([2, 0, 1, 20, 0, 3, 4, 0])
    order, first = torch.randperm(30, generator=draw), torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    with poisoned_allocations():
        found = sum_copies(table, order, first)
    exact = torch.stack([part.double().sum(0) for part in table[order].split(counts.tolist())])
    assert found.dtype == dtype and not found[[1, 4, 7]].any()
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-5 if dtype == torch.float32 else 4e-3)
assert sum_copies(table, order[:0], first[:1]).shape == (0, 2100)
"""

OPS = [
    "attend_local",
    "attend_rows",
    "block_score",
    "dropout_rows",
    "gated_act",
    "linear_ce",
    "norm_rows",
    "pool_blocks",
    "rope_rows",
    "score_blocks",
    "select_rows",
    "stream_rows",
]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("op", OPS)
def test_kernels_meet_their_reference(op):
    result = json.loads(_interpreted(PROGRAM, op))
    assert result["cases"] >= 10
    assert not result["failed"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_local_attention_goes_on_from_a_vendors_start():
    """With a stand-in for the vendor's kernel; what memory held before makes no difference to any bit."""
    _interpreted(STARTED)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_copies_gradients_are_summed_by_key():
    _interpreted(COPIES)


def _interpreted(*program: str) -> str:
    """What a program prints in the interpreter."""
    source = Path(__file__).resolve().parents[2] / "src"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(source)}
    command = [sys.executable, "-c", *program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
