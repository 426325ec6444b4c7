"""How many decoder families obey every law, and how exact the gradients of exact forward are, as Records.

    python -m benchmarks.laws [--out FILE]

Runs the law tests themselves (tests/runtime) on tiny random models on the CPU: a family counts when all of its cases
pass. Gradients are compared in fp64 with autograd on a reference that has explicit stop-gradients.
"""

from __future__ import annotations

import argparse
import collections
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lemo.measure.record import Record
from tests.runtime.oracle import FAMILIES, tiny_model
from tests.runtime.test_exact import error, exact_plan

SCRIPT = "benchmarks/laws.py"
ROOT = Path(__file__).resolve().parent.parent
EXACT_FAMILIES = ("llama", "qwen3", "phi3", "opt", "gpt_neox", "granite")


class Outcomes:
    """Collects the cases of every family while pytest runs."""

    def __init__(self) -> None:
        self.passed: dict[str, int] = collections.Counter()
        self.failed: dict[str, list[str]] = collections.defaultdict(list)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """One phase of one test."""
        family = next((p for p in re.split(r"[\[\]-]", report.nodeid)[1:] if p in FAMILIES), None)
        if family is None:
            return
        if report.failed:
            self.failed[family].append(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed[family] += 1


def count_families(out: Path) -> None:
    """One sample per family: 1 where every law holds."""
    outcomes = Outcomes()
    tests = ROOT / "tests" / "runtime"
    pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", str(tests)], plugins=[outcomes])
    samples = [float(outcomes.passed[f] > 0 and not outcomes.failed[f]) for f in FAMILIES]
    setting = {"statistic": "sum", "families": FAMILIES, "cases": dict(outcomes.passed)}
    record = Record.measure("laws/families", "families", samples, setting, script=SCRIPT, bar="A.families")
    record.append(out)
    print(f"{record.value:.0f} of {len(FAMILIES)} families pass every law")


def measure_gradients(out: Path) -> None:
    """Relative error of loss and gradients, of each gradient mode and family."""
    real_float = torch.Tensor.float
    torch.Tensor.float = lambda x: x.double()  # norms of some families would round to fp32
    try:
        for gradient in ("rows", "pairs"):
            cases = [(f, r, kv) for f in EXACT_FAMILIES for r in (1.0, 0.75) for kv in ("kept", "all")]
            samples = []
            for family, ratio, kv in cases:
                model = tiny_model(family, dtype=torch.float64)
                samples.append(error(model, exact_plan(model, ratio, gradient, kv)))
            setting = {"statistic": "max", "gradient": gradient, "cases": [list(c) for c in cases], "dtype": "float64"}
            record = Record.measure(
                f"laws/exact_forward_grad/{gradient}",
                "relative error",
                samples,
                setting,
                script=SCRIPT,
                bar=f"A.exact_forward_grad/{gradient}",
            )
            record.append(out)
            print(f"{gradient}: largest relative error {record.value:.1e} over {len(samples)} cases")
    finally:
        torch.Tensor.float = real_float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "laws.jsonl")
    options = parser.parse_args(arguments)
    measure_gradients(options.out)
    count_families(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
