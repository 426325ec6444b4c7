"""Mistakes of the training section are found before a model is loaded, and named by their key."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console
from transformers.utils import import_utils

from lemo.config import ModelConfig, RunConfig, TrainingConfig
from lemo.errors import ConfigError
from lemo.eval.perplexity import evaluate_loss
from lemo.train.arguments import training_arguments, try_arguments
from lemo.train.run import train
from tests.train.test_run import recipe


@pytest.fixture
def unloaded(monkeypatch):
    """A run that comes to load its model has missed the mistake."""
    from lemo.train import run

    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(run, "load_model", load)


@pytest.fixture
def missing(monkeypatch):
    """Makes a package as if it were not installed. Transformers remembers what it found, here and for later tests."""
    forget = getattr(import_utils.is_bitsandbytes_available, "cache_clear", lambda: None)

    def hide(package):
        monkeypatch.setitem(sys.modules, package, None)
        forget()

    yield hide
    forget()


@pytest.mark.parametrize(
    "package, training, parts",
    [
        ("wandb", {"report_to": ("wandb",)}, ("training.report_to: wandb cannot be used", "leave it out")),
        ("tensorboard", {"report_to": ("tensorboard",)}, ("training.report_to: tensorboard cannot be used",)),
        ("bitsandbytes", {"optimizer": "adamw_bnb_8bit"}, ("training.optimizer: adamw_bnb_8bit", "adamw_torch")),
        (None, {"optimizer": "galore_adamw"}, ("training.optimizer: galore_adamw cannot be used",)),
        (None, {"optimizer": "schedule_free_adamw"}, ("do not train with schedule_free_adamw", "adamw_torch")),
        (None, {"optimizer": "lomo"}, ("do not train with lomo",)),
        (None, {"lr_scheduler": "cosine_with_min_lr"}, ("training.lr_scheduler: cosine_with_min_lr", "linear")),
        (None, {"lr_scheduler": "warmup_stable_decay"}, ("training.lr_scheduler: warmup_stable_decay",)),
    ],
)
def test_what_the_trainer_could_not_make_is_refused_before_loading(
    base, tmp_path, unloaded, missing, package, training, parts
):
    if package is not None:
        missing(package)
    run = recipe(base, tmp_path / "run", training=training)
    with pytest.raises(ConfigError) as error:
        train(run, evaluate_loss, console=Console(file=io.StringIO()))
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_optimizers_that_work_are_let_pass(tmp_path, optimizer):
    for schedule in ("cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial"):
        run = RunConfig(
            model=ModelConfig(path="m"), training=TrainingConfig(optimizer=optimizer, lr_scheduler=schedule)
        )
        try_arguments(training_arguments(run, tmp_path / "checkpoints"), run)
    assert not (tmp_path / "checkpoints").exists()


def test_float16_is_refused(base, tmp_path, unloaded):
    with pytest.raises(ConfigError, match=r"model\.dtype is float16.*set bfloat16"):
        train(recipe(base, tmp_path / "run", model={"dtype": "float16"}), evaluate_loss)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("engine", ["generic", "auto"])
def test_dropout_that_the_generic_engine_cannot_repeat_is_refused_before_evaluation(base, tmp_path, engine):
    def evaluate(*args, **kwargs):
        raise AssertionError("evaluated before the check")

    run = recipe(base, tmp_path / "run", lora={"dropout": 0.1}, training={"engine": engine})
    with pytest.raises(ConfigError, match=r"lora\.dropout is 0\.1, but 3 layers run in the generic engine"):
        train(run, evaluate, console=Console(file=io.StringIO()))


@pytest.mark.parametrize("sections", [{"training": {"engine": "fused"}}, {"sparsity": {"enabled": False}}])
def test_dropout_is_let_pass_where_it_works(base, tmp_path, sections):
    run = recipe(base, tmp_path / "run", lora={"dropout": 0.1}, **sections)
    assert train(run, evaluate_loss, console=Console(file=io.StringIO())).steps == 4
