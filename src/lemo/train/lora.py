"""Adapters through PEFT, the only place that imports it."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from lemo.config import LoraConfig
from lemo.errors import ConfigError
from lemo.train.model import has_context

CONTEXT_FILE = "context.json"
# The name that it had; checkpoints have a file of that name which says something else.
_OLD_CONTEXT_FILE = "lemo.json"
_KEYS = {"context_length", "rope_scaling"}


def check_targets(model: Any, config: LoraConfig) -> None:
    """Raises ConfigError unless every target and module to save names a module of the model."""
    dotted = [name for name, _ in model.named_modules() if name]
    targets = () if config.targets == ("all-linear",) else config.targets
    for key, wanted in (("lora.targets", targets), ("lora.modules_to_save", config.modules_to_save)):
        for target in wanted:
            if not any(name == target or name.endswith(f".{target}") for name in dotted):
                known = sorted({name.rpartition(".")[2] for name in dotted if not name[-1].isdigit()})
                raise ConfigError(f"{key}: the model has no module {target!r}; it has {', '.join(known)}")


def add_adapter(model: Any, config: LoraConfig) -> Any:
    """Wraps a model with a trainable LoRA adapter; the base is frozen.

    The adapter has the dtype of the model. By default PEFT keeps adapters of a bf16 model in fp32; each LoRA linear
    then casts and saves an fp32 copy of its input, about a third of the activations of a dense run. Dense and sparse
    runs are compared with the same adapter dtype.

    Raises:
        ConfigError: targets that the model does not have.
    """
    import peft

    targets: Any = "all-linear" if config.targets == ("all-linear",) else list(config.targets)
    try:
        settings = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets,
            modules_to_save=list(config.modules_to_save) or None,
        )
        wrapped = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ConfigError(f"lora.targets: {str(error).splitlines()[0]}") from error
    # With a base named here, every checkpoint would look for its config.json on the hub; `save_adapter` names it.
    wrapped.peft_config["default"].base_model_name_or_path = None
    return wrapped


def save_adapter(model: Any, folder: str | Path, base_path: str) -> None:
    """Saves the adapter in PEFT's format, which loads anywhere without lemo; `base_path` is written into it.

    Where `load_model` extended the context, context.json says how: see `write_context`.
    """
    model.peft_config["default"].base_model_name_or_path = base_path
    try:
        model.save_pretrained(str(folder), save_embedding_layers=False)
    finally:
        model.peft_config["default"].base_model_name_or_path = None
    write_context(model, folder)


def write_context(model: Any, folder: str | Path) -> None:
    """Writes beside an adapter how `load_model` extended the context: PEFT's files do not say it.

    Without an extension the file is removed where there is one of an earlier adapter.

    Args:
        model: what `load_model` gave, with an adapter or without.
        folder: of the adapter, or a checkpoint; it exists.

    Raises:
        OSError: the file cannot be written.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    context = getattr(base, "extended_context", None)
    file, old = Path(folder) / CONTEXT_FILE, Path(folder) / _OLD_CONTEXT_FILE
    if context is not None:
        file.write_text(json.dumps(context, indent=2) + "\n", encoding="utf-8")
        return
    file.unlink(missing_ok=True)
    with suppress(OSError, ValueError):
        if _is_context(json.loads(old.read_text(encoding="utf-8"))):
            old.unlink()


def read_context(folder: str | Path) -> dict[str, Any] | None:
    """How the context was extended that an adapter was trained in; None where it was not, or nothing says so.

    Raises:
        ConfigError: the file that says it cannot be read.
    """
    file = Path(folder) / CONTEXT_FILE
    is_old = not file.exists()
    if is_old:
        file = Path(folder) / _OLD_CONTEXT_FILE
        if not file.is_file():
            return None
    try:
        context = json.loads(file.read_text(encoding="utf-8"))
        if is_old and not _is_context(context):
            return None
        if context.keys() >= _KEYS and context["config"]["rope_parameters"]:
            return context
        raise ValueError("keys are missing")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file}: cannot be read ({error}); it says how the adapter's context was extended"
        ) from error


def _is_context(found: Any) -> bool:
    """Whether what a file of the old name holds is about a context."""
    return isinstance(found, dict) and not _KEYS.isdisjoint(found)


def load_adapter(model: Any, folder: str | Path, *, trainable: bool = False) -> Any:
    """Wraps a model with a saved adapter.

    Raises:
        ConfigError: the folder holds no adapter, or one that does not fit, or was trained with another RoPE.
    """
    import peft

    if not (Path(folder) / "adapter_config.json").is_file():
        raise ConfigError(f"{folder} is no adapter: adapter_config.json is missing")
    context = read_context(folder)
    if context is not None and not has_context(model.config, context):
        raise ConfigError(
            f"{folder}: the adapter was trained in another context than the model has; set model.context_length="
            f"{context['context_length']} and model.rope_scaling={context['rope_scaling']}"
        )
    try:
        return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, autocast_adapter_dtype=False)
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"{folder}: the adapter cannot be loaded ({str(error).splitlines()[0]})") from error


def read_base_path(folder: str | Path) -> str | None:
    """Base model that a saved adapter names, or None.

    Raises:
        ConfigError: the folder holds no adapter that can be read.
    """
    try:
        return json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder} is no adapter: adapter_config.json is missing or cannot be read") from error


def wrapped_names(model: Any) -> list[str]:
    """Dotted names of the modules that an adapter changes."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    changing = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [name for name, module in model.named_modules() if isinstance(module, changing)]


def merge_layers(model: Any) -> Any:
    """The base model with the adapter added into its weights, in the dtype that they have.

    Raises:
        ConfigError: an adapter that cannot be merged.
    """
    try:
        return model.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"the adapter cannot be merged ({str(error).splitlines()[0]})") from error


def trainable_parameters(model: Any) -> int:
    """Number of parameters that training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
