"""Plain torch specification of attend_local."""

from __future__ import annotations

import torch
from torch import Tensor

from lemo.ops.attend_local.plan import LocalRows
from lemo.ops.attend_rows.reference import chunks, mask_of


def local_mask(local: LocalRows, rows: slice, columns: slice) -> Tensor:
    """(Q, K) bool: which keys a query sees; rows and columns of one document."""
    seen_QK = mask_of(local.queries, local.keys, rows, columns, local.window)
    position_Q1, position_1K = local.queries.position_N[rows, None], local.keys.position_N[None, columns]
    near_QK = position_1K // local.chunk >= position_Q1 // local.chunk - 1
    return seen_QK & (near_QK | (position_1K < local.sink))


def attend_local_reference(
    query_HND: Tensor, key_GKD: Tensor, value_GKD: Tensor, local: LocalRows, *, scaling: float
) -> tuple[Tensor, Tensor]:
    """Output (H, N, D) and log-sum-exp (H, N); see `lemo.ops.attend_local` for the contract."""
    wide = torch.promote_types(query_HND.dtype, torch.float32)
    groups = key_GKD.shape[0]
    output_HND = query_HND.new_zeros(query_HND.shape)
    lse_HN = query_HND.new_zeros(query_HND.shape[:2], dtype=wide)
    for rows, columns in chunks(local.queries, local.keys):
        query = query_HND[:, rows].to(wide).unflatten(0, (groups, -1))
        key, value = (t[:, None, columns].to(wide) for t in (key_GKD, value_GKD))
        scores = query @ key.mT * scaling
        scores = scores.masked_fill(~local_mask(local, rows, columns), -torch.inf)
        output_HND[:, rows] = (torch.softmax(scores, -1) @ value).flatten(0, 1).to(query_HND.dtype)
        lse_HN[:, rows] = torch.logsumexp(scores, -1).flatten(0, 1)
    return output_HND, lse_HN


def attend_local_backward_reference(
    operands: tuple[Tensor, ...], local: LocalRows, *, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (H, N, D), (G, K, D), (G, K, D); see `lemo.ops.attend_local_backward` for the contract.

    Args:
        operands: gradient, query, key, value, output and log-sum-exp.
        local: documents, positions and the rule.
        scaling: factor of the scores.
    """
    grad_HND, query_HND, key_GKD, value_GKD, output_HND, lse_HN = operands
    wide = torch.promote_types(query_HND.dtype, torch.float32)
    groups = key_GKD.shape[0]
    d_query, d_key, d_value = (torch.zeros_like(t, dtype=wide) for t in (query_HND, key_GKD, value_GKD))
    for rows, columns in chunks(local.queries, local.keys):
        parts = (t[:, rows].to(wide).unflatten(0, (groups, -1)) for t in (grad_HND, query_HND, output_HND))
        grad, query, output = parts
        lse = lse_HN[:, rows, None].to(wide).unflatten(0, (groups, -1))
        key, value = (t[:, None, columns].to(wide) for t in (key_GKD, value_GKD))
        seen = local_mask(local, rows, columns)
        # Masked before the exponential: scores of keys that are not seen may exceed the log-sum-exp without bound.
        weight = torch.exp((query @ key.mT * scaling - lse).masked_fill(~seen, -torch.inf))
        d_value[:, columns] += (weight.mT @ grad).sum(1)
        d_score = weight * (grad @ value.mT - (grad * output).sum(-1, keepdim=True)) * scaling
        d_query[:, rows] = (d_score @ key).flatten(0, 1)
        d_key[:, columns] += (d_score.mT @ query).sum(1)
    return d_query.to(query_HND.dtype), d_key.to(query_HND.dtype), d_value.to(query_HND.dtype)
