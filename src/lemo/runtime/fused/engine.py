"""From a batch's selection to a fused layer call, or the reason why the generic executor must run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lemo.core.layout import Layout
from lemo.core.plan import Plan
from lemo.core.selection import RowSet, Selection
from lemo.ops import plan_rows, writable
from lemo.ops.attend_rows.reference import Rows
from lemo.runtime.batch import BatchContext
from lemo.runtime.context import attends_locally, context_rows, loss_rows, part_rows, parts_rows
from lemo.runtime.far import far_keys
from lemo.runtime.fused.call import ExactRows, FusedCall
from lemo.runtime.fused.shipment import Shipment
from lemo.runtime.rows import MlpRows, PartedRows, RowRange, WideRows, all_rows, inverse


def make_call(
    context: BatchContext,
    index: int,
    selection: Selection,
    x_BTM: Tensor,
    kwargs: Mapping[str, Any],
    mlp: MlpRows | None,
) -> FusedCall:
    """Rows of one layer for one batch, as the fused engine takes them.

    Args:
        context: the batch.
        index: number of the layer.
        selection: its rows.
        x_BTM: residual stream before it.
        kwargs: the layer's keywords; `position_embeddings` among them where it uses RoPE.
        mlp: rows of its MLP among those of the selection, when it has its own.
    """
    plan = context.plan
    # Rows without loss may go unread behind the last layer.
    ends = mlp is None and context.loss_rows_only and index == len(plan.layers) - 1
    kind = _Kind(ends, parts_rows(plan, context.layout, index), _has_vendor(x_BTM))
    planned, shared = context.once((selection, kind), lambda: _both_calls(context, selection, kind))
    bypass = None if ends else plan.layers[index].bypass
    far = None
    if selection.forward is not selection.backward and plan.gradient != "pairs":
        far = far_keys(context, index, _attending(planned), planned.keys)
    tables = _rope(kwargs, x_BTM)
    return replace(
        shared,
        bypass=None if bypass is None else bypass.on(x_BTM.device, x_BTM.dtype),
        mlp=mlp,
        cosine_PR=tables[0],
        sine_PR=tables[1],
        in_place=context.writes_into(index) and writable(x_BTM, True),
        offload=context.offload,
        far=far,
    )


@dataclass(frozen=True)
class _Kind:
    """What the rows of a layer's call follow from, beside its selection.

    Attributes:
        ends: nothing but the rows that carry loss is read behind the layer.
        parts: some of the rows that pass gradient attend locally.
        plans: attention on all keys is planned for vendor kernels.
    """

    ends: bool
    parts: bool
    plans: bool

    def planned(self, queries: RowRange, keys: RowRange) -> Rows:
        """Queries of attention on all keys.

        Of rows that only the device knows, the ends of rectangles travel to the host while norm and maps run.
        """
        return plan_rows(queries, keys) if self.plans else queries


def _both_calls(context: BatchContext, selection: Selection, kind: _Kind) -> tuple[FusedCall, FusedCall]:
    """The call of all layers with this selection, but for what `make_call` adds: where it was planned, and for them.

    Rows that the host knows are planned there, and all that layers need of it goes to the device in one copy: the host
    never waits for the device, which has no part in it. Rows that only the device knows are planned there.
    """
    layout, on_host = context.layout, context.layout.on_host
    chosen = selection.on_host
    if on_host is None or chosen is None:
        call = _shared_call(context, layout, selection, kind)
        return call, call
    planned = _shared_call(context, on_host, chosen, kind)
    if on_host is layout:
        return planned, planned
    shipment = layout.once("shipment", lambda: Shipment(layout))
    shipment.know(selection)
    if kind.ends:
        shipment.know(Selection(None, loss_rows(layout)))
    return planned, shipment.send(planned)


def _shared_call(context: BatchContext, layout: Layout, selection: Selection, kind: _Kind) -> FusedCall:
    """`layout` is the batch's, as the device or the host has it, like the rows of the selection."""
    plan = context.plan
    runs, passes = selection.forward, selection.backward
    runs, passes = runs or _everything(layout), passes or _everything(layout)
    exact = None if selection.forward is selection.backward else passes
    wanted = None
    if kind.ends:
        # Where keys of rows that pass no gradient are constants, rows that do pass some have to be told apart: they
        # run. Else the rows that carry loss are all there is to it.
        wanted = loss_rows(layout) if exact is None or plan.gradient == "keys" else exact
        exact = exact if wanted is exact else None
    whole = runs is None or (plan.kv == "all" and len(runs.skipped_S) > 0)
    frame_rows = None if whole else runs.rows_N
    keys = RowRange.of_batch(layout) if whole else RowRange.of_rows(layout, runs)
    ran, parted = wanted or runs, None
    if kind.parts:
        parted = part_rows(plan, layout, wanted or passes, keys, lambda rows: kind.planned(rows, keys))
        ordered = parted.far_first(wanted or passes)
        ran, exact = (ran, ordered) if wanted is None else (ordered, exact)
    if ran is None or (ran is runs and not whole):
        places, queries = None, keys
    else:
        places = ran.rows_N if whole else inverse(frame_rows, layout.batch * layout.tokens)[ran.rows_N]
        queries = RowRange.of_rows(layout, ran)
        if parted is None or exact is not None:
            queries = kind.planned(queries, keys)
    sides = (places, frame_rows, queries, keys)
    return FusedCall(
        frame_rows=frame_rows,
        keys=keys,
        places_n=places,
        rows_n=frame_rows if places is None else ran.rows_N,
        queries=queries,
        valid_n=None if ran is None else ran.valid_N,
        skipped_s=None if runs is None or wanted is not None else runs.skipped_S,
        bypass=None,
        exact=None if exact is None else _exact_rows((plan, layout), ran, exact, sides, kind, parted),
        mlp=None,
        cosine_PR=None,
        sine_PR=None,
        recompute=context.recompute,
        in_place=False,
        adapters=context.adapters,
        parted=parted,
    )


