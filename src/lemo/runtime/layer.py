"""The generated sparse layer: `y = x; y[rows] = layer(x[rows])` around Transformers' own decoder layer.

Each decoder layer gets one cached subclass of its class under the same name. Its `__call__` selects, gathers and
scatters, outside gradient checkpointing in every release; its `forward` only tells attention and MLP, for the time of
one call, which rows they see. A checkpoint therefore saves the compact input and replays the same rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lemo.errors import UnsupportedModelError
from lemo.families.family import LayerNames
from lemo.runtime.attention import AttentionConfig, CapturedKeys, attention_module, register
from lemo.runtime.fused.call import FusedCall
from lemo.runtime.fused.hooks import why_replaced
from lemo.runtime.fused.layer import run_fused
from lemo.runtime.fused.parts import LayerParts, LayerReader, why_no_reader
from lemo.runtime.fused.watch import Watch
from lemo.runtime.mlp import mlp_rows
from lemo.runtime.model import why_dense
from lemo.runtime.rows import (
    ACTIVE,
    LayerCall,
    active,
    hidden_of,
    without_class,
)
from lemo.runtime.step import run_layer


class SkippingLayer:
    """Mixed in before a decoder layer's class. `_lemo_layer` is set on the instance by `attach`."""

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer on the rows that the current batch selects, or densely outside of one."""
        state = self.__dict__.get("_lemo_layer")
        dense_call = super().__call__
        if state is None or (state.handle.context is None and state.handle.tap is None):
            return dense_call(hidden_states, *args, **kwargs)
        kwargs = dict(zip(_parameter_names(type(self)), args, strict=False)) | kwargs
        if state.handle.tap is not None:
            return state.handle.tap(state.index, hidden_states, kwargs)
        return run_layer(dense_call, hidden_states, kwargs, state.handle.context, state.index)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are the layer without lemo."""
        return without_class(super().__reduce_ex__(protocol), SkippingLayer, ("_lemo_layer",))

    def forward(self, hidden_states: Tensor, *args: Any, lemo_call: LayerCall | None = None, **kwargs: Any) -> Any:
        """The layer's own forward, with `lemo_call` in force for its attention and MLP."""
        state = self.__dict__.get("_lemo_layer")
        if lemo_call is not None and state is None:
            raise UnsupportedModelError(
                "backward reached a layer's checkpoint after the plan was detached, and cannot repeat the layer "
                "without it; call backward before handle.detach(), inside the `with` block"
            )
        # Who kept this forward while lemo was attached may call it after.
        inner = super().forward if isinstance(self, SkippingLayer) else MethodType(type(self).forward, self)
        if lemo_call is None:
            return inner(hidden_states, *args, **kwargs)
        state.reached = True
        if lemo_call.fused is not None:
            return _run_fused(self, state, hidden_states, lemo_call.fused)

        def run(hidden: Tensor, keywords: Mapping[str, Any], call: LayerCall) -> Any:
            modules = None if call.mlp is None else state.mlp_modules(self)
            return _run_call(inner, hidden, keywords, call, modules)

        if lemo_call.exact is not None:
            lemo_call = lemo_call.exact.first(lemo_call, lambda *pass_: hidden_of(run(*pass_)))
        return run(hidden_states, dict(zip(_parameter_names(type(self)), args, strict=False)) | kwargs, lemo_call)


@torch.compiler.disable  # its saved tensors and locks are no work for a compiler; its kernels are compiled already
def _run_fused(layer: nn.Module, state: LayerState, hidden_states: Tensor, call: FusedCall) -> Tensor:
    return run_fused(hidden_states, call.adapters.bind(state.read_parts(layer), state.index), call)


def _run_call(inner: Callable, hidden: Tensor, kwargs: Mapping[str, Any], call: LayerCall, mlp: Any) -> Any:
    """The layer's forward on the rows of `call`; `mlp` are the MLP's modules when it has rows of its own."""
    with active(call):
        keys = call.keys
        if keys is not None and keys.offered is not None:
            key_GSD, value_GSD = _capture_keys(inner, *keys.offered)
            ACTIVE.scratch = {"key": key_GSD, "value": value_GSD}
        if call.mlp is None:
            return inner(hidden, **kwargs)
        with mlp_rows(mlp, call.mlp):
            return inner(hidden, **kwargs)


