"""Which far keys attention's backward reads under a plan's `far_share`; attention on them in the generic executor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lemo.core.score import pair_numbers
from lemo.ops import attend_backward, attend_forward, draw_far, plan_far
from lemo.ops.attend_rows import far
from lemo.ops.attend_rows.far import FarKeys
from lemo.ops.attend_rows.reference import Rows

if TYPE_CHECKING:
    from lemo.runtime.batch import BatchContext

Pair = tuple[Tensor, Tensor]


def far_keys(context: BatchContext, index: int, queries: Rows, keys: Rows) -> FarKeys | None:
    """The far keys that one layer's backward reads in this batch; None where it reads all keys.

    Drawn on the host from the plan's seed, the layer, the step and what tells documents apart, so that both engines
    draw alike, and a packed document like the same document alone.

    Args:
        context: the batch.
        index: number of the layer.
        queries: documents and positions of the rows whose attention passes gradient.
        keys: those of the keys.
    """
    share, layout, stripe = context.plan.far_share, context.layout, far.FAR_STRIPE
    if share == 1:
        return None
    lengths = tuple(layout.document_length_D.tolist())
    if not len(queries.position_N) or all(length <= 2 * stripe for length in lengths):
        return None
    documents = lengths if context.document_keys_D is None else context.document_keys_D.tolist()
    drawn = []
    for length, key in zip(lengths, documents, strict=True):
        stripes = -(-length // stripe)
        if stripes < 3:
            drawn.append(torch.zeros(stripes, stripes, dtype=torch.bool))
            continue
        numbers = pair_numbers(stripes, seed=context.plan.seed, layer=index, step=context.step, key=key)
        drawn.append(draw_far(numbers, share))
    return plan_far(queries, keys, drawn, lengths, stripe=stripe)


def attend_far(
    query_HND: Tensor, pair: Pair, constant: Pair | None, sides: tuple[Rows, Rows], found: FarKeys, scaling: float
) -> Tensor:
    """Attention (H, N, D) of rows to all keys, whose gradient reads near keys and the far ones that were drawn.

    Args:
        query_HND: (H, N, D).
        pair: keys and values with gradient: of all key rows, or the queries' own with `constant`.
        constant: keys and values of all key rows, without gradient; None when `pair` holds them.
        sides: documents and positions of queries and keys.
        found: the far keys.
        scaling: factor of the scores.
    """
    return _FarAttention.apply(query_HND, *pair, *(constant or (None, None)), sides, found, scaling)


class _FarAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        constant_key: Tensor | None,
        constant_value: Tensor | None,
        sides: tuple[Rows, Rows],
        found: FarKeys,
        scaling: float,
    ) -> Tensor:
        pair = (key, value) if constant_key is None or constant_value is None else (constant_key, constant_value)
        output, lse = attend_forward(query, *pair, *sides, scaling=scaling)
        ctx.save_for_backward(query, key, value, constant_key, constant_value, output, lse)
        ctx.options = sides, found, scaling
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, constant_key, constant_value, *saved = ctx.saved_tensors
        sides, found, scaling = ctx.options
        pair, own = (key, value), None
        if constant_key is not None:
            pair, own = (constant_key, constant_value), pair
        grads = attend_backward(grad, query, *pair, *saved, *sides, scaling=scaling, own=own, far=found)
        return (*grads, *(None,) * 5)
