"""attend_forward and attend_backward: the two passes of attend_rows, for callers with an autograd of their own."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lemo.ops.attend_rows import tiling
from lemo.ops.attend_rows.checks import Options, check, why_not_triton
from lemo.ops.attend_rows.reference import Rows, Segments, attend_backward_reference, attend_rows_reference
from lemo.ops.backend import choose_backend

ExplicitBackend = Literal["auto", "triton", "reference"]
Pair = tuple[Tensor, Tensor]


def attend_forward(
    query_HND: Tensor,
    key_GKD: Tensor,
    value_GKD: Tensor,
    queries: Rows,
    keys: Rows,
    *,
    scaling: float,
    window: int | None = None,
    backend: ExplicitBackend = "auto",
) -> tuple[Tensor, Tensor]:
    """o_i = Σ_j softmax_j(scaling · q_i·k_j) v_j and the log-sum-exp of i's scores; what i sees is as in `attend_rows`.

    `keys is queries`, the same object: compact causal attention of the kept rows. Then rows that are not valid lie at
    the end of their document, nobody else sees them, and their own output is unspecified (finite).

    Args:
        query_HND: (H, N, D) floating, any strides.
        key_GKD: (G, K, D) of the same dtype, H a multiple of G.
        value_GKD: (G, K, D).
        queries: documents and positions of the query rows.
        keys: documents and positions of the key rows, among them every query's own; all valid, unless it is `queries`.
        scaling: positive factor of the scores.
        window: keys farther back than this are not seen; None for no window.
        backend: `triton`, `reference`, or `auto` to take the fastest that can run.

    Returns:
        Output (H, N, D) in the dtype of `query_HND`, heads inside rows in memory, so that
        `output.transpose(0, 1).reshape(N, H * D)` is a view; 0 for rows outside all documents. Natural log-sum-exp
        (H, N) in fp32, fp64 for fp64 input. Neither has a gradient.

    Raises:
        BackendError: the backend asked for cannot run; the message says why.
        ValueError: shapes, dtypes, devices or documents do not fit, or `scaling` or `window` is not positive.

    Cost:
        4·D·H FLOPs per pair that is seen. No host synchronisation outside the reference.

    Numerics:
        scores, softmax and sums in fp32 (fp64 for fp64 input).
    """
    options = (scaling, window)
    check(query_HND, (key_GKD, value_GKD), queries, keys, options)
    with torch.no_grad():
        if _choose(backend, query_HND, queries, keys, options) == "reference":
            output_HND, lse_HN = attend_rows_reference(
                query_HND, key_GKD, value_GKD, queries, keys, scaling=scaling, window=window
            )
            return _heads_inside(output_HND), lse_HN
        from lemo.ops.attend_rows import kernel

        work, _ = _work(queries, keys)
        return kernel.forward(query_HND, key_GKD, value_GKD, work, scaling, window)


def attend_backward(
    grad_HND: Tensor,
    query_HND: Tensor,
    key_GKD: Tensor,
    value_GKD: Tensor,
    output_HND: Tensor,
    lse_HN: Tensor,
    queries: Rows,
    keys: Rows,
    *,
    scaling: float,
    window: int | None = None,
    own: Pair | None = None,
    backend: ExplicitBackend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_forward`, given its output and log-sum-exp, or those of a wider pass.

    With P_ij = exp(scaling · q_i·k_j - lse_i) over the keys j that i sees, and Δ_i = do_i·o_i:
    dv_j = Σ_i P_ij do_i, dS_ij = P_ij (do_i·v_j - Δ_i), dq_i = scaling Σ_j dS_ij k_j, dk_j = scaling Σ_i dS_ij q_i.
    Output and log-sum-exp of a pass over more keys (`keys is queries`, with the dense pass's rows) give the `pairs`
    gradient: scores of keys that are not here are constants. With `own`, all keys are constants but the queries' own
    rows: the `rows` gradient of exact forward.

    Args:
        grad_HND: (H, N, D) gradient of the output; 0 for rows that are not valid.
        query_HND: (H, N, D) as in the forward pass, like the arguments not named here.
        key_GKD: (G, K, D).
        value_GKD: (G, K, D).
        output_HND: (H, N, D).
        lse_HN: (H, N) natural log-sum-exp.
        queries: documents and positions of the query rows.
        keys: documents and positions of the key rows.
        scaling: factor of the scores.
        window: keys farther back than this are not seen.
        own: keys and values (G, N, D) of the query rows.
        backend: as in `attend_forward`.

    Returns:
        Gradients of query (H, N, D), key and value: (G, K, D), or (G, N, D) with `own`. Heads inside rows in memory; 0
        for rows outside all documents.

    Raises:
        BackendError: the backend asked for cannot run; the message says why.
        ValueError: shapes, dtypes, devices or documents do not fit.

    Cost:
        10·D·H FLOPs per pair that is seen, 14 by the Triton kernels, which compute scores once for queries and once
        for keys; with `own` 6 per pair and 8 per pair of queries.

    Numerics:
        products of operands in the dtype of the input, sums in fp32 (fp64 for fp64 input).
    """
    options = (scaling, window)
    check(query_HND, (key_GKD, value_GKD), queries, keys, options)
    if own is not None:
        check(query_HND, own, queries, queries, options)
    if grad_HND.shape != query_HND.shape or output_HND.shape != query_HND.shape:
        raise ValueError(
            f"gradient {tuple(grad_HND.shape)} and output {tuple(output_HND.shape)} must have the query's shape "
            f"{tuple(query_HND.shape)}"
        )
    if lse_HN.shape != query_HND.shape[:2]:
        raise ValueError(f"log-sum-exp must be {tuple(query_HND.shape[:2])}, got {tuple(lse_HN.shape)}")
    tensors = (grad_HND, query_HND, key_GKD, value_GKD, output_HND, lse_HN)
    with torch.no_grad():
        if _choose(backend, query_HND, queries, keys, options) == "reference":
            found = attend_backward_reference(tensors, queries, keys, scaling=scaling, window=window, own=own)
            return _heads_inside(found[0]), _heads_inside(found[1]), _heads_inside(found[2])
        return _triton_backward(tensors, queries, keys, options, own)


