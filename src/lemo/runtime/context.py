"""Which rows of exact forward attend locally under a plan's `context_window`.

Those that pass no gradient, and of those that do the *local loss rows*: the batch marks them (`local_rows`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lemo.core.layout import Layout
from lemo.core.plan import Plan
from lemo.core.selection import RowSet
from lemo.errors import ConfigError
from lemo.ops import attend_local, plan_local, write_rows_
from lemo.ops.attend_local.plan import LocalRows
from lemo.ops.attend_rows.reference import Rows
from lemo.ops.backend import send
from lemo.ops.host import repeat, search
from lemo.runtime.rows import ContextRows, PartedRows, RowRange, WideRows


def attends_locally(plan: Plan, layout: Layout) -> bool:
    """Whether the plan's window takes any key from any row: the second chunk of a document still sees all."""
    window = plan.context_window
    return window is not None and layout.longest > 2 * window


def context_rows(
    plan: Plan, layout: Layout, sides: tuple[Rows, Rows], wide: tuple[WideRows, ...], whole: bool
) -> ContextRows:
    """The rows of one exact pass that attend locally, where `attends_locally`.

    Args:
        plan: its window and block size.
        layout: of the batch.
        sides: documents and positions of the rows that run, and of the keys.
        wide: the rows that attend to all keys, which are some of those that run; there may be none.
        whole: all rows of the batch run, and offer keys in the same order.
    """
    window = plan.context_window
    assert window is not None

    def make() -> LocalRows:
        return plan_local(*sides, chunk=window, sink=plan.block_size, whole=whole)

    # Packed without padding or not, rows of a whole batch come in the same order: but not at the same entries.
    key = ("local rows", window, len(sides[0].position_N))
    return ContextRows(layout.once(key, make) if whole else make(), tuple(x for x in wide if len(x.places_n)))


def attend_near(
    query_HND: Tensor, pair: tuple[Tensor, Tensor], context: ContextRows, scaling: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Every row attends locally: output (H, N, D), heads inside rows, and log-sum-exp (H, N)."""
    return attend_local(query_HND, *pair, context.local.windowed(window), scaling=scaling)


def put_wide(wide: WideRows, near_HND: Tensor, far_HnD: Tensor) -> Tensor:
    """The output (H, N, D) of all rows, heads inside rows, with what wide rows got from all keys put in.

    Writes into `near_HND` itself where its heads lie inside rows.
    """
    near_NO, far_nO = (t.transpose(0, 1).flatten(1).contiguous() for t in (near_HND, far_HnD))
    write_rows_(near_NO, wide.places_n, far_nO, valid_n=wide.queries.valid_N)
    return near_NO.unflatten(1, (len(near_HND), -1)).transpose(0, 1)


def check_local_rows(plan: Plan) -> None:
    """Raises ConfigError unless local loss rows can run under the plan."""
    lacking = lacks_for_local_rows(plan)
    if lacking is not None:
        raise ConfigError(f"a batch has local loss rows (LossRows(local_share=...)), which need {lacking}")


def lacks_for_local_rows(plan: Plan) -> str | None:
    """What local loss rows need that the plan does not have; None where they can run."""
    if plan.context_window is None:
        return "a plan with context_window: it says which keys they see"
    if plan.gradient != "keys":
        return f"a plan with gradient 'keys', not {plan.gradient!r}"
    sparse = [layer for layer in plan.layers if not layer.is_dense]
    if not sparse or not all(layer.is_exact for layer in sparse):
        return "exact forward in every layer that is not dense: backward_ratio < forward_ratio"
    return None


def parts_rows(plan: Plan, layout: Layout, index: int) -> bool:
    """Whether some of the rows that pass gradient through layer `index` attend locally there, others to all keys."""
    return layout.local_K is not None and plan.layers[index].is_exact and attends_locally(plan, layout)


def part_rows(
    plan: Plan, layout: Layout, rows: RowSet, keys: Rows, planned: Callable[[RowRange], Rows] | None = None
) -> PartedRows:
    """Rows that pass gradient, parted into local loss rows and far ones, where `parts_rows` says so. Without waiting.

    Args:
        plan: its window and block size.
        layout: of the batch, with local blocks.
        rows: that pass gradient: whole blocks, or the rows that carry loss alone.
        keys: documents and positions of the key rows, all valid.
        planned: makes rows ready for attention on all keys.
    """
    window = plan.context_window
    assert window is not None
    near_N, position_N = _local_rows(layout, rows is loss_rows(layout))
    near = layout.once(("range of local loss rows", near_N.capacity), lambda: RowRange.of_rows(layout, near_N))
    local_K = layout.once("local blocks", lambda: send(layout.local_K.to(torch.uint8), layout.device))
    order_n = torch.argsort(local_K[layout.block_of_row_N[rows.rows_N]], stable=True)
    far_n, near_n = order_n[: rows.capacity - near_N.capacity], order_n[rows.capacity - near_N.capacity :]
    lengths = tuple(a - b for a, b in zip(rows.segment_lengths, near_N.segment_lengths, strict=True))
    valid_N = None if rows.valid_N is None else rows.valid_N[far_n]
    far: Rows = RowRange.of_rows(layout, RowSet(rows.rows_N[far_n], lengths, far_n[:0], valid_N))

    whole = sum(keys.lengths) == layout.real_rows

    def make() -> LocalRows:
        on_host = position_N if whole else None
        return plan_local(near, keys, chunk=window, sink=plan.block_size, position_on_host_N=on_host)

    # As in `context_rows`: all rows of a batch are the same keys in every layer, but not at the same entries.
    key = ("keys of local loss rows", window, near_N.capacity, len(keys.position_N))
    local = layout.once(key, make) if whole else make()
    near_all: Rows | None = near if plan.local_forward == "all" else None
    if planned is not None:
        far = planned(far) if len(far_n) else far
        near_all = None if near_all is None else planned(near)
    return PartedRows(far, far_n, local, near_n, near_all)


def loss_rows(layout: Layout) -> RowSet:
    """The rows that carry loss, and no other row of their blocks."""
    host = layout.on_host
    if host is None or host is layout:
        return layout.once("loss rows", lambda: _row_set(layout, layout.supervised_row_S))
    return layout.once("loss rows", lambda: loss_rows(host).on(layout.device))


def _local_rows(layout: Layout, loss_only: bool) -> tuple[RowSet, Tensor]:
    """Rows of local blocks, or of these those alone that carry loss; and their positions (N,) on the host."""

    def make() -> tuple[RowSet, Tensor]:
        if loss_only:
            loss_S = layout.supervised_row_S
            rows_S = loss_S[layout.local_K[search(layout.block_start_K, loss_S, right=True) - 1]]
        else:
            rows_S = layout.rows_of(layout.local_K)
        found = _row_set(layout, rows_S)
        starts_S = repeat(layout.document_start_D, torch.tensor(found.segment_lengths))
        return found, rows_S - starts_S

    return layout.once(("local loss rows", loss_only), make)


def _row_set(layout: Layout, rows_S: Tensor) -> RowSet:
    """Ascending flat rows of documents, from the host."""
    document_S = search(layout.document_start_D, rows_S, right=True) - 1
    lengths = torch.bincount(document_S, minlength=len(layout.document_start_D))
    rows_N = send(rows_S, layout.device)
    return RowSet(rows_N, tuple(lengths.tolist()), rows_N[:0])
