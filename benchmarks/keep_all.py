"""What lemo costs when it skips nothing: a step of SmolLM2-135M with a keep-all plan attached, over the plain step.

    python -m benchmarks.keep_all --model FOLDER --data FOLDER [--window 16384] [--rounds 20] [--out FILE]

The two take turns in one process on the same model, batch and optimizer: once with the model's own loss in both, once
with lemo's segmented loss against the model's own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import lemo
from benchmarks.study import Study, add_options, make_optimizer, step_function
from lemo.core.plan import Plan
from lemo.measure.profile import StepTimer
from lemo.measure.record import Record

SCRIPT = "benchmarks/keep_all.py"


def measure(study: Study, loss: str, rounds: int) -> dict[str, list[float]]:
    """Seconds per step, plain (`baseline`) and attached (`lemo`), in turns; who goes first changes every round."""
    model = study.adapted_model(0)
    step = step_function(model, make_optimizer(model, study.options)[0])
    batch = study.batch(study.order(0)[: study.options.batch], loss_rows=True)
    plan = Plan.uniform(model, forward_ratio=1.0, backward_ratio=1.0)
    timers = {"baseline": StepTimer(study.device), "lemo": StepTimer(study.device)}
    model.train()

    def run(name: str, timed: bool) -> None:
        timer = timers[name] if timed else StepTimer(study.device)
        if name == "baseline":
            with timer.step():
                step(batch)
            return
        with lemo.attach(model, plan, loss=loss, self_test=False), timer.step():
            step(batch)

    for turn in range(-2, rounds):
        for name in sorted(timers, reverse=turn % 2 == 0):
            run(name, timed=turn >= 0)
    return {name: timer.seconds for name, timer in timers.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "keep_all.jsonl")
    parser.add_argument("--rounds", type=int, default=20)
    add_options(parser)
    options = parser.parse_args(arguments)
    study = Study(options)
    for loss in ("model", "segmented"):
        samples = measure(study, loss, options.rounds)
        record = Record.measure(
            f"keep_all/{loss}_loss",
            "ratio",
            samples,
            {**study.setting, "loss": loss, "rounds": options.rounds, "statistic": "overhead_of_medians"},
            script=SCRIPT,
            seeds=[0],
            bar=f"A.keep_all_time/{loss}-loss",
        ).append(options.out)
        print(f"{record.name}: {record.value:.4f} of the plain step's time", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
