"""Sizes of a recipe's model and adapter, from configuration files and the adapter's file alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lemo.config import RunConfig
from lemo.errors import ConfigError
from lemo.measure.sizes import ModelSizes, meta_model, read_sizes
from lemo.train.four_bits import saved_in_4bit
from lemo.train.lora import adapter_like, check_context, trainable_parameters
from lemo.train.model import extend_context, load_settings
from lemo.train.rehearsal import SHAPES
from lemo.train.start_adapter import adapted_names, adapter_folder, check_start


def run_sizes(run: RunConfig, settings: Any) -> ModelSizes:
    """Sizes of a recipe's model with its adapter, a new one or the saved one that training goes on from.

    Args:
        run: the recipe.
        settings: the model's configuration.

    Raises:
        ConfigError: the adapter changes nothing in the model, or does not fit it.
    """
    lora, targets = run.lora, run.lora.targets
    if lora.adapter is not None:
        _check_fit(run, settings)
        targets = tuple(adapted_names(lora))
    sizes = read_sizes(
        settings,
        rank=lora.rank,
        targets=targets,
        modules_to_save=lora.modules_to_save,
        dtype=getattr(torch, run.model.dtype),
        load_in_4bit=run.model.load_in_4bit or saved_in_4bit(settings),
        use_dora=lora.use_dora,
    )
    if sizes.experts is not None or lora.adapter is not None:  # PEFT counts experts, and ranks of single maps
        count = trainable_parameters(adapter_like(meta_model(settings), lora))
        sizes = replace(sizes, adapter=replace(sizes.adapter, parameters=count))
    if not sizes.adapter.parameters:
        raise ConfigError(f"lora.targets: the model has no linear map named {', '.join(lora.targets)}")
    return sizes


def _check_fit(run: RunConfig, settings: Any) -> None:
    """Raises ConfigError unless the saved adapter fits the model, and its context where the model's own is known."""
    check_start(meta_model(settings), run.lora)
    path = run.model.path
    if path not in SHAPES and Path(path).name != "config.json":
        own = load_settings(run.model)
        extend_context(own, run.model)
        check_context(own, adapter_folder(run.lora))
