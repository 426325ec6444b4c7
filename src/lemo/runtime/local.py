"""Attention of local loss rows in the generic executor: to the keys near them, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lemo.ops import attend_local, attend_local_backward
from lemo.ops.attend_local.plan import LocalRows


def attend_local_rows(query_HND: Tensor, pair: tuple[Tensor, Tensor], local: LocalRows, scaling: float) -> Tensor:
    """Attention (H, N, D) of rows that attend locally, with gradient into queries, keys and values.

    Args:
        query_HND: (H, N, D).
        pair: keys and values (G, K, D).
        local: documents and positions of both, and the rule.
        scaling: factor of the scores.
    """
    return _LocalAttention.apply(query_HND, *pair, local, scaling)


class _LocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, local: LocalRows, scaling: float) -> Tensor:
        output, lse = attend_local(query, key, value, local, scaling=scaling)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.options = local, scaling
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        local, scaling = ctx.options
        grads = attend_local_backward(grad, *ctx.saved_tensors, local, scaling=scaling)
        return *grads, None, None
