"""Adapters through PEFT, the only place that imports it."""

from __future__ import annotations

import json
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from lemo.config import LoraConfig
from lemo.errors import ConfigError
from lemo.train.four_bits import match_dtype
from lemo.train.model import has_context
from lemo.train.start_adapter import ALL_LINEAR, SETTINGS, adapter_folder, check_start

CONTEXT_FILE = "context.json"
# The name that it had; checkpoints have a file of that name which says something else.
_OLD_CONTEXT_FILE = "lemo.json"
_KEYS = {"context_length", "rope_scaling"}


def check_targets(model: Any, config: LoraConfig) -> None:
    """Raises ConfigError unless every target and module to save names a module of the model.

    An adapter to go on from must have been made for such a model, in its context.
    """
    if config.adapter is not None:
        check_context(model.config, adapter_folder(config))
        check_start(model, config)
        return
    dotted = [name for name, _ in model.named_modules() if name]
    targets = () if config.targets == ALL_LINEAR else config.targets
    for key, wanted in (("lora.targets", targets), ("lora.modules_to_save", config.modules_to_save)):
        for target in wanted:
            if not any(name == target or name.endswith(f".{target}") for name in dotted):
                known = sorted({name.rpartition(".")[2] for name in dotted if not name[-1].isdigit()})
                raise ConfigError(f"{key}: the model has no module {target!r}; it has {', '.join(known)}")


def add_adapter(model: Any, config: LoraConfig, checkpoint: str | Path | None = None) -> Any:
    """Wraps a model with a trainable LoRA adapter; the base is frozen.

    The adapter has the dtype of the model. By default PEFT keeps adapters of a bf16 model in fp32; each LoRA linear
    then casts and saves an fp32 copy of its input, about a third of the activations of a dense run. Dense and sparse
    runs are compared with the same adapter dtype.

    Args:
        model: the base model.
        config: a new adapter, or the saved one that training goes on from.
        checkpoint: of a run that began with a saved adapter: it is loaded in the place of that one, which may be gone.

    Raises:
        ConfigError: targets that the model does not have, or a saved adapter that does not fit it.
    """
    if config.adapter is None:
        return adapter_like(model, config)
    folder = adapter_folder(config) if checkpoint is None else checkpoint
    return _without_base(load_adapter(model, folder, trainable=True, dropout=config.dropout))


def adapter_like(model: Any, config: LoraConfig) -> Any:
    """As `add_adapter`, with fresh weights: a new adapter, or one of the saved one's shape, to be counted or timed."""
    import peft

    targets: Any = "all-linear" if config.targets == ALL_LINEAR else list(config.targets)
    if config.adapter is None:
        settings = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets,
            modules_to_save=list(config.modules_to_save) or None,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            init_lora_weights=True if config.init_lora_weights == "default" else config.init_lora_weights,
        )
    else:
        settings = _saved_settings(adapter_folder(config), config.dropout)
        settings.init_lora_weights = True
    try:
        wrapped = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    except ValueError as error:
        key = "use_dora" if config.use_dora and "dora" in str(error).lower() else "targets"
        raise ConfigError(f"lora.{key}: {str(error).splitlines()[0]}") from error
    match_dtype(wrapped)
    return _without_base(wrapped)


def _without_base(wrapped: Any) -> Any:
    """With a base named here, every checkpoint would look for its config.json on the hub; `save_adapter` names it."""
    wrapped.peft_config["default"].base_model_name_or_path = None
    return wrapped


def _saved_settings(folder: str | Path, dropout: float | None) -> Any:
    """What PEFT saved beside an adapter's weights, for one that is trained further."""
    import peft

    settings = peft.PeftConfig.from_pretrained(str(folder))
    settings.task_type, settings.inference_mode = "CAUSAL_LM", False
    settings.lora_dropout = settings.lora_dropout if dropout is None else dropout
    return settings


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


def check_context(settings: Any, folder: str | Path) -> None:
    """Raises ConfigError unless a model's configuration has the RoPE that an adapter was trained with."""
    context = read_context(folder)
    if context is not None and not has_context(settings, context):
        raise ConfigError(
            f"{folder}: the adapter was trained in another context than the model has; set model.context_length="
            f"{context['context_length']} and model.rope_scaling={context['rope_scaling']}"
        )


def load_adapter(model: Any, folder: str | Path, *, trainable: bool = False, dropout: float | None = None) -> Any:
    """Wraps a model with a saved adapter.

    Args:
        model: the base model.
        folder: of the adapter, in PEFT's format.
        trainable: it will be trained further.
        dropout: then in the place of the adapter's own; None keeps it.

    Raises:
        ConfigError: the folder holds no adapter, or one that does not fit, or was trained with another RoPE.
    """
    import peft

    if not (Path(folder) / SETTINGS).is_file():
        raise ConfigError(f"{folder} is no adapter: {SETTINGS} is missing")
    check_context(model.config, folder)
    options = {"is_trainable": trainable, "autocast_adapter_dtype": False}
    try:
        if trainable:
            options["config"] = _saved_settings(folder, dropout)
        with warnings.catch_warnings():
            # PEFT only warns of factors that are not in the file; they would be those of a new adapter.
            warnings.filterwarnings("error", message=".*missing adapter keys")
            wrapped = peft.PeftModel.from_pretrained(model, str(folder), **options)
    except KeyError as error:
        raise ConfigError(f"{folder}: the adapter cannot be loaded (it has no {error})") from error
    except (ValueError, RuntimeError, OSError, UserWarning) as error:
        raise ConfigError(f"{folder}: the adapter cannot be loaded ({str(error).splitlines()[0]})") from error
    match_dtype(wrapped)
    return wrapped


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