def _exact_rows(
    batch: tuple[Plan, Layout],
    ran: RowSet | None,
    passes: RowSet,
    sides: tuple,
    kind: _Kind,
    parted: PartedRows | None,
) -> ExactRows:
    """`sides`: places in the frame and flat rows of it, who runs and who offers keys."""
    plan, layout = batch
    places, frame_rows, queries, keys = sides
    size = layout.batch * layout.tokens
    if ran is passes:
        ran_n = torch.arange(passes.capacity, device=passes.rows_N.device)
    else:
        ran_n = passes.rows_N if ran is None else inverse(ran.rows_N, size)[passes.rows_N]
        places = passes.rows_N if frame_rows is None else ran_n
    span = RowRange.of_rows(layout, passes)
    if plan.gradient == "keys" and parted is None:
        span = kind.planned(span, keys)
    local = None
    if ran is not passes and attends_locally(plan, layout):
        if parted is None:
            wide = (WideRows(span if plan.gradient == "keys" else kind.planned(span, keys), ran_n),)
        else:
            wide = parted.wide(ran_n)
        whole = queries is keys and (ran is None or ran.capacity == layout.real_rows)
        local = context_rows(plan, layout, (queries, keys), wide, whole)
    pairs, into_keys = (plan.gradient == name for name in ("pairs", "keys"))
    return ExactRows(places, ran_n, passes.rows_N, span, passes.valid_N, pairs, into_keys, local)


def _attending(call: FusedCall) -> Rows:
    """The rows whose attention on all keys passes gradient."""
    if call.parted is not None:
        return call.parted.far
    return call.queries if call.exact is None else call.exact.range


def _has_vendor(x_BTM: Tensor) -> bool:
    return x_BTM.is_cuda and x_BTM.dtype in (torch.bfloat16, torch.float16)


def _everything(layout: Layout) -> RowSet | None:
    """All rows of all documents; None when they are the whole stream."""
    return None if layout.real_rows == layout.batch * layout.tokens else all_rows(layout)


def _rope(kwargs: Mapping[str, Any], x_BTM: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Cosines and sines by row: (P, R), P = T where all sequences share them."""
    tables = kwargs.get("position_embeddings")
    if tables is None:
        return None, None
    cosine, sine = (t.reshape(-1, t.shape[-1]) for t in tables)
    assert len(cosine) in (x_BTM.shape[1], x_BTM.shape[0] * x_BTM.shape[1])
    return cosine, sine
