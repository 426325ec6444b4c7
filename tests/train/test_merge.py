"""Merged models compute what the adapter model computes, load in plain Transformers, and are refused otherwise."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lemo.cli.main import app
from lemo.config import LoraConfig, ModelConfig
from lemo.errors import ConfigError, MergeError
from lemo.train import merge as merging
from lemo.train.lora import add_adapter, save_adapter
from lemo.train.merge import merge_adapter
from lemo.train.model import load_model
from tests.train.tiny import save_tiny_model, words


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
        assert found["merged"] < found["effect"]
        assert found["unrounded"] <= found["adapter"]
        assert 0 < found["weights"] <= found["adapter"] + found["rounding"]
    assert report.base_dtype == "float32"
    typical = report.errors[merging.TYPICAL]
    assert typical["merged"] <= typical["budget"] < typical["effect"]
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


@pytest.mark.parametrize("saved", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
@pytest.mark.parametrize("tied", [True, False])
def test_ends_that_are_trained_whole(tmp_path, tied, saved):
    """Each of the two, and both, whether or not they share their weight in the base model."""
    lora = LoraConfig(rank=2, targets=("q_proj",), modules_to_save=saved)
    config = make_adapter(tmp_path, lora=lora, tie_word_embeddings=tied)
    report = merge_adapter(config, tmp_path / "adapter", tmp_path / "merged")
    assert sum("two weights" in note for note in report.notes) == tied
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        trained = {name.split(".")[-2]: file.get_tensor(name) for name in file.keys() if "lora_" not in name}  # noqa: SIM118
    assert trained.keys() == set(saved)
    for name, weight in trained.items():
        assert torch.equal(merged.get_parameter({"lm_head": "lm_head"}.get(name, f"model.{name}") + ".weight"), weight)


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


@pytest.mark.parametrize("size", [0.05, 0.2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_scaled_wrongly_is_refused(tmp_path, monkeypatch, dtype, size):
    """By a tenth; also an adapter that is so large that it counts for more than the weights below it."""
    config = make_adapter(tmp_path, size, {"dtype": dtype}, LoraConfig(rank=4, alpha=32))
    real = merging.merge_layers

    def scaled(model):
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.scaling["default"] *= 1.1
        return real(model)

    monkeypatch.setattr(merging, "merge_layers", scaled)
    with pytest.raises(MergeError, match="before its weights are rounded, does not compute what the adapter model"):
        merge_adapter(config, tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize(("seed", "size"), [(3, 0.05), (1, 0.5), (2, 0.5)])
def test_a_large_adapter_is_merged(tmp_path, seed, size):
    """Its weights' rounding moves some logit by more than the adapter model errs, and has a budget of its own."""
    torch.manual_seed(seed)
    config = make_adapter(tmp_path, size, {"dtype": "bfloat16"}, LoraConfig(rank=4, alpha=32))
    report = merge_adapter(config, tmp_path / "adapter", tmp_path / "merged")
    largest = report.errors["largest"]
    assert largest["adapter"] < largest["weights"] <= largest["adapter"] + largest["rounding"]
    assert largest["unrounded"] < 1e-3 * largest["adapter"]


def test_one_row_that_errs_more_in_another_order_of_sums_is_no_reason():
    """What the dtype itself does to a row is a draw: the largest of many has no budget, what is typical has one."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(200, 50, generator=generator, dtype=torch.float64)
    noise = 1e-6 * torch.randn(200, 50, generator=generator, dtype=torch.float64)
    names = ("exact", "unrounded", "rounded", "weights")
    logits = {name: [exact] for name in names} | {"plain": [0.5 * exact], "working": [(exact + noise).float()]}
    merged = exact + noise.flip(0)
    merged[7] += 5e-6
    errors = merging._compare(logits | {"merged": [merged.float()]})
    assert errors["largest"]["merged"] > 1.5 * errors["largest"]["adapter"]
    with pytest.raises(MergeError, match="the merged model does not compute"):
        merging._compare(logits | {"merged": [(exact + 4 * noise).float()]})


def test_weights_that_are_not_those_in_memory_are_refused(tmp_path, monkeypatch):
    """The rounding that is allowed for is that of the right weights, not of what happened to be written."""
    config = make_adapter(tmp_path, model={"dtype": "bfloat16"})
    share = merging.share_files

    def damage(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.1.mlp.down_proj.weight"] *= 1.2
        save_file(tensors, path, {"format": "pt"})
        share(folder)

    monkeypatch.setattr(merging, "share_files", damage)
    with pytest.raises(MergeError, match="that was written, computed in a wider dtype, does not compute"):
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
    assert "budget" in done.stdout and "tokens drawn at random)" in done.stdout
    assert "written in" not in done.stdout
    stages = [line.partition(" ")[0] for line in done.stderr.splitlines()]
    assert stages == ["loading", "computing", "merging", "writing", "reading"]
    for arguments, text in (
        ((tmp_path / "adapter", "--out", tmp_path / "merged"), "exists already"),
        ((tmp_path / "model", "--out", tmp_path / "x"), "is no adapter"),
        ((tmp_path / "adapter", "--out", tmp_path / "x", "--base", tmp_path / "absent"), "cannot be read"),
        ((tmp_path / "adapter", "--out", tmp_path / "x", "--dtype", "int8"), "float32, bfloat16, float16"),
    ):
        refused = lemo(*arguments)
        assert refused.exit_code == 2 and text in refused.stderr.splitlines()[-1]
    assert not (tmp_path / "x").exists()


def test_an_adapter_for_another_model_is_refused(tmp_path):
    make_adapter(tmp_path)
    save_tiny_model(tmp_path / "wide", hidden_size=48)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        merge_adapter(ModelConfig(str(tmp_path / "wide"), dtype="float32"), tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_that_is_asked_for(tmp_path, dtype):
    """The weights have it, and the command says so where it is not the base model's."""
    make_adapter(tmp_path)
    done = lemo(tmp_path / "adapter", "--out", tmp_path / "merged", "--dtype", dtype)
    assert done.exit_code == 0, done.output
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {getattr(torch, dtype)}  # noqa: SIM118
    said = f"written in {dtype}, as asked for; the base model is in float32"
    assert (said in done.stdout.splitlines()) == (dtype != "float32")


def test_a_run_in_another_dtype_whose_data_is_gone(tmp_path):
    """Both are said: what the model is written in, and why the comparison is on random tokens, with the path."""
    config = make_adapter(tmp_path)
    data = tmp_path / "validation.txt"
    recipe = {"model": {"path": config.path, "dtype": "bfloat16"}, "output": str(tmp_path)}
    recipe["data"] = {"train": [str(data)], "validation": [str(data)], "window_tokens": 128}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = lemo(tmp_path, "--out", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    assert "written in bfloat16, the run's dtype; the base model is in float32" in done.stdout.splitlines()
    reason = f"tokens drawn at random, since the run's validation data cannot be read: {data}: no such file or folder"
    assert reason in done.stdout
    data.write_text(words(200))
    done = lemo(tmp_path, "--out", tmp_path / "second")
    assert done.exit_code == 0 and "(validation text)" in done.stdout
