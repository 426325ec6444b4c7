"""Extending a context with norms and embeddings trained beside LoRA; plain PEFT loads what was saved."""

from __future__ import annotations

import io
import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lemo.cli.recipe import load_recipe
from lemo.config import DataConfig, LoraConfig, ModelConfig, RunConfig, SparsityConfig, TrainingConfig
from lemo.eval.perplexity import evaluate_loss
from lemo.train.lora import load_adapter
from lemo.train.model import load_model
from lemo.train.run import train
from tests.train.tiny import save_tiny_model, words

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("context-extension-*.yaml"))


@pytest.mark.parametrize(("scaling", "engine"), [("linear", "fused"), ("yarn", "generic")])
def test_trained_norms_and_embeddings_load_in_plain_peft(tmp_path, scaling, engine):
    from rich.console import Console

    save_tiny_model(tmp_path / "model", layers=3, max_position_embeddings=128)
    (tmp_path / "train.txt").write_text(words(400, seed=1))
    run = RunConfig(
        output=str(tmp_path / "run"),
        model=ModelConfig(path=str(tmp_path / "model"), dtype="float32", context_length=256, rope_scaling=scaling),
        data=DataConfig(train=(str(tmp_path / "train.txt"),), window_tokens=256),
        sparsity=SparsityConfig(forward_ratio=1.0, backward_ratio=0.6, scorer="random", block_size=16),
        lora=LoraConfig(rank=2, modules_to_save=("norm", "embed_tokens")),
        training=TrainingConfig(max_steps=2, learning_rate=1e-2, engine=engine, save_steps=1),
    )
    result = train(run, evaluate_loss, console=Console(file=io.StringIO()))
    assert result.steps == 2

    settings = AutoConfig.from_pretrained(tmp_path / "model")
    settings.rope_parameters = {**settings.rope_parameters, "rope_type": scaling, "factor": 2.0}
    if scaling == "yarn":
        settings.rope_parameters["original_max_position_embeddings"] = 128
    settings.max_position_embeddings = 256
    changed = json.loads((tmp_path / "run" / "adapter" / "context.json").read_text())["config"]
    for step in (1, 2):  # checkpoints say it as well
        checkpoint = tmp_path / "run" / "checkpoints" / f"checkpoint-{step}"
        assert json.loads((checkpoint / "context.json").read_text())["config"] == changed
    assert changed == {"max_position_embeddings": 256, "rope_parameters": settings.rope_parameters}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", config=settings, dtype=torch.float32)
    original = {name: parameter.clone() for name, parameter in base.named_parameters()}
    plain = peft.PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter"))
    saved = {name: p for name, p in plain.named_parameters() if ".modules_to_save." in name}
    assert len(saved) == 2 * 3 + 2  # two norms a layer, the last norm, the embedding
    for name, parameter in saved.items():
        before = original[name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")]
        assert not torch.equal(parameter, before), name

    own = load_adapter(load_model(run.model, device="cpu"), tmp_path / "run" / "adapter")
    ids = torch.arange(3, 203)[None]
    assert torch.equal(plain.eval()(ids).logits, own.eval()(ids).logits)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_that_extend_a_context_are_valid(path):
    """Under both ways of scaling; windows are as long as the new context."""
    for scaling in ("linear", "yarn"):
        run = load_recipe(path, ["data.train=[book.txt]", f"model.rope_scaling={scaling}"])
        assert run.data.window_tokens == run.model.context_length and run.model.rope_scaling == scaling
