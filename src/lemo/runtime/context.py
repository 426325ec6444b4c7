"""Which rows of exact forward attend locally: those that pass no gradient, under a plan's `context_window`."""

from __future__ import annotations

from torch import Tensor

from lemo.core.layout import Layout
from lemo.core.plan import Plan
from lemo.core.selection import RowSet
from lemo.ops import attend_local, plan_local, write_rows_
from lemo.ops.attend_local.plan import LocalRows
from lemo.ops.attend_rows.reference import Rows
from lemo.runtime.rows import ContextRows


def attends_locally(plan: Plan, layout: Layout) -> bool:
    """Whether the plan's window takes any key from any row: the second chunk of a document still sees all."""
    window = plan.context_window
    return window is not None and any(length > 2 * window for length in layout.document_length_D.tolist())


def context_rows(
    plan: Plan, layout: Layout, sides: tuple[Rows, Rows], passes: tuple[RowSet, Rows, Tensor], whole: bool
) -> ContextRows:
    """The rows of one exact pass that attend locally, where `attends_locally`.

    Args:
        plan: its window and block size.
        layout: of the batch.
        sides: documents and positions of the rows that run, and of the keys.
        passes: the rows that pass gradient, their documents and positions, and their places among those that run.
        whole: all rows of the batch run, and offer keys in the same order.
    """
    window = plan.context_window
    assert window is not None

    def make() -> LocalRows:
        return plan_local(*sides, chunk=window, sink=plan.block_size, whole=whole)

    rows, queries, places_n = passes
    # Packed without padding or not, rows of a whole batch come in the same order: but not at the same entries.
    key = ("local rows", window, len(sides[0].position_N))
    return ContextRows(layout.once(key, make) if whole else make(), queries, places_n, rows.valid_N)


def attend_near(
    query_HND: Tensor, pair: tuple[Tensor, Tensor], context: ContextRows, scaling: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Every row attends locally: output (H, N, D), heads inside rows, and log-sum-exp (H, N)."""
    return attend_local(query_HND, *pair, context.local.windowed(window), scaling=scaling)


def put_far(context: ContextRows, near_HND: Tensor, far_HnD: Tensor) -> Tensor:
    """The output (H, N, D) of all rows, heads inside rows, with what rows with gradient got from all keys put in.

    Writes into `near_HND` itself where its heads lie inside rows.
    """
    near_NO, far_nO = (t.transpose(0, 1).flatten(1).contiguous() for t in (near_HND, far_HnD))
    write_rows_(near_NO, context.places_n, far_nO, valid_n=context.valid_n)
    return near_NO.unflatten(1, (len(near_HND), -1)).transpose(0, 1)
