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
