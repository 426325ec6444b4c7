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
    source = Path(__file__).resolve().parents[2] / "src"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(source)}
    command = [sys.executable, "-c", PROGRAM, op]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert result["cases"] >= 10
    assert not result["failed"]
