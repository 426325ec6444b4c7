"""The generated sparse layer: `y = x; y[rows] = layer(x[rows])` around Transformers' own decoder layer.

Each decoder layer gets one cached subclass of its class under the same name. Its `__call__` selects, gathers and
scatters, outside gradient checkpointing in every release; its `forward` only tells attention and MLP, for the time of
one call, which rows they see. A checkpoint therefore saves the compact input and replays the same rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lemo.core.plan import LayerPlan
from lemo.core.selection import RowSet, Selection
from lemo.errors import UnsupportedModelError
from lemo.families.family import LayerNames
from lemo.ops import gather_rows, scatter_rows
from lemo.runtime.attention import AttentionConfig, CapturedKeys, attention_module, register
from lemo.runtime.batch import BatchContext
from lemo.runtime.fused.engine import make_call
from lemo.runtime.fused.layer import run_fused
from lemo.runtime.fused.parts import LayerParts, LayerReader, why_no_reader
from lemo.runtime.mlp import mlp_rows
from lemo.runtime.model import why_dense
from lemo.runtime.rows import (
    ACTIVE,
    ExactPass,
    Keys,
    LayerCall,
    MlpRows,
    Recorder,
    RowRange,
    active,
    all_rows,
    gather_keywords,
    hidden_of,
    inverse,
    without_class,
)

CALL = "lemo_call"  # keyword of a layer's forward that carries the LayerCall


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
        inner = super().forward
        if lemo_call is None:
            return inner(hidden_states, *args, **kwargs)
        state = self.__dict__["_lemo_layer"]
        if lemo_call.fused is not None:
            parts = lemo_call.fused.adapters.bind(state.read_parts(self), state.index)
            return run_fused(hidden_states, parts, lemo_call.fused)

        def run(hidden: Tensor, keywords: Mapping[str, Any], call: LayerCall) -> Any:
            modules = None if call.mlp is None else state.mlp_modules(self)
            return _run_call(inner, hidden, keywords, call, modules)

        if lemo_call.exact is not None:
            lemo_call = lemo_call.exact.first(lemo_call, lambda *pass_: hidden_of(run(*pass_)))
        return run(hidden_states, dict(zip(_parameter_names(type(self)), args, strict=False)) | kwargs, lemo_call)


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


@dataclass(frozen=True)
class _Step:
    """One layer of one batch: what `run_layer` passes around."""

    dense_call: Callable
    x_BTM: Tensor
    kwargs: dict[str, Any]
    context: BatchContext
    index: int

    @property
    def x_NM(self) -> Tensor:
        return self.x_BTM.flatten(0, 1)

    @property
    def plan(self) -> LayerPlan:
        return self.context.plan.layers[self.index]

    def call_rows(self, rows: RowSet, call: LayerCall) -> Tensor:
        """The layer on packed rows: (capacity, M)."""
        kwargs = self.gathered(rows.rows_N)
        output = self.dense_call(gather_rows(self.x_NM, rows.rows_N).unsqueeze(0), **kwargs, **{CALL: call})
        return hidden_of(output).squeeze(0)

    def gathered(self, rows_N: Tensor) -> dict[str, Any]:
        return gather_keywords(self.kwargs, rows_N, *self.x_BTM.shape[:2])


@torch.compiler.disable  # selection sizes follow from the data; a layer compiled by itself stays compiled inside
def run_layer(dense_call: Callable, x_BTM: Tensor, kwargs: dict[str, Any], context: BatchContext, index: int) -> Any:
    """One layer under selection.

    Args:
        dense_call: the layer's own call.
        x_BTM: residual stream before the layer.
        kwargs: the layer's keywords.
        context: the batch.
        index: the layer's number in the plan.

    Returns:
        The residual stream after the layer; the same tensor, written in place, where autograd allows it.
    """
    step = _Step(dense_call, x_BTM, kwargs, context, index)
    selection = context.select(index, step.x_NM)
    if index in context.fused:
        return _fused(step, selection)
    if selection.is_dense:
        if not context.maskless:
            return dense_call(x_BTM, **kwargs)
        everything = all_rows(context.layout)
        selection = Selection(everything, everything)
    if selection.forward is selection.backward:
        return _skip(step, selection.forward)
    return _exact(step, selection)


def _fused(step: _Step, selection: Selection) -> Tensor:
    """The layer as one function. The engine recomputes by itself: a checkpoint around it would do so twice."""
    layer = step.dense_call.__self__
    runs = selection.forward
    mlp = _mlp_rows(step, runs) if runs is not None and runs is selection.backward else None
    call = make_call(step.context, step.index, selection, step.x_BTM, step.kwargs, mlp)
    checkpoints = getattr(layer, "gradient_checkpointing", False)
    try:
        if checkpoints:
            layer.gradient_checkpointing = False
        return hidden_of(step.dense_call(step.x_BTM, **step.kwargs, **{CALL: LayerCall(fused=call)}))
    finally:
        if checkpoints:
            layer.gradient_checkpointing = True


def _skip(step: _Step, rows: RowSet) -> Tensor:
    """The same rows run forward and backward; the others take the bypass."""
    call = LayerCall(queries=RowRange.of_rows(step.context.layout, rows), mlp=_mlp_rows(step, rows))
    if step.context.plan.kv == "all" and len(rows.skipped_S):
        _refuse_reentrant(step.dense_call.__self__)
        call = replace(call, keys=_offered_keys(step, rows))
    values_NM = step.call_rows(rows, call)
    return _write(step, rows, values_NM)


def _refuse_reentrant(layer: nn.Module) -> None:
    """Reentrant checkpointing sees gradients of positional tensors only, not of rows that just offer keys."""
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return
    options = getattr(layer._gradient_checkpointing_func, "keywords", {})
    if options.get("use_reentrant", True):
        raise UnsupportedModelError(
            "kv 'all' needs gradient checkpointing that is not reentrant: pass gradient_checkpointing_kwargs="
            "{'use_reentrant': False}, or use kv='kept'"
        )


def _offered_keys(step: _Step, rows: RowSet) -> Keys:
    """Keys of every row of the batch, the skipped ones' computed inside the layer call with gradient."""
    hidden = gather_rows(step.x_NM, rows.skipped_S).unsqueeze(0)
    return Keys(
        range=RowRange.of_batch(step.context.layout),
        own_N=rows.rows_N,
        offered=(hidden, step.gathered(rows.skipped_S)),
        offered_S=rows.skipped_S,
    )


