"""Base models in 4 bits: trained, resumed, read again, merged; refused where they cannot be."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from transformers import AutoConfig

from lemo.config import ModelConfig
from lemo.errors import ConfigError
from lemo.eval.perplexity import evaluate_loss
from lemo.measure.sizes import PACKED_BYTES, read_sizes
from lemo.train import four_bits
from lemo.train.lora import add_adapter, load_adapter
from lemo.train.merge import merge_adapter
from lemo.train.model import load_model
from lemo.train.run import train
from tests.train.test_resume import same_adapter, stopped
from tests.train.test_run import recipe

PACKED = {"load_in_4bit": True, "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def saved(base):
    """The tiny model, saved in 4 bits."""
    load_model(ModelConfig(str(base / "model"), **PACKED), device="cpu").save_pretrained(base / "packed")
    return ModelConfig(str(base / "packed"))


@pytest.mark.parametrize("engine", ["fused", "generic"])
def test_a_run_resumes_and_merges(base, tmp_path, screen, engine):
    """A resumed run ends with the whole one's adapter, which has the model's dtype and fits the whole weights."""
    changes = {"model": PACKED, "training": {"engine": engine, "save_steps": 2}}
    whole = recipe(base, tmp_path / "whole", **changes)
    result = train(whole, evaluate_loss, console=screen)
    assert result.losses["dense after"] < result.losses["dense before"]
    run = recipe(base, tmp_path / "run", **changes)
    stopped(run, 2, screen)
    train(run, evaluate_loss, resume=True, console=screen)
    assert same_adapter(tmp_path / "run", tmp_path / "whole")
    report = merge_adapter(run.model, tmp_path / "run" / "adapter", tmp_path / "merged", device="cpu")
    assert any("4 bits" in note for note in report.notes)
    plain = load_model(ModelConfig(str(tmp_path / "merged")), device="cpu")
    assert not four_bits.is_packed(plain) and plain.dtype == torch.bfloat16


def test_evaluation_leaves_numbers_in_order(base):
    """bitsandbytes stores them for inference on some CPUs, and would train without their gradient afterwards."""
    model = load_model(ModelConfig(str(base / "model"), **PACKED), device="cpu").eval()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        model(input_ids=torch.arange(32)[None])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(
        getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False) for p in model.parameters()
    )


def test_models_that_were_saved_in_4_bits(base, saved, tmp_path):
    """They load as they are, train with an adapter of the model's dtype, and are unpacked to be merged."""
    again = load_model(saved, device="cpu")
    first = load_model(ModelConfig(str(base / "model"), **PACKED), device="cpu")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, first(input_ids=ids).logits)
    model = add_adapter(again, recipe(base, tmp_path).lora)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(load_model(saved, device="cpu"), tmp_path / "adapter")
    assert {p.dtype for n, p in loaded.named_parameters() if "lora_" in n} == {torch.bfloat16}
    report = merge_adapter(saved, tmp_path / "adapter", tmp_path / "merged", device="cpu")
    assert any("unpacked" in note for note in report.notes)
    assert getattr(AutoConfig.from_pretrained(tmp_path / "merged"), "quantization_config", None) is None
    with pytest.raises(ConfigError, match=r"quantised already \(bitsandbytes\)"):
        load_model(dataclasses.replace(saved, load_in_4bit=True))


def test_packing_and_unpacking(base):
    """Packing a loaded model is what loading in 4 bits does, and unpacking gives the weights that are computed with."""
    loaded = load_model(ModelConfig(str(base / "model"), **PACKED), device="cpu")
    plain = load_model(ModelConfig(str(base / "model")), device="cpu")
    four_bits.pack_linear(plain)
    numbers = dict(plain.named_parameters())
    assert all(torch.equal(p, numbers[n]) for n, p in loaded.named_parameters())
    ids = torch.arange(40)[None]
    with torch.no_grad():
        wanted = loaded(input_ids=ids).logits
        four_bits.unpack_linear(loaded)
        assert not four_bits.is_packed(loaded)
        assert torch.allclose(loaded(input_ids=ids).logits, wanted, atol=0.05, rtol=0.05)


def test_refusals(base, monkeypatch):
    """A GGUF file is unpacked, and without bitsandbytes there is nothing to pack with."""
    with pytest.raises(ConfigError, match="GGUF"):
        four_bits.loading_options(ModelConfig("x", gguf_file="y.gguf", **PACKED), object(), "cpu")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ConfigError, match=r"pip install 'lemo\[bitsandbytes\]'"):
        load_model(ModelConfig(str(base / "model"), **PACKED))


def test_sizes_are_those_of_the_weights(base, saved):
    """Bytes of all weights, scales and their scales included; the largest map is unpacked to be used."""
    model = load_model(saved, device="cpu")
    settings = AutoConfig.from_pretrained(base / "model")
    assert four_bits.saved_in_4bit(AutoConfig.from_pretrained(saved.path)) and not four_bits.saved_in_4bit(settings)
    sizes = read_sizes(settings, load_in_4bit=True)
    linear = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert sizes.packed and sizes.linear == sum(m.in_features * m.out_features for m in linear)
    assert sizes.largest == max(m.in_features * m.out_features for m in linear)
    numbers = sum(m.weight.numel() for m in linear)
    scales = sum(m.weight.quant_state.absmax.numel() + 4 * m.weight.quant_state.state2.absmax.numel() for m in linear)
    others = sum(p.numel() * 2 for n, p in model.named_parameters() if getattr(p, "quant_state", None) is None)
    # Short rows of scales are filled up: one in fp32 a map here, where there is one for 16,384 numbers.
    unpacked = 2 * sizes.largest
    assert sizes.weight_bytes == pytest.approx(numbers + scales + others + unpacked, rel=0.02)
    assert PACKED_BYTES < 0.52
