"""What each of two gloo processes runs for the tests of `lemo train`: whole runs from recipe to adapter."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch.distributed as dist

from lemo.config import (
    CalibrationConfig,
    DataConfig,
    LoraConfig,
    LossRowsConfig,
    ModelConfig,
    RunConfig,
    SparsityConfig,
    TrainingConfig,
)
from lemo.eval.perplexity import evaluate_loss
from lemo.train.callback import LemoCallback
from lemo.train.run import train
from tests.distributed.group import join_group
from tests.train.tiny import save_tiny_model, words

WORLD = 2


def prepare(folder: Path) -> None:
    """The model and the text of all runs."""
    save_tiny_model(folder / "model", layers=3)
    (folder / "train.txt").write_text(words(900, seed=1))
    (folder / "validation.txt").write_text(words(120, seed=2))


def recipe(folder: Path, name: str, **training) -> RunConfig:
    """A calibrated plan with predictors; three validation windows, so that the processes have unequal shares."""
    return RunConfig(
        output=str(folder / name),
        model=ModelConfig(path=str(folder / "model"), dtype="float32"),
        data=DataConfig(
            train=(str(folder / "train.txt"),),
            validation=(str(folder / "validation.txt"),),
            window_tokens=128,
            validation_windows=3,
        ),
        loss_rows=LossRowsConfig(share=0.3),
        sparsity=SparsityConfig(forward_ratio=0.7, backward_ratio=0.7, block_size=16),
        calibration=CalibrationConfig(
            windows=2, tune_windows=1, predictor_steps=5, predictor_width=8, predictor_rank=4, bypass_rank=4
        ),
        lora=LoraConfig(rank=2),
        training=TrainingConfig(max_steps=4, learning_rate=1e-2, eval_steps=2, warmup_steps=1, **training),
    )


def run(folder: Path, name: str, *, resume: bool = False, evaluate=evaluate_loss, **training) -> dict:
    """One run: its result, and what it printed."""
    from rich.console import Console

    screen = io.StringIO()
    result = train(recipe(folder, name, **training), evaluate, resume=resume, console=Console(file=screen, width=200))
    return {**result.to_dict(), "screen": screen.getvalue()}


def cut(folder: Path, rank: int) -> dict:
    """Only the second process gets the signal, in the second step."""
    after_step = LemoCallback.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 1 and rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return after_step(self, args, state, control, **kwargs)

    LemoCallback.on_step_end = interrupt
    try:
        return run(folder, "cut")
    finally:
        LemoCallback.on_step_end = after_step


def failing(folder: Path, rank: int) -> dict:
    """Only the second process fails, in the evaluation before training."""

    def evaluate(*args, **kwargs):
        if rank == 1:
            raise OSError("no room")
        return evaluate_loss(*args, **kwargs)

    return run(folder, "failing", evaluate=evaluate)


def scenarios(folder: Path, rank: int):
    """(name, function) in the same order on both processes."""
    yield "whole", lambda: run(folder, "whole")
    yield "cut", lambda: cut(folder, rank)
    yield "resumed", lambda: run(folder, "cut", resume=True)
    yield "failing", lambda: failing(folder, rank)
    yield "again", lambda: run(folder, "whole")
    yield "requeued", lambda: run(folder, "whole", resume="if possible")


def main(rank: int, folder: Path) -> None:
    """Runs all scenarios on one process."""
    join_group(rank, WORLD, folder, seconds=60)
    for name, scenario in scenarios(folder, rank):
        try:
            result = scenario()
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        (folder / f"{name}.{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def alone(folder: Path) -> dict:
    """One process that takes both processes' batches in turn."""
    return run(folder, "alone", gradient_accumulation_steps=WORLD)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
