"""Sizes from configurations alone are those of the model that is built."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from lemo.config import DataConfig, LoraConfig, ModelConfig, RunConfig
from lemo.families import all_families
from lemo.measure.sizes import read_sizes
from lemo.train.forecast import forecast
from lemo.train.lora import add_adapter, trainable_parameters


@pytest.mark.parametrize("family", sorted(all_families()))
def test_parameters_of_model_and_adapter(family):
    """Counted on the meta device; PEFT's own count on the real model. Some map of every layer has an adapter."""
    config = all_families()[family].tiny_config()
    model = AutoModelForCausalLM.from_config(config)
    found = read_sizes(config, rank=4, dtype=torch.float32)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    if found.experts is None:
        assert found.adapter.parameters == trainable_parameters(add_adapter(model, LoraConfig(rank=4)))
    assert found.adapter.output == 4 and all(rank == 4 for rank in found.adapter.inputs)


def test_targets_and_modules_to_save():
    """An adapter on values alone, and norms that are trained whole."""
    config = all_families()["llama"].tiny_config()
    found = read_sizes(config, rank=4, targets=("v_proj",), modules_to_save=("norm",))
    assert found.adapter.inputs == (0, 0, 4) and found.adapter.output == found.adapter.down == 0
    settings = LoraConfig(rank=4, targets=("v_proj",), modules_to_save=("norm",))
    assert found.adapter.parameters == trainable_parameters(
        add_adapter(AutoModelForCausalLM.from_config(config), settings)
    )


def test_adapters_on_experts_are_counted_by_a_forecast(tmp_path):
    """Experts that share one weight: PEFT's count on the meta device is that on the real model."""
    config = all_families()["qwen3_moe"].tiny_config()
    config.save_pretrained(tmp_path)
    run = RunConfig(model=ModelConfig(path=str(tmp_path)), lora=LoraConfig(rank=4), data=DataConfig(window_tokens=64))
    wanted = trainable_parameters(add_adapter(AutoModelForCausalLM.from_config(config), LoraConfig(rank=4)))
    found = forecast(run)
    assert found.sizes.adapter.parameters == wanted and found.setting.engine == "generic"
