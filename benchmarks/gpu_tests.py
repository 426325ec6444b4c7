"""The share of kernels whose present text passed `make test-gpu`, from tests/gpu/passed_kernels.json, as a Record.

    python -m benchmarks.gpu_tests

The file is written by a GPU run in which every test passed; it holds the hash of each kernel.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lemo.measure.record import Record
from tests.gpu.kernel_hashes import PASSED, kernel_hashes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passed", type=Path, default=PASSED)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_tests.jsonl")
    options = parser.parse_args(arguments)
    passed, present = json.loads(options.passed.read_text(encoding="utf-8")), kernel_hashes()
    green = [float(passed["sha256"].get(path) == digest) for path, digest in present.items()]
    setting = {name: passed[name] for name in ("device", "torch", "triton", "tests")}
    setting |= {"kernels": len(present), "changed_since": [p for p, ok in zip(present, green, strict=True) if not ok]}
    record = Record.measure(
        "gpu_tests/green_kernels",
        "share",
        green,
        {**setting, "statistic": "mean"},
        script="benchmarks/gpu_tests.py",
        seeds=[0],
        bar="C.gpu_tests",
    ).append(options.out)
    print(f"{record.value:.2f} of {len(present)} kernels are those that passed on {passed['device']}", flush=True)
    return 0 if record.value == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