def _choose(backend: ExplicitBackend, query: Tensor, queries: Rows, keys: Rows, options: Options) -> str:
    def reason() -> str | None:
        if queries.valid_N is not None and options[1] is not None:
            return "rows that are not valid have no place in a window"
        return why_not_triton(query, _ordered(keys) if keys is queries else keys)

    return choose_backend("attend_rows", backend, reason)


def _ordered(rows: Rows) -> Rows:
    """The same rows with positions that ascend: rows that are not valid, at their document's end, come after all."""
    if rows.valid_N is None:
        return rows
    position_N = torch.where(rows.valid_N, rows.position_N, torch.iinfo(torch.int32).max)
    return Segments(rows.starts, rows.lengths, position_N)


def _work(queries: Rows, keys: Rows) -> tuple[tiling.Work, Rows]:
    """The work of the kernels, and the queries with ascending positions."""
    ordered = _ordered(queries)
    return tiling.Work.between(ordered, ordered if keys is queries else keys), ordered


def _triton_backward(
    tensors: tuple[Tensor, ...], queries: Rows, keys: Rows, options: Options, own: Pair | None
) -> tuple[Tensor, Tensor, Tensor]:
    from lemo.ops.attend_rows import kernel

    grad, query, key, value, output, lse = tensors
    work, _ = _work(queries, keys)
    d_query, delta = kernel.backward_query(grad, query, key, value, (output, lse.contiguous()), work, *options)
    if own is not None:
        (key, value), work = own, work.with_own()
    return d_query, *kernel.backward_key(grad, query, key, value, (lse.contiguous(), delta), work, *options, True)


def _heads_inside(tensor: Tensor) -> Tensor:
    """The tensor laid out with heads inside rows."""
    return tiling.like_rows(tensor, True).copy_(tensor)
