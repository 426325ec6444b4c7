"""The `pairs` gradient of exact forward: flash backward of compact q, k, v with the dense output and log-sum-exp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lemo.ops import attend_rows_with_lse
from lemo.ops.attend_rows.reference import Rows
from lemo.runtime.rows import RowRange

_QUERY_CHUNK = 1024


def attend_with_lse(
    query_HND: Tensor, key_GKD: Tensor, value_GKD: Tensor, queries: Rows, keys: Rows, scaling: float
) -> tuple[Tensor, Tensor]:
    """Causal attention by document with its log-sum-exp, without gradient: ((H, N, D), (H, N) fp32 or fp64)."""
    if keys is not queries or queries.valid_N is not None or not _has_flash(query_HND):
        return attend_rows_with_lse(query_HND, key_GKD, value_GKD, queries, keys, scaling=scaling)
    repeat = query_HND.shape[0] // key_GKD.shape[0]
    outputs, lses = [], []
    for start, length in zip(queries.starts, queries.lengths, strict=True):
        piece = slice(start, start + length)
        repeated = (x[:, piece].repeat_interleave(repeat, 0)[None] for x in (key_GKD, value_GKD))
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention(
            query_HND[None, :, piece], *repeated, 0.0, True, False, scale=scaling
        )[:2]
        outputs.append(output[0])
        lses.append(lse[0, :, :length])
    return torch.cat(outputs, dim=1), torch.cat(lses, dim=1)


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

    *Numerics*: scores and sums in fp32 (fp64 for fp64 inputs); the vendor's flash backward on CUDA in half precision.
    """
    return _PairsAttention.apply(query_HND, key_GND, value_GND, output_HND, lse_HN, rows, scaling)


class _PairsAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        output, lse, ctx.rows, ctx.scaling = rest
        ctx.save_for_backward(query, key, value, output, lse)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad_HND: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        groups, repeat = key.shape[0], query.shape[0] // key.shape[0]
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
        for start, length in zip(ctx.rows.starts, ctx.rows.lengths, strict=True):
            piece = slice(start, start + length)
            repeated = (x[:, piece].repeat_interleave(repeat, 0) for x in (key, value))
            inputs = (grad_HND[:, piece], query[:, piece], *repeated, output[:, piece], lse[:, piece])
            if ctx.rows.valid_N is None and _has_flash(query):
                grads = _flash_backward(*inputs, ctx.scaling)
            else:
                grads = _explicit_backward(inputs, ctx.rows, piece, ctx.scaling)
            grad_query[:, piece] = grads[0]
            grad_key[:, piece] = grads[1].unflatten(0, (groups, repeat)).sum(1)
            grad_value[:, piece] = grads[2].unflatten(0, (groups, repeat)).sum(1)
        return grad_query, grad_key, grad_value, None, None, None, None


def _has_flash(query: Tensor) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
    )


def _explicit_backward(inputs: tuple, rows: RowRange, piece: slice, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas of `attend_pairs`, a chunk of queries at a time."""
    grad, query, key, value, output, lse = inputs
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    grad, query, key, value, output = (x.to(wide) for x in (grad, query, key, value, output))
    delta_HN = (grad * output).sum(-1)
    grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
    position_N = rows.position_N[piece]
    for begin in range(0, query.shape[1], _QUERY_CHUNK):
        chunk = slice(begin, min(begin + _QUERY_CHUNK, query.shape[1]))
        distance_QK = position_N[chunk, None] - position_N[None, :]
        seen_QK = distance_QK >= 0
        if rows.valid_N is not None:
            seen_QK &= rows.valid_N[None, piece]
        scores = query[:, chunk] @ key.transpose(1, 2) * scaling
        scores = scores.masked_fill(~(seen_QK | (distance_QK == 0)), -torch.inf)
        weights = torch.exp(scores - lse[:, chunk, None])
        grad_value += weights.transpose(1, 2) @ grad[:, chunk]
        grad_scores = weights * (grad[:, chunk] @ value.transpose(1, 2) - delta_HN[:, chunk, None])
        grad_query[:, chunk] = grad_scores @ key * scaling
        grad_key += grad_scores.transpose(1, 2) @ query[:, chunk] * scaling
    return grad_query, grad_key, grad_value


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The vendor's flash backward, given an output and log-sum-exp that it did not compute itself."""
    # The kernel reads rows of D contiguous numbers and an output laid out like the query.
    grad, query, key, value, output = (x[None].contiguous() for x in (grad, query, key, value, output))
    rows = query.shape[2]
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, output, lse[None].contiguous(), None, None, rows, rows, 0.0, True,
        seed, seed.new_zeros(()), scale=scaling,
    )  # fmt: skip
    return grads[0][0], grads[1][0], grads[2][0]
