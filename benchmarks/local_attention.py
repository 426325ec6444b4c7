"""Times attend_local beside attention of all rows to all keys; `benchmarks/ops.py` calls it."""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial

import torch

from benchmarks.timing import alternating
from lemo.errors import BackendError
from lemo.measure.record import Record
from lemo.ops import attend_forward, attend_local
from lemo.ops.attend_local.cases import flops, local_of, pairs
from lemo.testing import OpSpec, check_error_budget

SCRIPT = "benchmarks/ops.py"
SEED = 0


def benchmark_attend_local(spec: OpSpec, device: str, chosen: argparse.Namespace) -> bool:
    """Times both kernel paths on every shape; returns whether they agree with each other."""
    if device == "cpu":
        print("attend_local: its benchmark shapes need a CUDA device")
        return True
    good = True
    for case in spec.benchmark_shapes:
        inputs = case.inputs(SEED, torch.bfloat16, device)
        local = local_of(rest := dict(inputs))
        tensors = [rest[name] for name in ("query_HND", "key_GKD", "value_GKD")]
        run = partial(attend_local, *tensors, local, scaling=rest["scaling"])
        rows = local.queries
        functions = {"full": partial(attend_forward, *tensors, rows, rows, scaling=rest["scaling"])}
        functions |= {name: partial(run, backend=name) for name in ("triton", "vendor")}
        try:
            outputs = {name: functions[name]()[0] for name in ("triton", "vendor")}
            check_error_budget(outputs["vendor"], outputs["triton"], outputs["triton"].double(), ulps=8.0)
        except (AssertionError, BackendError) as error:
            print(f"{case.name} NOT TIMED: {error}", file=sys.stderr)
            good = False
            continue
        del outputs
        samples = alternating(functions, device, chosen.repeats)
        count = rows.lengths[0]
        ideal = pairs(inputs) / (count * (count + 1) / 2)
        middle = {name: statistics.median(ms) for name, ms in samples.items()}
        for name in ("triton", "vendor"):
            rate = flops(inputs) / middle[name] / 1e9
            print(
                f"{case.name:<52} {name:<7} {middle[name]:>8.3f} ms {rate:>6.1f} TFLOP/s   all keys "
                f"{middle['full']:>8.3f} ms   share {middle[name] / middle['full']:.3f}, ideal {ideal:.3f}"
            )
            setting = {"shape": case.name, "dtype": "bfloat16", "backend": name, "pair_share": ideal}
            setting |= {"statistic": "overhead_of_medians", "samples_unit": "ms", "tera_flops_per_s": rate}
            both = {"baseline": samples["full"], "lemo": samples[name]}
            record = f"ops/attend_local/{name}_time_over_all_keys/{case.name}"
            Record.measure(record, "ratio", both, setting, script=SCRIPT, seeds=(SEED,)).append(
                chosen.out / "ops.jsonl"
            )
        torch.cuda.empty_cache()
    return good
