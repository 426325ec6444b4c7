"""Attention of local loss rows in the generic executor: gradient through the keys near them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lemo.ops import attend_forward, attend_local, attend_local_backward
from lemo.ops.attend_local.plan import LocalRows
from lemo.ops.attend_rows.reference import Rows


def attend_local_rows(
    query_HND: Tensor,
    pair: tuple[Tensor, Tensor],
    local: LocalRows,
    scaling: float,
    all_of: tuple[Rows, Rows] | None = None,
) -> Tensor:
    """Attention (H, N, D) of local loss rows, with gradient into queries, and into keys and values near them.

    Args:
        query_HND: (H, N, D).
        pair: keys and values (G, K, D).
        local: documents and positions of both, and the rule.
        scaling: factor of the scores.
        all_of: documents and positions of queries and keys of a forward pass to all keys; None for the near ones.
    """
    return _LocalAttention.apply(query_HND, *pair, local, scaling, all_of)


class _LocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        local: LocalRows,
        scaling: float,
        all_of: tuple[Rows, Rows] | None,
    ) -> Tensor:
        if all_of is None:
            output, lse = attend_local(query, key, value, local, scaling=scaling)
        else:
            output, lse = attend_forward(query, key, value, *all_of, scaling=scaling, window=local.window)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.options = local, scaling
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        local, scaling = ctx.options
        grads = attend_local_backward(grad, *ctx.saved_tensors, local, scaling=scaling)
        return *grads, None, None, None
