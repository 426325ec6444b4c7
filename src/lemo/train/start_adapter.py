"""The adapter that training goes on from: what its files say of it, and how a recipe's keys go with it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lemo.config import LoraConfig, ModelConfig
from lemo.errors import ConfigError, first_line

ALL_LINEAR = ("all-linear",)
SETTINGS, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
# Keys of `lora` that an adapter answers: PEFT's name, and what PEFT takes where the file has none.
_NAMES: dict[str, tuple[str, Any]] = {
    "rank": ("r", 8),
    "alpha": ("lora_alpha", 8.0),
    "dropout": ("lora_dropout", 0.0),
    "targets": ("target_modules", ()),
    "modules_to_save": ("modules_to_save", ()),
    "use_rslora": ("use_rslora", False),
    "use_dora": ("use_dora", False),
}
KEYS = frozenset(_NAMES)
# Dropout is of training, not of the weights: a recipe may choose another.
_FREE = frozenset({"dropout"})
# Settings without a key that go on as they are.
_MORE = (
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "exclude_modules"),
    "target_parameters",
)
# Settings that change nothing for an adapter that has its weights.
_SILENT = (
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
    *("peft_version", "init_lora_weights", "fan_in_fan_out", "megatron_core", "qalora_group_size"),
    *("eva_config", "loftq_config", "corda_config", "lora_ga_config", "runtime_config"),
)
# Ways to begin that leave the base model's weights as they are.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def adapter_folder(lora: LoraConfig) -> Path:
    """Folder that `lora.adapter` names."""
    return Path(lora.adapter or "").expanduser()


def is_there(lora: LoraConfig) -> bool:
    """Whether the folder that `lora.adapter` names says what is in it."""
    return (adapter_folder(lora) / SETTINGS).is_file()


def settle(lora: LoraConfig, given: Collection[str]) -> LoraConfig:
    """The keys of `lora` with the values that its adapter has; without an adapter they are as they were.

    Whether `all-linear` is what the adapter has only the model can tell: `check_start` does.

    Args:
        lora: the recipe's.
        given: keys that were set, which must say what the adapter has.

    Raises:
        ConfigError: no adapter is there, or one that lemo cannot train, or a key says something else.
    """
    if lora.adapter is None:
        return lora
    settings = read_settings(lora)
    try:
        found = {key: _value(key, settings) for key in _NAMES}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora.adapter: {adapter_folder(lora) / SETTINGS} cannot be read ({error})") from error
    wrong = [key for key in _NAMES if key in given and not _agrees(key, getattr(lora, key), found[key])]
    if wrong:
        said = " and ".join(f"lora.{key} is {_text(getattr(lora, key))}" for key in wrong)
        own = " and ".join(_text(found[key]) for key in wrong)
        it = "the key" if len(wrong) == 1 else "the keys"
        raise ConfigError(f"{said}, but the adapter in {adapter_folder(lora)} (lora.adapter) has {own}: leave {it} out")
    return replace(lora, **{key: value for key, value in found.items() if key not in given})


def read_settings(lora: LoraConfig) -> dict[str, Any]:
    """What PEFT wrote beside the weights of `lora.adapter`.

    Raises:
        ConfigError: no adapter is there, or one that lemo cannot train.
    """
    folder = adapter_folder(lora)
    if not is_there(lora):
        inside = folder / "adapter"
        hint = f"; it is a run, whose adapter is {inside}" if (inside / SETTINGS).is_file() else ""
        raise ConfigError(f"lora.adapter: {folder} is no adapter, {SETTINGS} is missing{hint}")
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        kind = settings["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"lora.adapter: {folder / SETTINGS} cannot be read ({error})") from error
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ConfigError(f"lora.adapter: {folder} has no weights, {WEIGHTS[0]} is missing")
    task = settings.get("task_type")
    if kind != "LORA" or task not in (None, "CAUSAL_LM"):
        what = kind if kind != "LORA" else task
        raise ConfigError(f"lora.adapter: {folder} is a {what} adapter; only LoRA of causal language models goes on")
    start = settings.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise ConfigError(
            f"lora.adapter: {folder} was begun with init_lora_weights={start}, which changed the base model's weights; "
            "convert it to plain LoRA with PEFT first (path_initial_model_for_weight_conversion)"
        )
    known = {name for name, _ in _NAMES.values()} | {*_MORE, *_SILENT}
    other = [name for name, value in settings.items() if name not in known and value and value != "none"]
    if other:
        raise ConfigError(f"lora.adapter: {folder} has {other[0]}={settings[other[0]]}, which lemo does not train")
    return settings


def describe_start(lora: LoraConfig, model: ModelConfig, base: str) -> list[str]:
    """What to say of the adapter that training goes on from, beside its keys; nothing of a new one.

    Args:
        lora: the recipe's.
        model: the recipe's.
        base: the folder or hub name of the recipe's base model.
    """
    if lora.adapter is None:
        return []
    settings, said = read_settings(lora), []
    more = [name for name in _MORE if settings.get(name)]
    if more:
        said.append(f"the adapter has settings of its own that stay: {', '.join(more)}")
    named = settings.get("base_model_name_or_path")
    if named and _place(named) != _place(base):
        said.append(
            f"the adapter names {named} as its base model, and model.path is {base}: their weights must be equal"
        )
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in _tensors(adapter_folder(lora)).values()}
    if dtypes - {model.dtype} and model.dtype != "float32":
        said.append(f"the adapter's weights are rounded from {', '.join(sorted(dtypes))} to {model.dtype}, model.dtype")
    return said


def adapted_names(lora: LoraConfig) -> list[str]:
    """Dotted names of the modules that the adapter changes; experts that share one weight are left out."""
    return list(dict.fromkeys(name for name, _, _ in _factors(adapter_folder(lora))))


def check_start(model: Any, lora: LoraConfig) -> None:
    """Raises ConfigError unless the adapter that `lora.adapter` names was made for such a model.

    Its factors must fit the maps that they are named after, and be on all maps where the recipe says `all-linear`.
    Weights are not looked at: the model may be on the meta device.
    """
    folder, modules = adapter_folder(lora), dict(model.named_modules())
    for name, side, (outputs, inputs) in _factors(folder):
        if name not in modules:
            raise ConfigError(f"lora.adapter: {folder} changes {name}, which the model does not have")
        own = linear_sizes(modules[name])
        what, wanted = ("inputs", inputs) if side == "A" else ("outputs", outputs)
        if own is not None and own[what] != wanted:
            raise ConfigError(f"lora.adapter: {folder} is for {wanted} {what} of {name}; the model has {own[what]}")
    if lora.targets != ALL_LINEAR:
        return
    head = model.get_output_embeddings()
    linear = {name for name, module in modules.items() if linear_sizes(module) and module is not head}
    kinds = (nn.Linear, nn.Embedding)
    changed = {n for n in adapted_names(lora) if n in linear or isinstance(modules[n], kinds)}
    if differ := sorted(linear ^ changed):
        does = "leaves out" if differ[0] in linear else "changes"
        raise ConfigError(f"lora.targets is all-linear, but the adapter in {folder} {does} {differ[0]}: leave it out")


def linear_sizes(module: nn.Module) -> dict[str, int] | None:
    """Inputs and outputs of a linear map, GPT-2's transposed one included; None for other modules."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return dict(zip(("inputs", "outputs"), module.weight.shape, strict=True))
    return {"inputs": module.in_features, "outputs": module.out_features} if isinstance(module, nn.Linear) else None


