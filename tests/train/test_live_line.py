"""The live line says where training stands, and the clock of training stands still during evaluation."""

from __future__ import annotations

import io
import json
import time

import pytest
from rich.console import Console

from lemo.train.collate import WindowCollator
from lemo.train.trainer import LemoTrainer
from tests.train.test_trainer import arguments, dataset, seeded_model


class SlowEvaluation(WindowCollator):
    """Waits before each validation batch."""

    def __call__(self, features):
        if features[0]["sample_id"].startswith("9-"):
            time.sleep(0.5)
        return super().__call__(features)


def test_evaluation_takes_no_training_time(tmp_path):
    begun = time.perf_counter()
    trainer = LemoTrainer(
        model=seeded_model(),
        args=arguments(tmp_path / "out", max_steps=4, eval_strategy="steps", eval_steps=1),
        train_dataset=dataset(4),
        eval_dataset=dataset(1, seed=9),
        data_collator=SlowEvaluation(),
        metrics_path=tmp_path / "metrics.jsonl",
        console=Console(file=io.StringIO()),
    )
    trainer.train()
    whole = time.perf_counter() - begun
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    evaluating = sum(entry.get("eval_runtime", 0) for entry in entries)
    assert evaluating >= 4 * 0.5
    assert trainer.log_callback.seconds <= whole - evaluating
    # Training time adds up to that of the entries, in which tokens are counted.
    steps = [entry for entry in entries if "loss" in entry]
    assert sum(64 / entry["tokens_per_s"] for entry in steps) == pytest.approx(steps[-1]["seconds"], rel=0.05)


def test_the_live_line_has_loss_speed_memory_and_time_left(tmp_path):
    text = io.StringIO()
    LemoTrainer(
        model=seeded_model(),
        args=arguments(tmp_path / "out", max_steps=3),
        train_dataset=dataset(3),
        data_collator=WindowCollator(),
        console=Console(file=text, force_terminal=True, width=300),
    ).train()
    live = [line for line in text.getvalue().splitlines() if "left" in line]
    assert live and all(part in live[-1] for part in ("step ", "/3", "loss ", "lr ", "tokens/s", "peak", ":"))
