"""attend_local_backward: gradients of rows that attend locally, for callers with an autograd of their own."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lemo.ops.attend_local import vendor
from lemo.ops.attend_local.op import LocalBackend, choose
from lemo.ops.attend_local.pieces import Sinks
from lemo.ops.attend_local.plan import LocalRows
from lemo.ops.attend_local.reference import attend_local_backward_reference
from lemo.ops.attend_rows import tiling
from lemo.ops.attend_rows.checks import check, check_saved

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
    The queries may be some of those of the forward pass; output and log-sum-exp are those of their rows. They may be of
    a pass to more keys, too: then P_ij are of its softmax, and the keys that are not seen locally are constants.

    Args:
        grad_HND: (H, N, D) gradient of the output; 0 for rows that are not valid.
        query_HND: (H, N, D) floating, any strides.
        key_GKD: (G, K, D) of the same dtype, H a multiple of G.
        value_GKD: (G, K, D).
        output_HND: (H, N, D).
        lse_HN: (H, N) natural log-sum-exp.
        local: documents, positions and the rule, of `plan_local`; a document may be without queries. Kernels want rows
            that are not valid at the end of their document, and the others in order.
        scaling: positive factor of the scores.
        backend: `triton`; `vendor` to have all of it by FlashAttention-2 or, where rows lie scattered, the chunk before
            and the sink; `reference`; or `auto` to take the first of vendor, triton and reference that can run.

    Returns:
        Gradients of query (H, N, D), key and value (G, K, D). Heads inside rows in memory; 0 for rows outside all
        documents and for keys that no query sees.

    Raises:
        BackendError: the backend asked for cannot run; the message says why.
        ValueError: shapes, dtypes, devices or documents do not fit, or `scaling` is not positive.

    Cost:
        14·D·H FLOPs per pair that is seen, and a copy of every sink for each 1,024 queries of its document. `vendor`:
        10·D·H per pair; keys and values are gathered for every run of queries side by side in a chunk (for every chunk
        that has queries, where rows lie scattered), 65,536 at a time. The reference computes all pairs, a run of
        queries at a time. No host synchronisation outside the reference, whichever rows are queries or keys.

    Numerics:
        products of operands in the dtype of the input, sums in fp32 (fp64 for fp64 input). Kernels round gradients once
        more where near keys and sinks meet, `vendor` where runs meet. Repeated runs agree bit for bit, but for
        `vendor`, which adds in no fixed order: deterministic algorithms rule it out.
    """
    check(query_HND, (key_GKD, value_GKD), local.queries, local.keys, (scaling, local.window))
    check_saved(grad_HND, query_HND, output_HND, lse_HN)
    tensors = (grad_HND, query_HND, key_GKD, value_GKD, output_HND, lse_HN)
    with torch.no_grad():
        reason = partial(vendor.why_not_backward, query_HND, local)
        chosen = choose("attend_local_backward", backend, query_HND, reason)
        if chosen == "vendor":
            return _with_vendor(tensors, local, scaling)
        if chosen == "triton":
            return _kernels(tensors, local, scaling)
        found = attend_local_backward_reference(tensors, local, scaling=scaling)
        d_query, d_key, d_value = (tiling.like_rows(t, True).copy_(t) for t in found)
        return d_query, d_key, d_value


def _with_vendor(tensors: tuple[Tensor, ...], local: LocalRows, scaling: float) -> Triple:
    """All of it by the vendor's kernel, or rectangles, from whose sums ours goes on with the rows' own chunks."""
    from lemo.ops.attend_rows import kernel

    if vendor.takes_runs(tensors[1]) and local.runs is not None:
        return vendor.backward_runs(tensors, local.runs, scaling)
    *operands, output, lse = tensors
    lse, own = lse.contiguous(), local.near(1)
    start, *sums = vendor.backward_before((*operands, output, lse), local, scaling)
    d_query, delta = kernel.backward_query(*operands, (output, lse), own.work, scaling, own.window, start=start)
    d_key, d_value = kernel.backward_key(
        *operands, (lse, delta), own.work, scaling, own.window, True, start=(sums[0], sums[1])
    )
    return d_query, d_key.to(operands[2].dtype), d_value.to(operands[3].dtype)


def _kernels(tensors: tuple[Tensor, ...], local: LocalRows, scaling: float) -> Triple:
    """Sinks first for queries, so that the last pass writes all of them; last for keys, of which they are few."""
    from lemo.ops.attend_rows import kernel

    *operands, output, lse = tensors
    lse, near, sinks = lse.contiguous(), local.near(2), local.sinks
    start = None
    if sinks is not None:
        grad, query, *pair = operands
        copied = [grad, query, *(t.transpose(0, 1).index_select(0, sinks.index_K).transpose(0, 1) for t in pair)]
        start, delta = kernel.backward_query(*copied, (output, lse), sinks.work, scaling, local.window)
        start = start.float()
        # In fp32: the copies' gradients are added up.
        zeros = [tiling.like_rows(t, False, torch.float32) for t in copied[2:]]
        sums = kernel.backward_key(
            *copied, (lse, delta), sinks.work, scaling, local.window, True, start=(zeros[0], zeros[1])
        )
    d_query, delta = kernel.backward_query(*operands, (output, lse), near.work, scaling, near.window, start=start)
    pair = kernel.backward_key(*operands, (lse, delta), near.work, scaling, near.window, True)
    if sinks is not None:
        for target, copies in zip(pair, sums, strict=True):
            _add_copies(target, copies, sinks)
    return d_query, *pair


def _add_copies(target_GKD: Tensor, copies_GCD: Tensor, sinks: Sinks) -> None:
    at = 0
    for first, size, copies in sinks.copies:
        found = copies_GCD[:, at : at + size * copies].unflatten(1, (copies, size)).sum(1)
        target_GKD[:, first : first + size] = target_GKD[:, first : first + size] + found
        at += size * copies