def _capture_keys(inner: Callable, hidden_1SM: Tensor, kwargs: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of rows that otherwise skip the layer: its forward runs up to its attention, no further."""
    try:
        with active(ACTIVE.call, capture=True):
            inner(hidden_1SM, **kwargs)
    except CapturedKeys as captured:
        return captured.key_GSD, captured.value_GSD
    raise UnsupportedModelError("the layer's attention did not go through Transformers' attention interface")


@cache
def skipping_class(layer_class: type) -> type:
    """The subclass of a decoder layer's class that skips rows; same `__name__`, one per class."""
    body = {
        "__module__": layer_class.__module__,
        "__qualname__": layer_class.__qualname__,
        "__doc__": layer_class.__doc__,
    }
    return type(layer_class.__name__, (SkippingLayer, layer_class), body)


@cache
def _parameter_names(layer_class: type) -> tuple[str, ...]:
    """Names of the original forward's parameters after `hidden_states`."""
    original = next(c for c in layer_class.__mro__ if not issubclass(c, SkippingLayer) and "forward" in c.__dict__)
    return tuple(inspect.signature(original.forward).parameters)[2:]


@dataclass
class LayerState:
    """What a layer knows of its handle: its number, its MLP's names, and how to find the batch that is running.

    Attributes:
        index: number of the layer in the plan.
        handle: anything with attributes `context` (the running batch or None) and `tap` (None, or a function that gets
            index, hidden states and keywords of a layer's call and replaces it).
        mlp: attribute names of the MLP's modules, first to last.
        names: where the layer's parts are, for the fused engine.
        config: the model's text configuration.
    """

    index: int
    handle: Any
    mlp: tuple[str, ...] = ()
    names: LayerNames | None = None
    config: Any = None
    reached: bool = False
    _reader: LayerReader | None = None

    def mlp_modules(self, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        """First and last module of the layer's MLP as they are now, adapters included."""
        return getattr(layer, self.mlp[0]), getattr(layer, self.mlp[-1])

    def why_not_fused(self, layer: nn.Module) -> str | None:
        """Why the layer, as it is now, needs the generic executor."""
        if self._reader is None or self._reader.is_stale():
            attention = attention_module(layer)
            reason = why_no_reader(self.names, attention, self.config)
            if reason is not None:
                return reason
            assert self.names is not None and attention is not None
            self._reader = LayerReader(layer, self.names, attention, self.config)
        return self._reader.why_not(layer)

    def watch(self, layer: nn.Module) -> Watch:
        """Tells whether `why_not_fused`, once asked, would still answer the same."""
        assert self._reader is not None
        return self._reader.watch(layer)

    def read_parts(self, layer: nn.Module) -> LayerParts:
        """Maps and norms of the layer as they are now, for the fused engine, which `why_not_fused` let pass."""
        assert self._reader is not None
        return self._reader.read(layer)

    def peek_parts(self, layer: nn.Module) -> LayerParts | None:
        """As `read_parts`, outside the layer's call; None where its adapters are shards, which only a call gathers."""
        assert self._reader is not None
        return self._reader.read(layer) if self._reader.is_whole() else None


def install(layer: nn.Module, state: LayerState) -> None:
    """Makes a decoder layer skip rows while a batch runs under its handle.

    Raises:
        UnsupportedModelError: the layer has no softmax attention that goes through Transformers' interface, or its
            forward was replaced.
    """
    _drop_own_forward(layer)
    if "forward" in layer.__dict__:
        raise UnsupportedModelError(
            f"layer {state.index} ({type(layer).__name__}) has {why_replaced(layer) or 'a replaced forward'}, which "
            "would run without lemo; accelerate does that for a device_map: load the model on one device, or take the "
            "hook off (accelerate.hooks.remove_hook_from_module) before attach"
        )
    reason = why_dense(layer, state.index, state.config)
    if reason is not None:
        raise UnsupportedModelError(
            f"layer {state.index} ({type(layer).__name__}) {reason}; name it in dense_layers to run it densely"
        )
    attention: Any = attention_module(layer)
    register()
    attention.config = AttentionConfig(attention.config)
    layer.__dict__["_lemo_layer"] = state
    layer.__class__ = skipping_class(type(layer))


def removable(layer: nn.Module) -> bool:
    """Whether `remove` can give the layer its class back: nobody subclassed it further since `install`."""
    return type(layer).__mro__[1] is SkippingLayer


def remove(layer: nn.Module) -> None:
    """Undoes `install`."""
    attention = attention_module(layer)
    if attention is not None and isinstance(attention.config, AttentionConfig):
        attention.config = attention.config.__dict__["base"]
    layer.__dict__.pop("_lemo_layer", None)
    _drop_own_forward(layer)
    layer.__class__ = type(layer).__mro__[2]


def _drop_own_forward(layer: nn.Module) -> None:
    """Takes off what hooks of accelerate leave behind when they go: the class's own forward, on the instance."""
    forward = layer.__dict__.get("forward")
    if isinstance(forward, MethodType) and forward.__func__ is type(layer).forward:
        del layer.__dict__["forward"]
