"""Loads a model and its tokenizer, from Hugging Face folders, hub names, packages or GGUF, and extends its context."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lemo.config import ModelConfig
from lemo.errors import ConfigError, first_line
from lemo.train.four_bits import forget_quantisation, keep_numbers, loading_options

PACKAGE = "package:"


def resolve_path(path: str) -> str:
    """Folder of an installed package for `package:NAME`, else the path itself. The package is not imported.

    Raises:
        ConfigError: there is no such package.
    """
    if not path.startswith(PACKAGE):
        return path
    name = path.removeprefix(PACKAGE)
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"model.path names the package {name!r}, which is not installed here")
    return next(iter(spec.submodule_search_locations))


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    path = _checked_path(config)
    try:
        with _parsing_once(config):
            return AutoTokenizer.from_pretrained(path, **_gguf(config))
    except Exception as error:  # tokenizers fail with errors of many kinds
        raise ConfigError(f"model.path: no tokenizer can be read from {path} ({first_line(error)})") from error


def load_settings(config: ModelConfig) -> Any:
    """The model's own configuration, without its weights.

    Raises:
        ConfigError: it cannot be read.
    """
    from transformers import AutoConfig

    path = _checked_path(config)
    try:
        with _parsing_once(config):
            return AutoConfig.from_pretrained(path, **_gguf(config))
    except Exception as error:
        raise ConfigError(f"model.path: no model can be read from {path} ({first_line(error)})") from error


def find_gguf(path: str) -> str | None:
    """The GGUF file of a model folder that holds no other weights, when there is one; None elsewhere.

    Raises:
        ConfigError: there are several.
    """
    folder = Path(resolve_path(path)).expanduser()
    files = sorted(p.name for p in folder.glob("*.gguf")) if folder.is_dir() else []
    if not files or (folder / "config.json").exists():
        return None
    if len(files) > 1:
        raise ConfigError(f"model.gguf_file: {folder} holds several GGUF files, name one: {', '.join(files)}")
    return files[0]


def load_model(config: ModelConfig, *, window_tokens: int | None = None, device: Any = None) -> Any:
    """The base model in `config.dtype`, frozen in nothing, with its context extended as asked.

    Weights from GGUF files are unpacked to plain linears, and the trace of the quantisation is removed, so that
    everything that follows sees an ordinary model.

    Args:
        config: which model.
        window_tokens: longest sequence that will be used, for a check against the model's context.
        device: where it goes; the first CUDA device if there is one, else the CPU, when None.

    Raises:
        ConfigError: the model cannot be read, or its context is too short or cannot be extended.
    """
    from transformers import AutoModelForCausalLM

    settings = load_settings(config)
    path, options = _checked_path(config), _gguf(config)
    extend_context(settings, config)
    check_window(settings, window_tokens)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if options:
        options |= _unpacked()
    placed = loading_options(config, settings, device)
    options |= placed
    options |= {"config": settings, "dtype": getattr(torch, config.dtype), "attn_implementation": config.attention}
    try:
        with _parsing_once(config):
            model = AutoModelForCausalLM.from_pretrained(path, **options)
    except ImportError as error:
        raise ConfigError(f"model: loading needs a package that is missing ({first_line(error)})") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: the model in {path} cannot be loaded ({first_line(error)})") from error
    finally:
        _parsed.clear()  # some hundred thousand small objects, which nothing needs once there are weights
    if config.gguf_file is not None:
        _forget_quantisation(model)
    model.config.use_cache = False
    if config.rope_scaling != "none":
        model.extended_context = describe_context(config, model.config)  # `save_adapter` writes it
    if not placed:
        return model.to(device)
    keep_numbers(model)
    return model


def extend_context(settings: Any, config: ModelConfig) -> None:
    """Changes a Transformers configuration so that RoPE reaches `config.context_length`.

    `linear` divides positions by the factor; `yarn` interpolates by frequency. Both keep every position distinct.

    Raises:
        ConfigError: nothing to extend, no method named, or a RoPE that cannot be scaled further.
    """
    text = settings.get_text_config()
    own = getattr(text, "max_position_embeddings", None)
    length = config.context_length
    if length is None or own is None or length <= own:
        if config.rope_scaling != "none":
            raise ConfigError(
                f"model.rope_scaling is {config.rope_scaling}, but model.context_length ({length}) does not exceed the "
                f"model's own {own}"
            )
        return
    if config.rope_scaling == "none":
        raise ConfigError(
            f"model.context_length ({length}) exceeds the model's own {own}: set model.rope_scaling to linear or yarn"
        )
    rope = getattr(text, "rope_parameters", None)
    if not isinstance(rope, dict) or not rope:
        raise ConfigError(f"model.rope_scaling: {text.model_type} has no RoPE, so its context cannot be extended")
    if "rope_type" not in rope:
        raise ConfigError(
            f"model.rope_scaling: {text.model_type} has a RoPE per kind of layer ({', '.join(rope)}); "
            "extending that is not supported"
        )
    if rope["rope_type"] != "default":
        raise ConfigError(f"model.rope_scaling: the model's RoPE is scaled already ({rope['rope_type']})")
    scaled = {**rope, "rope_type": config.rope_scaling, "factor": length / own}
    if config.rope_scaling == "yarn":
        scaled["original_max_position_embeddings"] = own
    text.rope_parameters = scaled
    text.max_position_embeddings = length


def describe_context(config: ModelConfig, settings: Any) -> dict[str, Any]:
    """What `extend_context` changed, as it is written beside an adapter: under `config`, keys of config.json."""
    text = settings.get_text_config()
    changed = {"max_position_embeddings": text.max_position_embeddings, "rope_parameters": dict(text.rope_parameters)}
    return {"context_length": config.context_length, "rope_scaling": config.rope_scaling, "config": changed}


def has_context(settings: Any, context: dict[str, Any]) -> bool:
    """Whether a configuration's RoPE is the one that `describe_context` described."""
    text = settings.get_text_config()
    own = json.loads(json.dumps(getattr(text, "rope_parameters", None), default=str))
    return own == context["config"]["rope_parameters"]