def _other_keys(step: _Step, rows: RowSet, range_: RowRange, own_N: Tensor, among: RowSet | None) -> Keys:
    """Keys of all rows of a range, computed with gradient, for the queries `rows` of it.

    `among` are the rows of the range; None for the batch's.
    """
    if among is None:
        others_S = places_S = rows.skipped_S
    else:
        own = torch.zeros(among.capacity, dtype=torch.uint8, device=own_N.device)
        own[own_N] = 1
        places_S = torch.argsort(own, stable=True)[: among.capacity - rows.capacity]
        others_S = among.rows_N[places_S]
    if not len(others_S):
        return Keys(range=range_, own_N=own_N)
    hidden = gather_rows(step.x_NM, others_S).unsqueeze(0)
    return Keys(range=range_, own_N=own_N, offered=(hidden, step.gathered(others_S)), offered_S=places_S)


def _exact(step: _Step, selection: Selection) -> Tensor:
    """Forward rows run without gradient, then backward rows again with it, against the recorded pass."""
    layout, gradient = step.context.layout, step.context.plan.gradient
    pairs = gradient == "pairs"
    forward, backward = selection.forward, selection.backward
    assert backward is not None
    recorder = Recorder(want_lse=pairs)
    call, hidden, kwargs = LayerCall(record=recorder), step.x_BTM.detach(), step.kwargs
    own_N, key_range = backward.rows_N, RowRange.of_batch(layout)
    value_places, constant_rows = backward.rows_N, None
    if forward is not None or pairs or step.context.maskless:
        rows = all_rows(layout) if forward is None else forward
        call = replace(call, queries=RowRange.of_rows(layout, rows))
        value_places, constant_rows = inverse(rows.rows_N, step.x_NM.shape[0])[backward.rows_N], rows
        with torch.no_grad():
            hidden, kwargs = gather_rows(step.x_NM, rows.rows_N).unsqueeze(0), step.gathered(rows.rows_N)
            if step.context.plan.kv == "all" and len(rows.skipped_S):
                call = replace(call, keys=_offered_keys(step, rows))
            else:
                own_N, key_range = value_places, call.queries

    second = LayerCall(queries=RowRange.of_rows(layout, backward))
    if gradient == "keys":
        _refuse_reentrant(step.dense_call.__self__)
        among = None if key_range is not call.queries else constant_rows
        second = replace(second, keys=_other_keys(step, backward, key_range, own_N, among))

    def complete() -> dict[str, Any]:
        if gradient == "keys":
            return {}
        if pairs:
            return {"dense": (recorder.output_HND[:, value_places], recorder.lse_HN[:, value_places])}
        return {"keys": Keys(key_range, own_N, constant=(recorder.key_GND, recorder.value_GND))}

    exact = ExactPass(hidden, kwargs, call, complete)
    values_NM = step.call_rows(backward, replace(second, exact=exact))
    passed_NM = exact.take_output()
    values_NM = _ReplaceValue.apply(values_NM, passed_NM[value_places])
    if constant_rows is None:
        # Every row of the batch has a value: write them all, then let the backward rows carry gradient.
        constant_rows = RowSet(
            torch.arange(len(passed_NM), device=passed_NM.device), (len(passed_NM),), value_places[:0]
        )
    return _write(step, backward, values_NM, constant=(constant_rows, passed_NM))


