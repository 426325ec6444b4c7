"""What each of two gloo processes runs for the tests of `lemo train`: whole runs from recipe to adapter."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import traceback
from dataclasses import replace
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
    lengths = [2, 20, 3, 12, 2, 16, 4, 2]
    rows = [
        {"text": words(24 - n, seed=i), "qas": [{"question": "what", "answers": [words(n, seed=100 + i)]}]}
        for i, n in enumerate(lengths)
    ]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


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


def asked(folder: Path, name: str, **training) -> RunConfig:
    """Documents with questions, whose answers are of different lengths; rows of prompts carry loss as well."""
    made = recipe(folder, name, **training)
    return replace(
        made,
        data=DataConfig(train=(str(folder / "asked.jsonl"),), window_tokens=256, answer_only=True),
        loss_rows=LossRowsConfig(prompt_share=0.25, span=16),
        sparsity=SparsityConfig(backward_ratio=0.3, block_size=16, context_window=32),
        training=replace(made.training, eval_steps=None),
    )


def run(folder: Path, name: str, *, made=recipe, resume: bool = False, evaluate=evaluate_loss, **training) -> dict:
    """One run: its result, and what it printed."""
    from rich.console import Console

    screen = io.StringIO()
    result = train(made(folder, name, **training), evaluate, resume=resume, console=Console(file=screen, width=200))
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
    yield "asked", lambda: run(folder, "asked", made=asked)
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
    run(folder, "asked-alone", made=asked, gradient_accumulation_steps=WORLD)
    run(folder, "asked-batch", made=asked, batch_size=WORLD)
    return run(folder, "alone", gradient_accumulation_steps=WORLD)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
