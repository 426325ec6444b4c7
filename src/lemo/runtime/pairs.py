"""The `pairs` gradient of exact forward: flash backward of compact q, k, v with the dense output and log-sum-exp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lemo.ops import attend_backward
from lemo.runtime.rows import RowRange


def attend_pairs(
    query_HND: Tensor,
    key_GND: Tensor,
    value_GND: Tensor,
    output_HND: Tensor,
    lse_HN: Tensor,
    rows: RowRange,
    scaling: float,
) -> Tensor:
    """Attention whose value is the dense pass's and whose gradient runs through kept pairs only.

    o_i = Σ_j exp(s_ij − lse_i) v_j over *all* keys j; every s_ij and v_j whose j is not a backward row is a constant.
    With P_ij = exp(s_ij − lse_i) over kept j: dV_j = Σ_i P_ij do_i, dS_ij = P_ij (do_i·v_j − do_i·o_i),
    dq_i = Σ_j dS_ij k_j · scaling, dk_j = Σ_i dS_ij q_i · scaling.

    Args:
        query_HND: (H, N, D) queries of the backward rows.
        key_GND: (G, N, D) their keys.
        value_GND: (G, N, D) their values.
        output_HND: (H, N, D) attention output of these rows in the dense pass.
        lse_HN: (H, N) log-sum-exp of these rows over all keys, natural logarithm.
        rows: documents and positions of the backward rows.
        scaling: factor of the scores.

    *Numerics*: those of `attend_backward`.
    """
    return _PairsAttention.apply(query_HND, key_GND, value_GND, output_HND, lse_HN, rows, scaling)


class _PairsAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        output, lse, ctx.rows, ctx.scaling = rest
        ctx.save_for_backward(query, key, value, output, lse)
        return output.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_HND: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        rows = ctx.rows
        grads = attend_backward(grad_HND, query, key, value, output, lse, rows, rows, scaling=ctx.scaling)
        return *grads, None, None, None, None
