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
import json, sys, torch
from lemo.ops.block_score.cases import SPEC
from lemo.testing import check_error_budget, poisoned_allocations

failed = {}
for case in SPEC.cases:
    for dtype in (torch.float32, torch.float16):
        exact = SPEC.reference(**case.inputs(0, torch.float64))
        working = SPEC.reference(**case.inputs(0, dtype))
        try:
            with poisoned_allocations():
                actual = SPEC.run(**case.inputs(0, dtype), backend="triton")
            check_error_budget(actual, working, exact, ulps=case.ulps)
        except Exception as error:
            failed[f"{case.name}, {dtype}"] = f"{type(error).__name__}: {error}"
json.dump({"cases": len(SPEC.cases), "failed": failed}, sys.stdout)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_block_score_kernel_meets_the_reference():
    source = Path(__file__).resolve().parents[2] / "src"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(source)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert result["cases"] >= 10
    assert not result["failed"]
