"""Measures peak memory and time of steps on a GPU, and holds the estimates made from configuration files against them.

    python -m benchmarks.estimate --work runs/estimate.jsonl --budget-seconds 480     measures what the file lacks
    python -m benchmarks.estimate --work runs/estimate.jsonl --fit                    constants from half of the points
    python -m benchmarks.estimate --work runs/estimate.jsonl --records                table and Record of the other half

Peaks are the most that torch's allocator held. `--records` refuses unless the constants in
`lemo.measure.step_memory.MemoryConstants` are those that `--fit` finds, so they have seen no held-out point.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.estimate_points import BYPASS_RANK, RANK, Point, grid, held_out, targets_of
from lemo.errors import LemoError
from lemo.measure.attention_memory import Workspace
from lemo.measure.card import CARDS
from lemo.measure.memory import GIB, track_peak
from lemo.measure.profile import StepTimer
from lemo.measure.record import Record, commit, device_name
from lemo.measure.step_memory import CONSTANTS, MemoryConstants, step_memory
from lemo.measure.step_time import step_time

MIB = 2**20
CLOSE = 0.10
BUILD_S = 6.0  # to make a model of random weights
FINAL = ("ok", "out of memory", "unsupported")
LEAST_HELD_OUT, LEAST_LARGE = 20, 10
# Values that each constant may take.
CHOICES = {
    "fixed_bytes": [n * 16 * MIB for n in range(33)],
    "query": [0.25 * n for n in range(41)],
    "grouped": [0.25 * n for n in range(41)],
    "share": [0.0025 * n for n in range(25)],
}

Cell = dict[str, Any]


# ---- measuring


class Loaded:
    """One model on the device, for all points that share it."""

    def __init__(self, point: Point, device: str) -> None:
        from lemo.config import LoraConfig
        from lemo.train.lora import add_adapter
        from lemo.train.rehearsal import random_model

        self.config, self.device = point.config(), device
        model = random_model(self.config, dtype=torch.bfloat16, device=device)
        present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        targets = tuple(t for t in targets_of(point.lora) if t in present or t == "all-linear")
        self.model = add_adapter(model, LoraConfig(rank=RANK, alpha=16.0, targets=targets))
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def measure(self, point: Point) -> Cell:
        """Two steps; the second is measured."""
        from lemo.train.rehearsal import random_batch

        vocabulary = self.config.get_text_config().vocab_size
        draw = {"share": point.loss_share, "span": point.span, "local_share": point.local_share}
        batch = random_batch(vocabulary, point.tokens, seed=0, **draw)
        batch = {name: x.to(self.device) for name, x in batch.items()}
        optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=self.device.startswith("cuda"))
        timer, peaks, losses = StepTimer(self.device), [], []
        with self._under(point):
            for _ in range(2):
                with track_peak(self.device) as peak, timer.step():
                    loss = self.model(**batch).loss
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                losses.append(float(loss.detach()))
                del loss
                peaks.append(peak)
        last = peaks[-1]
        return {"peak_bytes": last.peak_bytes, "start_bytes": last.start_bytes, "seconds": timer.seconds[-1],
                "first_seconds": timer.seconds[0], "source": last.source, "losses": losses}  # fmt: skip

    def _under(self, point: Point) -> Any:
        """The plan of a point, attached."""
        from contextlib import nullcontext

        from lemo import attach
        from lemo.train.rehearsal import random_plan

        self._checkpoint(point.engine != "fused" and point.recompute == "layer")
        if point.engine == "plain":
            return nullcontext()
        plan = random_plan(
            self.config,
            forward_ratio=point.forward_ratio,
            backward_ratio=point.keep,
            kv=point.kv,
            dense_layers=point.dense_layers,
            bypass_rank=BYPASS_RANK,
            gradient=point.gradient,
            scorer=point.scorer,
            context_window=point.context_window,
        )
        fused = {"recompute": point.recompute, "offload": bool(point.offload)}
        how = fused if point.engine == "fused" else {}
        return attach(self.model, plan, engine=point.engine, self_test=False, **how)  # type: ignore[arg-type]

    def _checkpoint(self, on: bool) -> None:
        if on:
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            return
        self.model.gradient_checkpointing_disable()
        base = self.model.get_base_model()
        if hasattr(base, "_require_grads_hook"):
            base.disable_input_require_grads()


def _same_model(point: Point) -> tuple:
    # Learned positions are part of the model's size.
    return point.shape, point.layers, point.lora, point.tokens if point.shape == "opt-1.3b" else 0


def measure(points: Sequence[Point], work: Path, budget_s: float, device: str) -> bool:
    """Measures what the work file lacks, as far as the budget goes. Returns whether all is done."""
    begin, cells = time.monotonic(), read_cells(work)
    open_points = [p for p in points if cells.get(p.key, {}).get("status") not in FINAL]
    work.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(open_points, key=lambda p: str(_same_model(p)))
    for _, group in itertools.groupby(ordered, key=_same_model):
        loaded = None
        for point in sorted(group, key=lambda p: -p.tokens):
            left = budget_s - (time.monotonic() - begin)
            if point.estimated_seconds() > left:
                print(f"stopped: {point.key} needs about {point.estimated_seconds():.0f} s, {left:.0f} s are left")
                return False
            started = time.monotonic()
            try:
                loaded = loaded or Loaded(point, device)
                cell = {"status": "ok", **loaded.measure(point)}
            except torch.OutOfMemoryError as error:
                cell = {"status": "out of memory", "reason": str(error).splitlines()[0]}
            except LemoError as error:
                cell = {"status": "unsupported", "reason": str(error)}
            cell |= {"key": point.key, "device": device_name(), "commit": commit(), "torch": torch.__version__}
            cell["total_s"] = time.monotonic() - started
            with work.open("a") as file:
                file.write(json.dumps(cell) + "\n")
            print(_line(point, cell), flush=True)
            _tidy()
        del loaded
        _tidy()
    return True


def _tidy() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def read_cells(work: Path) -> dict[str, Cell]:
    """The last line of each point."""
    if not work.exists():
        return {}
    return {cell["key"]: cell for cell in map(json.loads, work.read_text().splitlines())}


# ---- comparing


def predicted_bytes(point: Point, constants: MemoryConstants) -> float:
    """Peak by the estimate."""
    return step_memory(point.sizes(), point.setting(), constants).peak_bytes


def error_of(point: Point, cell: Cell, constants: MemoryConstants) -> float:
    """Estimated over measured peak, less one."""
    return predicted_bytes(point, constants) / cell["peak_bytes"] - 1


def _line(point: Point, cell: Cell, constants: MemoryConstants = CONSTANTS) -> str:
    if cell["status"] != "ok":
        return f"{cell['status']}: {point.key}: {cell.get('reason', '')}"
    spent = step_time(point.sizes(), point.setting(), CARDS["h200"]).total_s
    return (
        f"{predicted_bytes(point, constants) / GIB:7.2f} for {cell['peak_bytes'] / GIB:7.2f} GiB "
        f"({100 * error_of(point, cell, constants):+5.1f} %)  {spent:6.2f} for {cell['seconds']:6.2f} s  {point.key}"
    )


def fit(measured: Sequence[tuple[Point, Cell]]) -> MemoryConstants:
    """Constants with the least sum of squared relative errors, one after the other until none changes."""

    def made(values: dict[str, float]) -> MemoryConstants:
        return replace(
            CONSTANTS,
            fixed_bytes=values["fixed_bytes"],
            share=values["share"],
            attention=Workspace(values["query"], values["grouped"]),
        )

    def loss(values: dict[str, float]) -> float:
        constants = made(values)
        return sum(error_of(point, cell, constants) ** 2 for point, cell in measured)

    values: dict[str, float] = {"fixed_bytes": 64 * MIB, "query": 4.0, "grouped": 4.0, "share": 0.0}
    for _ in range(4):
        before = dict(values)
        for name, choices in CHOICES.items():
            values[name] = _lowest(choices, lambda value, name=name: loss(values | {name: value}))
        if values == before:
            break
    return made(values)


def _lowest(choices: Sequence[float], loss: Any) -> float:
    """The choice with the least loss, which falls and then rises along them."""
    low, high = 0, len(choices) - 1
    while low < high:
        middle = (low + high) // 2
        if loss(choices[middle]) <= loss(choices[middle + 1]):
            high = middle
        else:
            low = middle + 1
    return choices[low]


def make_record(held: Sequence[tuple[Point, Cell]]) -> Record:
    """Share of held-out points within 10 %.

    Raises:
        LemoError: too few points.
    """
    large = sum(point.is_large for point, _ in held)
    if len(held) < LEAST_HELD_OUT or large < LEAST_LARGE:
        raise LemoError(
            f"{len(held)} held-out points, {large} of them large; {LEAST_HELD_OUT} and {LEAST_LARGE} needed"
        )
    errors = {point.key: error_of(point, cell, CONSTANTS) for point, cell in held}
    setting = {
        "statistic": "mean",
        "within": CLOSE,
        "errors": errors,
        "peaks_bytes": {point.key: cell["peak_bytes"] for point, cell in held},
        "seconds": {point.key: cell["seconds"] for point, cell in held},
        "large_points": large,
        "constants": asdict(CONSTANTS),
        "measured_at": sorted({cell["commit"] for _, cell in held}),
        "measured_on": sorted({cell["device"] for _, cell in held}),
    }
    samples = [float(abs(error) <= CLOSE) for error in errors.values()]
    name, script = "estimate/within_ten_percent", "benchmarks/estimate.py"
    record = Record.measure(name, "share", samples, setting, script=script, seeds=(0,), bar="E.estimate_share")
    # What was measured, was measured there; here it is only held against what is predicted.
    return replace(record, device=", ".join(setting["measured_on"]))


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default=Path("runs/estimate.jsonl"), help="one line a point")
    add("--out", type=Path, default=Path(__file__).parent / "results" / "estimate.jsonl")
    add("--budget-seconds", type=float, default=float("inf"), help="begins no point that would not fit")
    add("--device", default="cuda")
    add("--only", default="", help="points whose key holds this text")
    add("--list", action="store_true", help="print points and estimated seconds, run nothing")
    add("--fit", action="store_true", help="print the constants that the fitting half gives")
    add("--records", action="store_true", help="write the Record of the held-out half")
    return parser.parse_args(arguments)


def list_points(points: Sequence[Point], apart: frozenset[str]) -> None:
    """Prints what would run."""
    for point in points:
        mark, peak = "held out" if point.key in apart else "fit", predicted_bytes(point, CONSTANTS) / GIB
        print(f"{point.estimated_seconds():5.1f} s {peak:7.2f} GiB {mark:<9}{point.key}")
    models = len({_same_model(p) for p in points})
    total = sum(p.estimated_seconds() for p in points) + BUILD_S * models
    print(f"{len(points)} points of {models} models, about {total:.0f} s on an H200")


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    points, apart = grid(), held_out(grid())
    if options.list:
        list_points([p for p in points if options.only in p.key], apart)
        return 0
    if not options.fit and not options.records:
        done = measure(
            [p for p in points if options.only in p.key], options.work, options.budget_seconds, options.device
        )
        return 0 if done else 3
    cells = read_cells(options.work)
    measured = [(p, cells[p.key]) for p in points if cells.get(p.key, {}).get("status") == "ok"]
    fitted = fit([pair for pair in measured if pair[0].key not in apart])
    held = [pair for pair in measured if pair[0].key in apart]
    print(f"fitted: {fitted}")
    shown = CONSTANTS if options.records else fitted
    for point, cell in measured:
        print("held out" if point.key in apart else "fit     ", _line(point, cell, shown))
    if not options.records:
        return 0
    if fitted != CONSTANTS:
        print("error: MemoryConstants of lemo.measure.step_memory are not the fitted ones; put those in first")
        return 2
    record = make_record(held)
    record.append(options.out)
    print(f"{record.value:.2f} of {len(held)} held-out points within {CLOSE:.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
