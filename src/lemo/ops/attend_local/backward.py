"""attend_local_backward: gradients of rows that attend locally, for callers with an autograd of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from lemo.ops.attend_local.op import LocalBackend
from lemo.ops.attend_local.plan import LocalRows
from lemo.ops.attend_local.reference import attend_local_backward_reference
from lemo.ops.attend_rows import tiling
from lemo.ops.attend_rows.checks import check

Triple = tuple[Tensor, Tensor, Tensor]


def attend_local_backward(
    grad_HND: Tensor,
    query_HND: Tensor,
    key_GKD: Tensor,
    value_GKD: Tensor,
    output_HND: Tensor,
    lse_HN: Tensor,
    local: LocalRows,
    *,
    scaling: float,
    backend: LocalBackend = "auto",
) -> Triple:
    """Gradients of `attend_local`, given its output and log-sum-exp at these queries.

    With P_ij = exp(scaling · q_i·k_j - lse_i) over the keys j that i sees locally, and Δ_i = do_i·o_i:
    dv_j = Σ_i P_ij do_i, dS_ij = P_ij (do_i·v_j - Δ_i), dq_i = scaling Σ_j dS_ij k_j, dk_j = scaling Σ_i dS_ij q_i.
    The queries may be some of those of the forward pass; output and log-sum-exp are those of their rows.

    Args:
        grad_HND: (H, N, D) gradient of the output; 0 for rows that are not valid.
        query_HND: (H, N, D) floating, any strides.
        key_GKD: (G, K, D) of the same dtype, H a multiple of G.
        value_GKD: (G, K, D).
        output_HND: (H, N, D).
        lse_HN: (H, N) natural log-sum-exp.
        local: documents, positions and the rule, of `plan_local`; a document may be without queries.
        scaling: positive factor of the scores.
        backend: as in `attend_local`.

    Returns:
        Gradients of query (H, N, D), key and value (G, K, D). Heads inside rows in memory; 0 for rows outside all
        documents and for keys that no query sees.

    Raises:
        BackendError: the backend asked for cannot run; the message says why.
        ValueError: shapes, dtypes, devices or documents do not fit, or `scaling` is not positive.
    """
    check(query_HND, (key_GKD, value_GKD), local.queries, local.keys, (scaling, local.window))
    if grad_HND.shape != query_HND.shape or output_HND.shape != query_HND.shape:
        raise ValueError(
            f"gradient {tuple(grad_HND.shape)} and output {tuple(output_HND.shape)} must have the query's shape "
            f"{tuple(query_HND.shape)}"
        )
    if lse_HN.shape != query_HND.shape[:2]:
        raise ValueError(f"log-sum-exp must be {tuple(query_HND.shape[:2])}, got {tuple(lse_HN.shape)}")
    tensors = (grad_HND, query_HND, key_GKD, value_GKD, output_HND, lse_HN)
    with torch.no_grad():
        found = attend_local_backward_reference(tensors, local, scaling=scaling)
        d_query, d_key, d_value = (tiling.like_rows(t, True).copy_(t) for t in found)
        return d_query, d_key, d_value
