"""Finding a Transformers model's parts, whatever wraps it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Container
from functools import cache
from typing import Any

from torch import Tensor, nn

from lemo.core.plan import Plan, fingerprint_tensors
from lemo.errors import PlanError, UnsupportedModelError
from lemo.families import find_family
from lemo.runtime.attention import attention_module


def causal_model(model: nn.Module) -> Any:
    """The Transformers causal language model inside `model`: unwraps torch.compile, DDP, FSDP1 and PEFT.

    Raises:
        UnsupportedModelError: there is none.
    """
    current: Any = model
    while True:
        if hasattr(current, "_orig_mod"):
            current = current._orig_mod
        elif hasattr(current, "get_base_model"):
            current = current.get_base_model()
        elif hasattr(current, "module") and not hasattr(current, "get_output_embeddings"):
            current = current.module
        else:
            break
    if not hasattr(current, "get_output_embeddings") or not hasattr(current, "config"):
        raise UnsupportedModelError(f"{type(model).__name__} is not a Transformers causal language model")
    return current


def in_force(module: nn.Module) -> nn.Module:
    """The module that a call of `module` reaches: the trained copy where PEFT keeps one (`modules_to_save`)."""
    parts = module._modules
    if "original_module" not in parts or "modules_to_save" not in parts:
        return module
    copies: Any = parts["modules_to_save"]
    names = list(module.active_adapters)  # type: ignore[arg-type]
    if module.disable_adapters or not names or any(name not in copies for name in names):
        return parts["original_module"]  # type: ignore[return-value]
    return copies[names[0]]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers.

    Raises:
        UnsupportedModelError: there is no list of `num_hidden_layers` modules.
    """
    base = causal_model(model)
    count = base.config.get_text_config().num_hidden_layers
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UnsupportedModelError(f"{type(base).__name__} has no list of {count} decoder layers")


def why_dense(layer: nn.Module, index: int, config: Any) -> str | None:
    """Why a decoder layer can only run all rows; None when it may skip some, as far as its parts tell.

    Args:
        layer: the decoder layer.
        index: its number.
        config: the model's text configuration; None leaves out what it would tell.
    """
    if has_alibi(config):
        return "weighs attention by the distance between rows (ALiBi), which rows that are left out would change"
    if attention_module(layer) is None:
        return "has no single softmax attention module that uses Transformers' attention interface"
    kinds = getattr(config, "layer_types", None) or ()
    if len(kinds) > index and kinds[index] == "chunked_attention":
        return "attends inside chunks of the sequence, whose borders rows that are left out would move"
    return None


def has_alibi(config: Any) -> bool:
    """Whether a text configuration asks for ALiBi: Bloom always, Falcon by `alibi`, MPT by `attn_config.alibi`."""
    named = getattr(config, "alibi", False) or getattr(getattr(config, "attn_config", None), "alibi", False)
    return bool(named) or getattr(config, "model_type", None) == "bloom"


def reads_positions(model: nn.Module) -> bool:
    """Whether the attention masks that the model builds part documents where `position_ids` restart.

    Some decoders (OPT, GPT-OSS) do not hand positions to the function that makes their mask.
    """
    layers = decoder_layers(model)
    decoder = next(m for m in causal_model(model).modules() if any(x is layers for x in m._modules.values()))
    return _hands_on_positions(type(decoder))


@cache
def _hands_on_positions(decoder_class: type) -> bool:
    """As far as the source of a decoder's forward tells; true where it makes no mask, or cannot be read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(decoder_class.forward))))
    except (OSError, TypeError, SyntaxError):
        return True
    nodes = list(ast.walk(tree))
    named = [(x, getattr(x.func, "id", getattr(x.func, "attr", ""))) for x in nodes if isinstance(x, ast.Call)]
    makers = [x for x, name in named if name.startswith("create_") and "mask" in name]
    # Keywords of several masks are often put into one dict.
    keys = [key for x in nodes if isinstance(x, ast.Dict) for key in x.keys if isinstance(key, ast.Constant)]
    handed = {item.arg for x in makers for item in x.keywords} | {key.value for key in keys}
    return not makers or "position_ids" in handed


def dense_only(model: nn.Module) -> list[int]:
    """Layers that can only run all rows: recurrent, convolutional or linear-attention ones, and others like them."""
    config = causal_model(model).config.get_text_config()
    return [i for i, layer in enumerate(decoder_layers(model)) if why_dense(layer, i, config) is not None]


def window_of(attention: nn.Module | None) -> int | None:
    """Sliding window in rows of an attention module; None for all keys."""
    if attention is None or getattr(attention, "is_sliding", True) is False:
        return None
    config, index = attention.config, getattr(attention, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    named = getattr(config, "sliding_window", None)
    if kinds and isinstance(index, int) and "sliding" not in kinds[index]:
        named = None
    window = getattr(attention, "sliding_window", named)
    return None if window is None else int(window)  # type: ignore[arg-type]


def check_not_wrapped(layers: nn.ModuleList) -> None:
    """Raises UnsupportedModelError when torch's CheckpointWrapper is around layers: it replays them without a batch."""
    if any(hasattr(layer, "_checkpoint_wrapped_module") for layer in layers):
        raise UnsupportedModelError(
            "decoder layers are inside CheckpointWrapper, which would replay them without their rows; use the model's "
            "gradient_checkpointing_enable() instead (with accelerate: fsdp_activation_checkpointing off)"
        )


