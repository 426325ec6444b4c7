"""Keys of `lora`: what they make of an adapter, and that such adapters are trained, saved, loaded and merged."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lemo.cli.recipe import build_run
from lemo.config import DataConfig, LoraConfig, ModelConfig, RunConfig, SparsityConfig, TrainingConfig
from lemo.errors import ConfigError
from lemo.eval.perplexity import evaluate_loss
from lemo.train.lora import add_adapter, load_adapter, save_adapter
from lemo.train.merge import TYPICAL, merge_adapter
from lemo.train.model import load_model
from lemo.train.run import train
from tests.train.test_merge import make_adapter
from tests.train.tiny import tiny_llama

VARIANTS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "alpha": 8.0},
    "both": {"use_dora": True, "use_rslora": True, "alpha": 8.0},
    "gaussian": {"init_lora_weights": "gaussian"},
}
IDS = torch.arange(3, 35)[None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_saved_loads_and_merges(variant, dtype, tmp_path):
    """The same bits in lemo and in plain PEFT; the merged model within the budget that rounding explains."""
    import peft

    lora = LoraConfig(rank=4, **VARIANTS[variant])
    config = make_adapter(tmp_path, model={"dtype": dtype}, lora=lora)
    own = load_adapter(load_model(config, device="cpu"), tmp_path / "adapter").eval()
    plain = AutoModelForCausalLM.from_pretrained(config.path, dtype=getattr(torch, dtype))
    plain = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter"), autocast_adapter_dtype=False).eval()
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["use_dora"], settings["use_rslora"]) == (lora.use_dora, lora.use_rslora)
    with torch.no_grad():
        assert torch.equal(own(IDS).logits, plain(IDS).logits)
        with own.disable_adapter():
            assert not torch.allclose(own(IDS).logits, plain(IDS).logits, rtol=0.01)
    report = merge_adapter(config, tmp_path / "adapter", tmp_path / "merged", device="cpu")
    typical = report.errors[TYPICAL]
    assert typical["merged"] <= typical["budget"] < typical["effect"]


@pytest.mark.parametrize(
    ("lora", "scale", "spread"),
    [
        (LoraConfig(rank=16, alpha=8.0), 8 / 16, None),
        (LoraConfig(rank=16, alpha=8.0, use_rslora=True), 8 / 4, None),
        (LoraConfig(rank=16, alpha=8.0, init_lora_weights="gaussian"), 8 / 16, 1 / 16),
    ],
)
def test_new_adapters_change_nothing_and_have_the_scale_asked_for(lora, scale, spread):
    torch.manual_seed(0)
    model = tiny_llama(layers=1, hidden_size=256, intermediate_size=512)
    wanted = model(IDS).logits
    module = (wrapped := add_adapter(model, lora)).get_base_model().model.layers[0].mlp.up_proj
    assert torch.equal(wrapped(IDS).logits, wanted)
    assert module.scaling["default"] == pytest.approx(scale)
    # PEFT's own draw is uniform within 1/√inputs.
    expected = spread or (1 / 256 / 3) ** 0.5
    assert float(module.lora_A["default"].weight.detach().std()) == pytest.approx(expected, rel=0.1)


def recipe(base, output, **lora):
    return RunConfig(
        output=str(output),
        model=ModelConfig(path=str(base / "model"), dtype="bfloat16"),
        data=DataConfig(train=(str(base / "train.txt"),), window_tokens=128),
        sparsity=SparsityConfig(backward_ratio=0.5, block_size=16, context_window=32),
        lora=LoraConfig(rank=2, **lora),
        training=TrainingConfig(max_steps=2, learning_rate=1e-2),
    )


def test_a_run_trains_lengths_and_directions(base, tmp_path, screen):
    from safetensors.torch import load_file

    run = recipe(base, tmp_path / "run", use_dora=True, use_rslora=True)
    train(run, evaluate_loss, console=screen)
    trained = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    fresh = add_adapter(load_model(run.model, device="cpu"), run.lora)
    save_adapter(fresh, tmp_path / "fresh", run.model.path)
    before = load_file(tmp_path / "fresh" / "adapter_model.safetensors")
    assert trained.keys() == before.keys()
    moved = {name for name in before if not torch.equal(before[name], trained[name])}
    assert any("magnitude" in name for name in moved) and any("lora_B" in name for name in moved)
    assert {tensor.dtype for tensor in trained.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("training", {"engine": "fused"}, "lora.use_dora runs in the generic engine alone"),
        ("training", {"offload": True}, "training.offload moves what the fused engine saves"),
        ("lora", {"dropout": 0.1}, "lora.dropout is 0.1, but with lora.use_dora rows that run a second time"),
    ],
)
def test_what_dora_cannot_go_with_is_refused_when_the_recipe_is_read(section, changes, message):
    values = {"model": {"path": "m"}, "lora": {"use_dora": True}}
    values[section] = values.get(section, {}) | changes
    with pytest.raises(ConfigError, match=message):
        build_run(values)
    values["lora"]["use_dora"] = False
    assert build_run(values).lora.use_dora is False


def test_dropout_goes_with_dora_where_no_row_runs_twice(base, tmp_path, screen):
    run = recipe(base, tmp_path / "run", use_dora=True, dropout=0.1)
    dense = dataclasses.replace(run, sparsity=dataclasses.replace(run.sparsity, enabled=False, context_window=None))
    assert train(dense, evaluate_loss, console=screen).steps == 2


def test_maps_that_dora_does_not_know_are_named():
    """Experts that share one weight."""
    from tests.runtime.oracle import tiny_model

    with pytest.raises(ConfigError, match=r"lora\.use_dora: .*ParamWrapper"):
        add_adapter(tiny_model("mixtral"), LoraConfig(rank=2, use_dora=True))


@pytest.mark.parametrize("value", ["pissa", "olora", "loftq", "eva", "orthogonal", True])
def test_other_ways_to_begin_are_no_choice(value):
    with pytest.raises(ConfigError, match=r"lora\.init_lora_weights must be one of default, gaussian"):
        build_run({"model": {"path": "m"}, "lora": {"init_lora_weights": value}})
