"""Times attend_local, both passes, beside attention of the same rows to all keys; `benchmarks/ops.py` calls it."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import alternating
from lemo.errors import BackendError
from lemo.measure.record import Record
from lemo.ops import attend_backward, attend_forward, attend_local, attend_local_backward, plan_rows
from lemo.ops.attend_local.cases import local_of, operands_of, pairs
from lemo.ops.attend_rows.cases import pairs as all_pairs
from lemo.testing import Inputs, OpSpec, check_error_budget

SCRIPT = "benchmarks/ops.py"
SEED = 0
PATHS = ("triton", "vendor")
Functions = dict[str, Callable[[], tuple[Tensor, ...]]]


def benchmark_attend_local(spec: OpSpec, device: str, chosen: argparse.Namespace) -> bool:
    """Times both kernel paths on every shape; returns whether they agree with each other."""
    if device == "cpu":
        print(f"{spec.name}: its benchmark shapes need a CUDA device")
        return True
    prepare = _forward if spec.name == "attend_local" else _backward
    good = True
    for case in spec.benchmark_shapes:
        inputs = case.inputs(SEED, torch.bfloat16, device)
        functions, ideal = prepare(dict(inputs))
        try:
            _agree(*(functions[name]() for name in PATHS))
        except (AssertionError, BackendError) as error:
            print(f"{case.name} NOT TIMED: {error}", file=sys.stderr)
            good = False
            continue
        samples = alternating(functions, device, chosen.repeats)
        _report(spec, case.name, spec.flops(inputs), ideal, samples, chosen.out / "ops.jsonl")
        torch.cuda.empty_cache()
    return good


def _forward(inputs: Inputs) -> tuple[Functions, float]:
    """Both paths and attention to all keys; and the share of all pairs that rows see."""
    ideal = pairs(inputs) / all_pairs(inputs)
    local = local_of(inputs)
    tensors = [inputs[name] for name in ("query_HND", "key_GKD", "value_GKD")]
    options: dict[str, Any] = {"scaling": inputs["scaling"]}
    functions: Functions = {"full": partial(attend_forward, *tensors, local.queries, local.queries, **options)}
    return functions | {n: partial(attend_local, *tensors, local, **options, backend=n) for n in PATHS}, ideal


def _backward(inputs: Inputs) -> tuple[Functions, float]:
    """As `_forward`. Output and log-sum-exp are the local ones everywhere: that changes no time."""
    ideal = pairs(inputs) / all_pairs(inputs)
    operands, local = operands_of(inputs)
    options: dict[str, Any] = {"scaling": inputs["scaling"]}
    planned = plan_rows(local.queries, local.keys)
    functions: Functions = {"full": partial(attend_backward, *operands, planned, local.keys, **options)}
    return functions | {n: partial(attend_local_backward, *operands, local, **options, backend=n) for n in PATHS}, ideal


def _agree(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    """Raises AssertionError when the 16-bit results of two paths differ by more than rounding."""
    pairs_of = zip(first, second, strict=True)
    for at, (one, other) in enumerate((a, b) for a, b in pairs_of if a.dtype.itemsize == 2):
        check_error_budget(other, one, one.double(), ulps=8.0, what=f"output {at}")


def _report(spec: OpSpec, case: str, flops: int, ideal: float, samples: dict[str, list[float]], out: Path) -> None:
    middle = {name: statistics.median(ms) for name, ms in samples.items()}
    for name in PATHS:
        rate = flops / middle[name] / 1e9
        print(
            f"{spec.name} {case:<52} {name:<7} {middle[name]:>8.3f} ms {rate:>6.1f} TFLOP/s   all keys "
            f"{middle['full']:>8.3f} ms   share {middle[name] / middle['full']:.3f}, ideal {ideal:.3f}"
        )
        setting = {"shape": case, "dtype": "bfloat16", "backend": name, "pair_share": ideal}
        setting |= {"statistic": "overhead_of_medians", "samples_unit": "ms", "tera_flops_per_s": rate}
        both = {"baseline": samples["full"], "lemo": samples[name]}
        record = f"ops/{spec.name}/{name}_time_over_all_keys/{case}"
        Record.measure(record, "ratio", both, setting, script=SCRIPT, seeds=(SEED,)).append(out)
