"""Base models whose linear maps are kept in 4 bits (QLoRA), by bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from lemo.config import ModelConfig
from lemo.errors import ConfigError
from lemo.runtime.fused.linear import Packed

# NF4 with its scales quantised again, as in QLoRA (arXiv 2305.14314, section 3).
_KIND = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def loading_options(config: ModelConfig, settings: Any, device: Any) -> dict[str, Any]:
    """Keywords of `from_pretrained` for a model in 4 bits, and for one that was saved quantised; none for others.

    Quantised weights are put where they belong while they are loaded.

    Args:
        config: which model, and whether it asks for 4 bits.
        settings: the model's own configuration.
        device: where it goes.

    Raises:
        ConfigError: 4 bits are asked for and cannot be had.
    """
    saved = getattr(settings, "quantization_config", None)
    if not config.load_in_4bit:
        return {} if saved is None else {"device_map": {"": device}}
    if config.gguf_file is not None:
        raise ConfigError("model.load_in_4bit: weights of a GGUF file are unpacked first; convert them to safetensors")
    if saved is not None:
        method = saved.get("quant_method", "?") if isinstance(saved, dict) else getattr(saved, "quant_method", "?")
        raise ConfigError(f"model.load_in_4bit: the model is quantised already ({method}); leave the key out")
    check_installed()
    from transformers import BitsAndBytesConfig

    kind = BitsAndBytesConfig(**_KIND, bnb_4bit_compute_dtype=getattr(torch, config.dtype))
    return {"quantization_config": kind, "device_map": {"": device}}


def saved_in_4bit(settings: Any) -> bool:
    """Whether a model was saved with its linear maps in 4 bits, by its configuration."""
    saved = getattr(settings, "quantization_config", None)
    if saved is None:
        return False
    return bool(saved.get("load_in_4bit") if isinstance(saved, dict) else getattr(saved, "load_in_4bit", False))


def check_installed() -> None:
    """Raises ConfigError without bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("model.load_in_4bit needs the package `bitsandbytes`: pip install 'lemo[bitsandbytes]'")


def keep_numbers(model: nn.Module) -> None:
    """Forbids bitsandbytes to store 4-bit numbers in another order for inference on a CPU.

    It does so in the first forward of evaluation, and not back again for training, whose gradients would then miss
    what goes through the map.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_packed(model: nn.Module) -> bool:
    """Whether weights of a model are kept in 4 bits."""
    return any(getattr(parameter, "quant_state", None) is not None for parameter in model.parameters())


def pack_linear(model: nn.Module) -> None:
    """Quantises all `nn.Linear` of a model in place but the one before the logits, as loading with 4 bits does.

    Args:
        model: a Transformers causal language model in one floating dtype, without adapters, on its device.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module is head:
            continue
        weight = module.weight
        packed = Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=weight.dtype,
            quant_type=_KIND["bnb_4bit_quant_type"],
            device="meta",
        )
        numbers = Params4bit(
            weight.data,
            requires_grad=False,
            quant_type=_KIND["bnb_4bit_quant_type"],
            compress_statistics=_KIND["bnb_4bit_use_double_quant"],
        )
        packed.weight = numbers.to(weight.device)
        packed.bias = module.bias
        model.set_submodule(name, packed)
    keep_numbers(model)
    model.is_loaded_in_4bit = True  # type: ignore[assignment] # PEFT then takes its adapters for 4 bits


def unpack_linear(model: nn.Module) -> None:
    """Puts plain maps of the weights that 4-bit numbers stand for in their place.

    Args:
        model: without adapters.
    """
    for name, module in list(model.named_modules()):
        weight: Any = getattr(module, "weight", None)
        packed = Packed.of(weight)
        if packed is None:
            continue
        plain = nn.Linear(*reversed(packed.shape), bias=module.bias is not None, device="meta")
        plain.weight = nn.Parameter(packed.unpack(weight), requires_grad=False)
        plain.bias = module.bias  # type: ignore[assignment]
        model.set_submodule(name, plain)
    forget_quantisation(model)
    # How Transformers read the weights, which saving would undo: that it read them in 4 bits cannot be.
    vars(model).pop("_weight_conversions", None)


def forget_quantisation(model: Any) -> None:
    """Removes what would make Trainer and PEFT treat an unpacked model as a quantised one."""
    for name in ("hf_quantizer", "quantization_method"):
        if getattr(model, name, None) is not None:
            setattr(model, name, None)
    for name in ("is_quantized", "is_loaded_in_4bit"):
        if name in model.__dict__:
            setattr(model, name, False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def match_dtype(model: Any) -> None:
    """Gives an adapter over 4-bit weights the dtype that they are computed in: PEFT makes it in fp32.

    Inputs of linear maps would be cast to fp32 and kept so, and products run at a fraction of the speed.

    Args:
        model: a PEFT model; without 4-bit weights it stays as it is.
    """
    if not is_packed(model):
        return
    dtype = model.get_input_embeddings().weight.dtype
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