def _factors(folder: Path) -> list[tuple[str, str, tuple[int, int]]]:
    """Of each factor of an adapter: the module that it is named after, `A` or `B`, and its shape."""
    found = []
    for name, tensor in _tensors(folder).items():
        parts = _FACTOR.fullmatch(name)
        # PEFT has names of its own for experts that share one weight.
        if parts is not None and "experts" not in parts[1]:
            found.append((parts[1], parts[2], tuple(tensor.shape)))
    return found


_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Each tensor of an adapter on the meta device, by the name that PEFT gives it.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), folder / WEIGHTS[0])
    try:
        if path.suffix == ".bin":
            return torch.load(path, map_location="meta", weights_only=True)
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            pieces = {name: file.get_slice(name) for name in file.offset_keys()}
            return {n: torch.empty(x.get_shape(), dtype=x[:0].dtype, device="meta") for n, x in pieces.items()}
    except Exception as error:  # pickles and safetensors fail with errors of many kinds
        raise ConfigError(f"lora.adapter: {path} cannot be read ({first_line(error)})") from error


def _value(key: str, settings: dict[str, Any]) -> Any:
    """The adapter's value of a key, as a recipe has it."""
    name, default = _NAMES[key]
    value = settings.get(name)
    if isinstance(default, tuple):
        return (value,) if isinstance(value, str) else tuple(sorted(value or ()))
    return default if value is None else type(default)(value)


def _agrees(key: str, said: Any, found: Any) -> bool:
    """Whether a key that was set says what the adapter has."""
    if key in _FREE or (key == "targets" and said == ALL_LINEAR):
        return True
    return set(said) == set(found) if isinstance(found, tuple) else said == found


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else f"{value:g}"


def _place(path: str) -> str:
    """A path as it is compared: a folder by its place, a hub name as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path
