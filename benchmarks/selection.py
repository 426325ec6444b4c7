"""Time that scoring and selecting the rows of one layer takes, by phase, and how many kernels it launches.

    python -m benchmarks.selection [--rows 8192 16384 65536 131072] [--width 4096] [--layers 30] [--out FILE]

Every sample is a batch of its own: `layers` layers select their rows one after another, nothing is read back. On a GPU
the profiler also adds up the time of the kernels of each phase and counts them.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lemo.core.layout import Layout
from lemo.core.policy import block_table, document_budgets, select
from lemo.core.predictor import PatternPredictor
from lemo.measure.record import Record
from lemo.ops import rank_blocks, score_blocks, select_rows

SCRIPT = "benchmarks/selection.py"
SEED = 0
CALLS_PROFILED = 10


@dataclass(frozen=True)
class Workload:
    """One layer's selection: its input, the batch's blocks, a predictor with random weights, and the share to keep."""

    x_NM: torch.Tensor
    layout: Layout
    predictor: PatternPredictor
    keep: float

    @classmethod
    def draw(cls, rows: int, options: argparse.Namespace) -> Workload:
        """Rows of one document, a share of its blocks supervised."""
        torch.manual_seed(SEED)
        device = torch.device(options.device)
        x_NM = torch.randn(rows, options.width, device=device).to(getattr(torch, options.dtype))
        blocks = -(-rows // options.block)
        supervised = (torch.rand(blocks) < options.supervised).repeat_interleave(options.block)[:rows]
        ids = torch.zeros(1, rows, dtype=torch.int64)
        layout = Layout.build(ids, supervised[None], block_size=options.block, device=device)
        return cls(x_NM, layout, PatternPredictor(options.width).to(device), options.keep)

    def fresh(self) -> Workload:
        """The same batch as if it had just come: nothing about it was worked out yet."""
        return replace(self, layout=replace(self.layout))

    def layer(self) -> Any:
        """What a layer does."""
        scores_K = self.predictor.scores(self.x_NM, self.layout)
        return select(self.layout, scores_K, forward_ratio=self.keep, backward_ratio=self.keep)

    def phases(self) -> dict[str, Callable[[], Any]]:
        """The layer's work in parts, each on the result of the one before."""
        predictor, layout = self.predictor, self.layout
        features_KE = predictor.raw_features(self.x_NM, layout)
        scores_K = predictor.scores(self.x_NM, layout)
        table, budget_D = block_table(layout), document_budgets(layout, self.keep)
        rank_K = rank_blocks(scores_K, table)
        nets = [
            [t for layer in net if isinstance(layer, torch.nn.Linear) for t in (layer.weight, layer.bias)]
            for net in (predictor.query_net, predictor.key_net)
        ]
        end_K = torch.full((len(scores_K),), len(scores_K), device=scores_K.device)
        standard = predictor.feature_mean, predictor.feature_scale
        return {
            "pool": partial(predictor.raw_features, self.x_NM, layout),
            "nets": partial(score_blocks, features_KE, standard, *nets, end_K),
            "rank": partial(rank_blocks, scores_K, table),
            "select": partial(select_rows, rank_K, budget_D, table),
        }


def measure(workload: Workload, layers: int, repeats: int) -> tuple[list[float], list[float]]:
    """Microseconds per layer of `repeats` batches: from first to last kernel, and of the host."""
    elapsed, host = [], []
    for turn in range(repeats + 2):
        batch = workload.fresh()
        took = _microseconds(lambda batch=batch: [batch.layer() for _ in range(layers)], workload.x_NM.device)
        if turn >= 2:  # the first ones compile
            elapsed.append(took[0] / layers)
            host.append(took[1] / layers)
    return elapsed, host


def _microseconds(function: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Of the device, and of the host until it had everything queued."""
    if device.type != "cuda":
        begin = time.perf_counter()
        function()
        return (1e6 * (time.perf_counter() - begin),) * 2
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    first.record()
    function()
    last.record()
    queued = 1e6 * (time.perf_counter() - begin)
    torch.cuda.synchronize()
    return 1e3 * first.elapsed_time(last), queued


def profile(workload: Workload) -> dict[str, dict[str, float]]:
    """Microseconds of the kernels of each phase and of the whole layer, and how many there are; empty on a CPU."""
    if workload.x_NM.device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity

    found = {}
    for name, function in {**workload.phases(), "layer": workload.layer}.items():
        function()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
            for _ in range(CALLS_PROFILED):
                function()
            torch.cuda.synchronize()
        kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        found[name] = {
            "us": sum(event.time_range.elapsed_us() for event in kernels) / CALLS_PROFILED,
            "launches": len(kernels) / CALLS_PROFILED,
        }
    return found


@contextlib.contextmanager
def refused_waiting(device: torch.device) -> Iterator[None]:
    """Any wait of the host for the device raises."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compare_tilings(workload: Workload) -> None:
    """Prints the time of each way to cut the pooling kernel's work; the first is the one in use."""
    if workload.x_NM.device.type != "cuda":
        return
    from lemo.ops.pool_blocks import kernel
    from lemo.ops.pool_blocks.reference import POOLS, Blocks

    layout, x_NM = workload.layout, workload.x_NM
    blocks = Blocks(layout.block_start_K.to(x_NM.device), layout.block_length_K.to(x_NM.device), layout.block_size)
    projection = workload.predictor.projection_MF.to(x_NM.dtype)
    for tiling in kernel.CANDIDATES:
        if kernel.fits(tiling, blocks.rows, x_NM.dtype):
            call = partial(kernel.launch, x_NM, projection, blocks, POOLS, None, 1e-6, tiling)
            took = [_microseconds(lambda call=call: [call() for _ in range(10)], x_NM.device)[0] / 10 for _ in range(4)]
            print(f"    pool {tiling}: {statistics.median(took[1:]):.1f} us")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 16384, 65536, 131072])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--keep", type=float, default=0.3)
    parser.add_argument("--supervised", type=float, default=0.2, help="share of the blocks")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tilings", action="store_true", help="also time every tiling of the pooling kernel")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results" / "selection.jsonl")
    options = parser.parse_args(arguments)
    for rows in options.rows:
        workload = Workload.draw(rows, options)
        workload.layer()
        with refused_waiting(workload.x_NM.device):
            workload.fresh().layer()
        elapsed, host = measure(workload, options.layers, options.repeats)
        phases = profile(workload)
        setting = {k: getattr(options, k) for k in ("width", "block", "keep", "supervised", "layers", "dtype")}
        setting |= {"rows": rows, "statistic": "median", "kernels": phases, "host_us": statistics.median(host)}
        Record.measure(f"selection/layer_us/{rows}", "us", elapsed, setting, script=SCRIPT, seeds=[SEED]).append(
            options.out
        )
        took = f"{rows:>7} rows: {statistics.median(elapsed):.1f} us a layer, host {statistics.median(host):.1f} us"
        parts = [f"{name} {part['us']:.1f} us in {part['launches']:g}" for name, part in phases.items()]
        print("; ".join([took, *parts]), flush=True)
        if options.tilings:
            compare_tilings(workload)
        del workload
    return 0


if __name__ == "__main__":
    sys.exit(main())