def _write(step: _Step, rows: RowSet, values_NM: Tensor, constant: tuple[RowSet, Tensor] | None = None) -> Tensor:
    """Puts the layer's rows into the stream; skipped rows get the bypass."""
    bypass = step.plan.bypass
    skipped = rows if constant is None else constant[0]
    factors = {}
    if bypass is not None and (len(skipped.skipped_S) or rows.valid_N is not None):
        bypass = bypass.on(step.x_BTM.device, step.x_BTM.dtype)
        factors = {"down_MR": bypass.down_MR, "up_RM": bypass.up_RM}
    if constant is not None:
        factors |= {"constant_rows": constant[0].rows_N, "constant_values": constant[1]}
    return scatter_rows(
        step.x_BTM,
        rows.rows_N,
        values_NM.to(step.x_BTM.dtype),
        skipped_rows=skipped.skipped_S,
        valid_N=rows.valid_N,
        inplace=step.context.in_place,
        **factors,
    )


def _mlp_rows(step: _Step, rows: RowSet) -> MlpRows | None:
    chosen = step.context.select_mlp(step.index, step.x_NM.detach(), rows)
    if chosen is None:
        return None
    places = inverse(rows.rows_N, step.x_NM.shape[0])
    rows_n = places[chosen.rows_N].sort().values
    runs_N = torch.zeros(rows.capacity, dtype=torch.bool, device=rows_n.device)
    runs_N[rows_n] = True
    skipped_s = torch.argsort(runs_N.to(torch.uint8), stable=True)[: rows.capacity - chosen.capacity]
    bypass = step.plan.mlp_bypass
    if bypass is None:
        return MlpRows(rows_n, skipped_s, None, None)
    bypass = bypass.on(step.x_BTM.device, step.x_BTM.dtype)
    return MlpRows(rows_n, skipped_s, bypass.down_MR, bypass.up_RM)


class _ReplaceValue(torch.autograd.Function):
    """Value of the dense pass, gradient of the recomputed rows."""

    @staticmethod
    def forward(ctx: Any, recomputed: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


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
        UnsupportedModelError: the layer has no softmax attention that goes through Transformers' interface.
    """
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
    layer.__class__ = type(layer).__mro__[2]