def check_window(settings: Any, window_tokens: int | None) -> None:
    """Raises ConfigError when windows are longer than the model's context."""
    most = getattr(settings.get_text_config(), "max_position_embeddings", None)
    if window_tokens is not None and most is not None and window_tokens > most:
        raise ConfigError(
            f"data.window_tokens ({window_tokens}) exceeds the model's context of {most}; "
            "set model.context_length and model.rope_scaling"
        )


def _checked_path(config: ModelConfig) -> str:
    """The resolved path; what looks like a folder must be one."""
    path = resolve_path(config.path)
    folder = Path(path).expanduser()
    # A hub name is NAME or OWNER/NAME; anything else can only be a folder.
    looks_local = path.startswith((".", "~")) or folder.is_absolute() or path.count("/") > 1
    if looks_local and not folder.is_dir():
        raise ConfigError(f"model.path: there is no folder {path}")
    if folder.is_dir():
        files = sorted(p.name for p in folder.glob("*.gguf"))
        if config.gguf_file is None and files and not (folder / "config.json").exists():
            raise ConfigError(f"model.gguf_file is not set, and {path} holds no other weights than {', '.join(files)}")
        if config.gguf_file is not None and not (folder / config.gguf_file).is_file():
            there = ", ".join(files) or "none"
            raise ConfigError(f"model.gguf_file: {path} has no file {config.gguf_file} (GGUF files there: {there})")
        return str(folder)
    return path


def _gguf(config: ModelConfig) -> dict[str, Any]:
    """Keywords for a GGUF file."""
    if config.gguf_file is None:
        return {}
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("model.gguf_file needs the package `gguf`: pip install 'lemo[demo]'")
    return {"gguf_file": config.gguf_file}


# GGUF readers by path and time of change, kept from a tokenizer or configuration to the weights.
_parsed: dict[tuple[str, int], Any] = {}


@contextmanager
def _parsing_once(config: ModelConfig) -> Iterator[None]:
    """Inside, Transformers parses a GGUF file once, not anew for the tokenizer, the configuration and the weights."""
    if config.gguf_file is None:
        yield
        return
    import gguf

    reader = gguf.GGUFReader

    def parsed(path: Any, *arguments: Any) -> Any:
        key = (str(Path(path).resolve()), Path(path).stat().st_mtime_ns)
        if arguments or key not in _parsed:
            _parsed[key] = reader(path, *arguments)
        return _parsed[key]

    gguf.GGUFReader = parsed
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def _unpacked() -> dict[str, Any]:
    """Keywords that make Transformers unpack GGUF weights; older versions always do."""
    import transformers

    config_class = getattr(transformers, "GgufConfig", None)
    return {} if config_class is None else {"quantization_config": config_class(dequantize=True)}


def _forget_quantisation(model: Any) -> None:
    """Removes what would make Trainer and PEFT treat an unpacked model as a quantised one."""
    if any(not parameter.is_floating_point() for parameter in model.parameters()):
        raise ConfigError("model.gguf_file: the weights could not be unpacked to floating point")
    forget_quantisation(model)
