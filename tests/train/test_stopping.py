"""Early stopping ends a run whose validation loss rises, and keeps the adapter of the lowest."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lemo.config import DataConfig, LoraConfig, ModelConfig, RunConfig, SparsityConfig, TrainingConfig
from lemo.errors import ConfigError
from lemo.eval.perplexity import evaluate_loss
from lemo.train.checks import check_run
from lemo.train.run import train
from tests.train.tiny import save_tiny_model, words


def recipe(folder, **training):
    return RunConfig(
        output=str(folder / "run"),
        model=ModelConfig(path=str(folder / "model"), dtype="float32"),
        data=DataConfig(train=(str(folder / "text.txt"),), held_out_share=0.2, window_tokens=64, validation_windows=2),
        sparsity=SparsityConfig(enabled=False),
        lora=LoraConfig(rank=2),
        training=TrainingConfig(**training),
    )


def test_a_run_that_gets_worse_stops_and_keeps_its_best(tmp_path):
    save_tiny_model(tmp_path / "model", layers=2)
    (tmp_path / "text.txt").write_text(words(200))
    run = recipe(
        tmp_path, max_steps=8, eval_steps=1, early_stopping_evals=2, learning_rate=0.5, lr_scheduler="constant"
    )
    result = train(run, evaluate_loss, console=Console(quiet=True))
    assert 2 < result.steps < 8
    checkpoints = {int(p.name.rpartition("-")[2]): p for p in (tmp_path / "run" / "checkpoints").iterdir()}
    best = load_file(checkpoints[result.steps - 2] / "adapter_model.safetensors")
    kept = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    last = load_file(checkpoints[result.steps] / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], best[name]) for name in best)
    assert any(not torch.equal(kept[name], last[name]) for name in last)


def test_stopping_needs_evaluations(tmp_path):
    for run, key in (
        (recipe(tmp_path, early_stopping_evals=2), r"early_stopping_evals needs validation data and training\.eval"),
        (recipe(tmp_path, early_stopping_evals=2, eval_steps=2, save_steps=3), r"set training\.save_steps to null"),
        (recipe(tmp_path, early_stopping_evals=0, eval_steps=2), r"early_stopping_evals must be positive"),
    ):
        with pytest.raises(ConfigError, match=key):
            check_run(run)
    run = recipe(tmp_path)
    both = dataclasses.replace(run, data=dataclasses.replace(run.data, validation=("v.txt",)))
    with pytest.raises(ConfigError, match=r"held_out_share has no effect beside data\.validation"):
        check_run(both)