def check_adapters(model: nn.Module) -> None:
    """Raises UnsupportedModelError for an adapter in force that knows a row by its place in the whole batch.

    Activated LoRA counts rows from the end of the sequence, and X-LoRA brings weights for every row of the batch.
    """
    base = causal_model(model)
    for name, config in getattr(base, "peft_config", {}).items():
        reason = None
        if getattr(config, "alora_invocation_tokens", None) and _is_in_force(base, name):
            reason = "is an activated LoRA (alora_invocation_tokens), which counts rows from the end of the sequence"
        elif getattr(config, "peft_type", None) == "XLORA":
            reason = "is an X-LoRA, which weighs the row of every token by itself"
        if reason is not None:
            raise UnsupportedModelError(
                f"adapter {name!r} {reason}, but lemo gives layers a part of the rows; train it without lemo, or use "
                "a plain LoRA adapter"
            )


def _is_in_force(base: nn.Module, adapter: str) -> bool:
    """Whether some module runs with a LoRA adapter of that name."""
    adapted: Any = (x for x in base.modules() if adapter in getattr(x, "lora_A", ()))
    return any(adapter in x.active_adapters and not x.disable_adapters for x in adapted)


def check_no_noise(model: nn.Module, fused: Container[int]) -> None:
    """Raises UnsupportedModelError when a decoder layer would draw dropout or jitter: exact forward runs it twice.

    Layers that the fused engine runs draw the same mask for a row both times.
    """
    for layer in (layer for index, layer in enumerate(decoder_layers(model)) if index not in fused):
        for name, module in layer.named_modules():
            # nn.Dropout, and the numbers that families keep for functional dropout (`dropout`, `attention_dropout`) and
            # for the jitter of experts' routers (`jitter_noise`, which is `router_jitter_noise` in the configuration)
            values = {"p": getattr(module, "p", 0.0)} if isinstance(module, nn.Dropout) else vars(module)
            active = [k for k, v in values.items() if _is_noise(k) and isinstance(v, float) and v > 0]
            if active and module.training:
                settings = causal_model(model).config.get_text_config().to_dict()
                key = next((key for key in settings if key.endswith(active[0])), active[0])
                hint = f"; set {key} to 0 in the model's configuration" if "jitter" in key else ""
                raise UnsupportedModelError(
                    "exact forward (backward_ratio < forward_ratio) needs dropout and jitter off: "
                    f"{name or 'the layer'} has {active[0]}={values[active[0]]}{hint}"
                )


def _is_noise(name: str) -> bool:
    """Whether an attribute of that name says how much of what a module computes is drawn at random."""
    return name == "p" or "dropout" in name or "jitter" in name


def mlp_names(model: nn.Module) -> tuple[str, ...]:
    """Attribute names of a layer's MLP modules; empty when no family file states them."""
    family = find_family(causal_model(model).config)
    return () if family is None else family.mlp


def fingerprint(model: nn.Module) -> str | None:
    """Hash of the base model for plans; None when its weights are sharded or not there (meta).

    Sees sizes, the first rows of the embedding and every norm of the decoder layers: weights that adapters, extended
    vocabularies and quantised linears leave alone.
    """
    base = causal_model(model)
    config = base.config.get_text_config()
    described = {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
    }
    embedding = base.get_input_embeddings()
    # Embeddings that are trained beside an adapter are a copy; the base model's own are what a plan knows.
    tensors: list[Tensor] = [getattr(embedding, "original_module", embedding).weight[:4096]]
    for name, parameter in decoder_layers(base).named_parameters():
        if "norm" in name and "lora_" not in name and "modules_to_save" not in name:
            tensors.append(parameter)
    if any(t.is_meta or hasattr(t, "full_tensor") for t in tensors):
        return None
    return fingerprint_tensors(described, tensors)


def check_plan(model: Any, plan: Plan, layers: nn.ModuleList, unsafe_no_bypass: bool) -> None:
    """Raises an error unless a plan can be attached to a model.

    Raises:
        PlanError: the plan is not for this model, or not safe.
        UnsupportedModelError: the model has a plan already, an adapter that takes none, or an MLP without a name.
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"plan must be a lemo.Plan, got {type(plan).__name__}; lemo.Plan.uniform(model, ...) makes one")
    if "_lemo_handle" in model.__dict__ and model.__dict__["_lemo_handle"] is not None:
        raise UnsupportedModelError("the model has a plan attached already; detach it first")
    check_adapters(model)
    if len(plan.layers) != len(layers):
        raise PlanError(f"the plan has {len(plan.layers)} layers, the model {len(layers)}")
    if plan.fingerprint is not None:
        found = fingerprint(model)
        if found is not None and found != plan.fingerprint:
            raise PlanError(
                f"the plan was made for another base model (fingerprint {plan.fingerprint[:12]}, this one is "
                f"{found[:12]}); calibrate a plan for this one"
            )
    if plan.needs_bypass and not unsafe_no_bypass:
        raise PlanError(
            "the plan lets rows skip layers (forward_ratio < 1) without a bypass, which ruins models; calibrate a "
            "plan, use forward_ratio=1, leave the same rows out of all layers (kv='kept', scorer='recent', no dense "
            "layers), or pass unsafe_no_bypass=True"
        )
    if plan.scorer == "predictor":
        missing = [i for i, x in enumerate(plan.layers) if not x.is_dense and x.predictor is None]
        if missing:
            raise PlanError(f"scorer 'predictor' but layer {missing[0]} has no predictor; calibrate, or use 'random'")
    if plan.policy == "threshold" and any(x.threshold is None and not x.is_dense for x in plan.layers):
        raise PlanError("policy 'threshold' but some layers have no threshold; calibrate with tune_steps > 0")
    if plan.mlp == "own" and not mlp_names(model):
        kind = model.config.get_text_config().model_type
        raise UnsupportedModelError(f"mlp 'own' needs the name of the MLP, and no family file describes {kind!r}")
