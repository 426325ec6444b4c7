"""What others hang onto modules and only a call of the module runs: hooks, and forwards put on the instance."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules import module as _torch

from lemo.runtime.fused.watch import Slot

FORWARD = {"_forward_pre_hooks": "forward pre-hook", "_forward_hooks": "forward hook"}
BACKWARD = {"_backward_pre_hooks": "backward pre-hook", "_backward_hooks": "backward hook"}
KINDS = FORWARD | BACKWARD
OUTPUT = {"_forward_hooks": "forward hook"}
# Of hooks that run at every call of every module.
GLOBAL: dict[str, dict] = {table: getattr(_torch, f"_global{table}") for table in KINDS}
# Idle unless a call asks for hidden states or attention, and such calls run densely; or they note names alone.
RECORDERS = ("transformers.utils.output_capturing", "torch.utils.module_tracker")
# They gather a module's weights when it is called, as decoder layers are; what they are given, they do not change.
SHARDERS = ("torch.distributed.",)
# Kernels for what the module computes anyway.
EQUAL_FORWARDS = ("liger_kernel.",)


def hook_tables(module: nn.Module) -> list[dict]:
    """A module's tables of hooks, filled or not."""
    return [getattr(module, table) for table in KINDS]


def forward_slot(module: nn.Module) -> Slot:
    """Where a forward lies that was put on the instance."""
    return vars(module), "forward"


def called_modules(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules inside a layer that its forward may call, with their names."""
    return [(n, m) for n, m in layer.named_modules() if m is not layer and type(m).forward is not nn.Module.forward]


def why_layer_hooked(layer: nn.Module, called: list[tuple[str, nn.Module]]) -> str | None:
    """Why a layer needs calls of Transformers' own modules; None when nobody would miss them.

    Args:
        layer: the decoder layer. The fused engine runs its hooks, but makes one gradient out of the other in place.
        called: `called_modules` of it.
    """
    found = why_hooked(layer, SHARDERS, BACKWARD)
    if found is not None:
        return f"the layer has {found}"
    reasons = ((name, why_hooked(m) or why_replaced(m)) for name, m in called)
    return next((f"{name} has {reason}" for name, reason in reasons if reason is not None), None)


def is_shown(layer: nn.Module) -> bool:
    """Whether hooks of a layer are given the residual stream, and may keep it and its gradients."""
    return why_hooked(layer, RECORDERS + SHARDERS, FORWARD) is not None


def why_hooked(module: nn.Module, known: tuple[str, ...] = RECORDERS, kinds: Mapping[str, str] = KINDS) -> str | None:
    """The first hook of a module, but for those whose code is in the packages `known`; None for none.

    Those that torch calls for every module count, too.
    """
    for table, kind in kinds.items():
        own = _first_of(getattr(module, table), known)
        if own is not None:
            return f"a {kind} ({own})"
    return why_all_hooked(known, kinds)


def why_all_hooked(known: tuple[str, ...] = RECORDERS, kinds: Mapping[str, str] = KINDS) -> str | None:
    """The first hook that torch calls for every module, as `why_hooked` names it; None for none."""
    for table, kind in kinds.items():
        found = _first_of(GLOBAL[table], known)
        if found is not None:
            return f"a global {kind} ({found})"
    return None


def _first_of(hooks: Mapping[int, Any], known: tuple[str, ...]) -> str | None:
    for hook in hooks.values():
        inner = _inside(hook)
        if not str(getattr(inner, "__module__", "")).startswith(known):
            return _name(inner)
    return None


def why_replaced(module: nn.Module) -> str | None:
    """The forward put in the place of the class's own; None for the class's own, or one that is equal to it."""
    forward = vars(module).get("forward")
    if forward is None:
        return None
    own = forward.__func__ if isinstance(forward, MethodType) and forward.__self__ is module else None
    # Who took a forward away again often leaves the class's own on the instance.
    if own is type(module).forward or str(getattr(own, "__module__", "")).startswith(EQUAL_FORWARDS):
        return None
    peer = vars(module).get("_hf_hook")
    return f"a replaced forward ({_name(_inside(forward)) if peer is None else type(peer).__name__ + ' of accelerate'})"


def _inside(hook: Any) -> Any:
    while isinstance(hook, partial):
        hook = hook.func
    return hook


def _name(hook: Any) -> str:
    named = hook if hasattr(hook, "__qualname__") else type(hook)
    return f"{named.__module__}.{named.__qualname__}"
