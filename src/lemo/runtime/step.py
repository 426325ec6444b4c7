"""One layer of one batch under selection: rows gathered, the layer called, its rows written into the stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lemo.core.plan import LayerPlan
from lemo.core.selection import RowSet, Selection
from lemo.errors import UnsupportedModelError
from lemo.ops import gather_rows, scatter_rows
from lemo.runtime.batch import BatchContext
from lemo.runtime.context import attends_locally, context_rows, part_rows, parts_rows
from lemo.runtime.far import far_keys
from lemo.runtime.fused.engine import make_call
from lemo.runtime.rows import (
    CALL,
    ExactPass,
    Keys,
    LayerCall,
    MlpRows,
    Recorder,
    RowRange,
    WideRows,
    all_rows,
    gather_keywords,
    hidden_of,
    inverse,
)


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
        hidden = gather_rows(self.x_NM, rows.rows_N).unsqueeze(0)
        return self.call(hidden, self.gathered(rows.rows_N), call).squeeze(0)

    def call(self, hidden: Tensor, kwargs: Mapping[str, Any], call: LayerCall) -> Tensor:
        """The layer under `call`.

        Raises:
            UnsupportedModelError: its forward was replaced, so that `call` never reached lemo's.
        """
        layer = self.dense_call.__self__
        state = layer.__dict__["_lemo_layer"]
        state.reached = False
        output = self.dense_call(hidden, **kwargs, **{CALL: call})
        if not state.reached:
            raise UnsupportedModelError(
                f"layer {self.index} ({type(layer).__name__}) ran without its rows: its forward was replaced after "
                "attach by one that does not call the layer's own; put that forward in place before attach, on the "
                "class, or leave it out"
            )
        return hidden_of(output)

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
        if not context.by_rows:
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
        return step.call(step.x_BTM, step.kwargs, LayerCall(fused=call))
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
    local = attends_locally(step.context.plan, layout)
    if forward is not None or pairs or step.context.by_rows or local:
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
    far, wide = second.queries, (WideRows(second.queries, value_places),)
    if parts_rows(step.context.plan, layout, step.index):
        parted = part_rows(step.context.plan, layout, backward, key_range)
        far, wide = parted.far, parted.wide(value_places[torch.cat([parted.far_n, parted.near_n])])
        second = replace(second, parted=parted)
    if local:
        sides = call.queries, key_range
        context = context_rows(step.context.plan, layout, sides, wide, forward is None)
        call = replace(call, context=context)
    if not pairs:
        second = replace(second, far=far_keys(step.context, step.index, far, key_range))
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
        inplace=step.context.writes_into(step.index),
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
