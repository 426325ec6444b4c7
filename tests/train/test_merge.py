"""Merged models compute what the adapter model computes, load in plain Transformers, and are refused otherwise."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lemo.cli.main import app
from lemo.config import LoraConfig, ModelConfig
from lemo.errors import ConfigError, MergeError
from lemo.train import merge as merging
from lemo.train.lora import add_adapter, save_adapter
from lemo.train.merge import merge_adapter
from lemo.train.model import load_model
from tests.train.tiny import save_tiny_model


def make_adapter(folder, size=0.05, model=None, lora=None, **settings):
    """Folder with a base model and an adapter that matters; returns its ModelConfig."""
    save_tiny_model(folder / "model", layers=2, **settings)
    config = ModelConfig(str(folder / "model"), **{"dtype": "float32", **(model or {})})
    wrapped = add_adapter(load_model(config), lora or LoraConfig(rank=3))
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=size if "lora_" in name else 0.05)
    save_adapter(wrapped, folder / "adapter", config.path)
    return config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_model_is_the_adapter_model_in_plain_transformers(tmp_path, dtype):
    config = make_adapter(tmp_path, model={"dtype": dtype})
    report = merge_adapter(config, tmp_path / "adapter", tmp_path / "merged")
    for found in report.errors.values():
        assert found["merged"] <= found["budget"] < found["effect"]
        assert 0 < found["weights"] <= found["adapter"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == getattr(torch, dtype) and merged.config.use_cache
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = torch.arange(3, 35)[None]
    expected = adapted(ids).logits
    distance = (merged(ids).logits.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert distance < 16 * torch.finfo(getattr(torch, dtype)).eps
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    made = merged.generate(**tokenizer("abc", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert made.shape[1] == 8 or made[0, -1] == tokenizer.eos_token_id
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_names_are_those_of_the_base_model(tmp_path):
    config = make_adapter(tmp_path)
    merge_adapter(config, tmp_path / "adapter", tmp_path / "merged")
    names = []
    for folder in ("model", "merged"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            names.append(set(file.keys()))
    assert names[0] == names[1] and "model.layers.0.self_attn.q_proj.weight" in names[0]


def test_extended_context_stays_in_the_configuration(tmp_path):
    config = make_adapter(tmp_path, model={"context_length": 1024, "rope_scaling": "yarn"})
    merge_adapter(config, tmp_path / "adapter", tmp_path / "merged")
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert settings["max_position_embeddings"] == 1024
    assert settings["rope_parameters"]["rope_type"] == "yarn" and settings["rope_parameters"]["factor"] == 2.0


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(rank=2, targets=("q_proj", "lm_head")),
        LoraConfig(rank=2, targets=("q_proj",), modules_to_save=("embed_tokens", "norm")),
    ],
)
def test_tied_ends_that_the_adapter_changes_come_apart(tmp_path, lora):
    config = make_adapter(tmp_path, lora=lora, tie_word_embeddings=True)
    report = merge_adapter(config, tmp_path / "adapter", tmp_path / "merged")
    assert any("two weights" in note for note in report.notes)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


def test_tied_ends_that_the_adapter_leaves_alone_stay_tied(tmp_path):
    config = make_adapter(tmp_path, tie_word_embeddings=True)
    assert not merge_adapter(config, tmp_path / "adapter", tmp_path / "merged").notes
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_merge_is_refused_and_leaves_nothing(tmp_path, monkeypatch, dtype):
    """One weight matrix of fourteen a little too large is enough."""
    config = make_adapter(tmp_path, model={"dtype": dtype})
    real = merging.merge_layers

    def wrong(model):
        merged = real(model)
        merged.model.layers[1].mlp.down_proj.weight.data *= 1.001 if dtype == "float32" else 1.2
        return merged

    monkeypatch.setattr(merging, "merge_layers", wrong)
    with pytest.raises(MergeError, match="error of its logits"):
        merge_adapter(config, tmp_path / "adapter", tmp_path / "merged")
    assert {p.name for p in tmp_path.iterdir()} == {"model", "adapter"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_merged_in_part_is_refused(tmp_path, monkeypatch, dtype):
    config = make_adapter(tmp_path, model={"dtype": dtype})
    real = merging.merge_layers

    def partly(model):
        model.base_model.model.model.layers[1].self_attn.o_proj.lora_B["default"].weight.zero_()
        return real(model)

    monkeypatch.setattr(merging, "merge_layers", partly)
    with pytest.raises(MergeError, match="does not compute what the adapter model does"):
        merge_adapter(config, tmp_path / "adapter", tmp_path / "merged")


def test_an_adapter_smaller_than_rounding_is_said(tmp_path):
    config = make_adapter(tmp_path, model={"dtype": "bfloat16"}, size=1e-4)
    (note,) = merge_adapter(config, tmp_path / "adapter", tmp_path / "merged").notes
    assert "rounding to bfloat16 changes the logits about as much as the adapter" in note


def test_what_is_written_is_what_is_checked(tmp_path, monkeypatch):
    """A model that is right in memory and wrong on disk does not pass."""
    config = make_adapter(tmp_path, model={"context_length": 1024, "rope_scaling": "linear"})
    from transformers import LlamaForCausalLM

    save = LlamaForCausalLM.save_pretrained

    def forgets(self, folder, **kwargs):
        self.config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        save(self, folder, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", forgets)
    with pytest.raises(MergeError):
        merge_adapter(config, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def lemo(*arguments):
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def test_command_line_merges_an_adapter_and_names_mistakes(tmp_path):
    make_adapter(tmp_path)
    done = lemo(tmp_path / "adapter", "--out", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    assert "budget" in done.stdout and "drawn at random" in done.stdout
    for arguments, text in (
        ((tmp_path / "adapter", "--out", tmp_path / "merged"), "exists already"),
        ((tmp_path / "model", "--out", tmp_path / "x"), "is no adapter"),
        ((tmp_path / "adapter", "--out", tmp_path / "x", "--base", tmp_path / "absent"), "cannot be read"),
    ):
        refused = lemo(*arguments)
        assert refused.exit_code == 2 and text in refused.stderr.splitlines()[-1]
    assert not (tmp_path / "x").exists()


def test_an_adapter_for_another_model_is_refused(tmp_path):
    make_adapter(tmp_path)
    save_tiny_model(tmp_path / "wide", hidden_size=48)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        merge_adapter(ModelConfig(str(tmp_path / "wide"), dtype="float32"), tmp_path / "adapter", tmp_path / "merged")
