"""attend_forward and attend_backward: the two passes of attend_rows, for callers with an autograd of their own."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lemo.ops.attend_rows import far_stripes, stripes, tiling, vendor
from lemo.ops.attend_rows.checks import Options, check, check_saved, why_not_triton
from lemo.ops.attend_rows.far import FarKeys
from lemo.ops.attend_rows.reference import Rows, attend_backward_reference, attend_rows_reference
from lemo.ops.backend import choose_with_vendor

ExplicitBackend = Literal["auto", "vendor", "triton", "reference"]
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
        backend: `vendor` for cuDNN or FlashAttention-2 through torch; `triton`; `reference`; or `auto` to take the
            first of them that can run. On all keys, `auto` takes vendor kernels only for rows from `plan_rows`; others
            are planned when `vendor` is asked for.

    Returns:
        Output (H, N, D) in the dtype of `query_HND`, heads inside rows in memory, so that
        `output.transpose(0, 1).reshape(N, H * D)` is a view; 0 for rows outside all documents. Natural log-sum-exp
        (H, N) in fp32, fp64 for fp64 input. Neither has a gradient.

    Raises:
        BackendError: the backend asked for cannot run; the message says why.
        ValueError: shapes, dtypes, devices or documents do not fit, or `scaling` or `window` is not positive.

    Cost:
        4·D·H FLOPs per pair that is seen. No host synchronisation outside the reference, but by vendor kernels on all
        keys of rows that the host does not know: it waits until the device has come past `plan_rows`.

    Numerics:
        scores, softmax and sums in fp32 (fp64 for fp64 input). On all keys `vendor` rounds the output once more, where
        the kernels meet. Repeated runs agree bit for bit.
    """
    options = (scaling, window)
    check(query_HND, (key_GKD, value_GKD), queries, keys, options)
    with torch.no_grad():
        chosen = _choose(backend, query_HND, queries, keys, options)
        if chosen == "vendor":
            return _vendor_forward(query_HND, (key_GKD, value_GKD), queries, keys, scaling)
        if chosen == "reference":
            output_HND, lse_HN = attend_rows_reference(
                query_HND, key_GKD, value_GKD, queries, keys, scaling=scaling, window=window
            )
            return _heads_inside(output_HND), lse_HN
        from lemo.ops.attend_rows import kernel

        return kernel.forward(query_HND, key_GKD, value_GKD, _work(queries, keys), scaling, window)


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
    far: FarKeys | None = None,
    start: Pair | None = None,
    backend: ExplicitBackend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_forward`, given its output and log-sum-exp, or those of a wider pass.

    With P_ij = exp(scaling · q_i·k_j - lse_i) over the keys j that i sees, and Δ_i = do_i·o_i:
    dv_j = Σ_i P_ij do_i, dS_ij = P_ij (do_i·v_j - Δ_i), dq_i = scaling Σ_j dS_ij k_j, dk_j = scaling Σ_i dS_ij q_i.
    Output and log-sum-exp of a pass over more keys (`keys is queries`, with the dense pass's rows) give the `pairs`
    gradient: scores of keys that are not here are constants. With `own`, all keys are constants but the queries' own
    rows: the `rows` gradient of exact forward. With `far`, of keys two stripes back or more only those that were drawn
    count, as often as makes up for the others: the expectation over draws is the gradient without `far`. Gradients of
    `own` rows are exact then too.

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
        far: which far keys count, from `plan_far` for these queries and keys; None for all.
        start: gradients of key and value through other queries, (G, K, D), to which these are added, in place: what is
            returned. Not with `own`.
        backend: as in `attend_forward`.

    Returns:
        Gradients of query (H, N, D), key and value: (G, K, D), or (G, N, D) with `own`. Heads inside rows in memory; 0
        for rows outside all documents.

    Raises:
        BackendError: the backend asked for cannot run; the message says why.
        ValueError: shapes, dtypes, devices or documents do not fit; `far` with a window or among the queries; `start`
            with `own`.

    Cost:
        10·D·H FLOPs per pair that is seen and counts, 14 by the Triton kernels, which compute scores once for queries
        and once for keys; with `own` 6 per pair and 8 per pair of queries. With `far`, keys and values are copied for
        every stripe of queries that reads them, 65,536 at a time, and the host waits until the device has come past
        `plan_far`.

    Numerics:
        products of operands in the dtype of the input, sums in fp32 (fp64 for fp64 input). `vendor` adds in no fixed
        order: repeated runs differ in the last bits, and deterministic algorithms rule it out.
    """
    options = (scaling, window)
    check(query_HND, (key_GKD, value_GKD), queries, keys, options)
    if own is not None:
        check(query_HND, own, queries, queries, options)
    check_saved(grad_HND, query_HND, output_HND, lse_HN)
    tensors = (grad_HND, query_HND, key_GKD, value_GKD, output_HND, lse_HN)
    if start is not None and (own is not None or any(t.shape != key_GKD.shape for t in start)):
        raise ValueError("start needs gradients of key and value in their shapes, and no own keys")
    with torch.no_grad():
        if start is None:
            return _backward(tensors, (queries, keys), options, own, far, backend)
        if far is None and keys is not queries and _choose(backend, query_HND, queries, keys, options) == "vendor":
            work, marks, dense = _rectangles(query_HND, queries, keys)
            return stripes.backward(tensors, work, marks, scaling, dense, start)
        d_query_HND, *found = _backward(tensors, (queries, keys), options, own, far, backend)
        return d_query_HND, start[0].add_(found[0]), start[1].add_(found[1])


def _backward(
    tensors: tuple[Tensor, ...],
    sides: tuple[Rows, Rows],
    options: Options,
    own: Pair | None,
    far: FarKeys | None,
    backend: ExplicitBackend,
) -> tuple[Tensor, Tensor, Tensor]:
    (queries, keys), (scaling, window) = sides, options
    if far is not None:
        return _far_backward(tensors, sides, options, own, far, backend)
    chosen = _choose(backend, tensors[1], queries, keys, options)
    if chosen == "vendor":
        return _vendor_backward(tensors, queries, keys, scaling, own)
    if chosen == "reference":
        found = attend_backward_reference(tensors, queries, keys, scaling=scaling, window=window, own=own)
        return _heads_inside(found[0]), _heads_inside(found[1]), _heads_inside(found[2])
    return _triton_backward(tensors, queries, keys, options, own)


def _choose(backend: ExplicitBackend, query: Tensor, queries: Rows, keys: Rows, options: Options) -> str:
    return choose_with_vendor(
        "attend_rows",
        backend,
        lambda: _why_not_vendor(query, queries, keys, options, backend == "auto"),
        lambda: _why_not_kernel(query, queries, keys, options),
    )


def _why_not_kernel(query: Tensor, queries: Rows, keys: Rows, options: Options) -> str | None:
    if queries.valid_N is not None and options[1] is not None:
        return "rows that are not valid have no place in a window"
    return why_not_triton(query, stripes.ordered(keys) if keys is queries else keys)


def _why_not_vendor(query: Tensor, queries: Rows, keys: Rows, options: Options, auto: bool) -> str | None:
    reason = vendor.why_not(query, options[1])
    if reason is not None:
        return reason
    if keys is queries:
        return vendor.refuses(query, queries)
    if auto and _marks(queries) is None:
        return "its rectangles are not planned, see plan_rows"
    return _why_not_kernel(query, queries, keys, options)


def _marks(queries: Rows) -> stripes.Marks | None:
    return getattr(queries, "marks", None)


def _work(queries: Rows, keys: Rows) -> tiling.Work:
    rising = stripes.ordered(queries)
    return tiling.Work.between(rising, rising if keys is queries else keys)


def _rectangles(query: Tensor, queries: Rows, keys: Rows) -> tuple[tiling.Work, stripes.Marks, vendor.Dense]:
    """Work, marks, made now for rows that are not planned, and the dense kernel."""
    marks = _marks(queries) or stripes.plan_rows(queries, keys).marks
    assert marks is not None
    return _work(queries, keys), marks, vendor.dense_kernels(query.dtype, query.shape[2], query.device)[0]


def _vendor_forward(query: Tensor, pair: Pair, queries: Rows, keys: Rows, scaling: float) -> Pair:
    if keys is queries:
        return vendor.causal_forward(query, pair, queries, scaling)
    work, marks, dense = _rectangles(query, queries, keys)
    return stripes.forward(query, pair, work, marks, scaling, dense)


def _vendor_backward(
    tensors: tuple[Tensor, ...], queries: Rows, keys: Rows, scaling: float, own: Pair | None
) -> tuple[Tensor, Tensor, Tensor]:
    grad, query, key, value, output, lse = tensors
    if keys is queries:
        return vendor.causal_backward((grad, query, *(own or (key, value)), output, lse), queries, scaling)
    if own is None:
        work, marks, dense = _rectangles(query, queries, keys)
        return stripes.backward(tensors, work, marks, scaling, dense)
    from lemo.ops.attend_rows import kernel

    work = _work(queries, keys)
    d_query, _ = kernel.backward_query(grad, query, key, value, (output, lse.contiguous()), work, scaling, None)
    if vendor.refuses(query, queries) is None:
        among_own = vendor.causal_backward((grad, query, *own, output, lse), queries, scaling)
        return d_query, among_own[1], among_own[2]
    return _triton_backward(tensors, queries, keys, (scaling, None), own)


def _triton_backward(
    tensors: tuple[Tensor, ...], queries: Rows, keys: Rows, options: Options, own: Pair | None
) -> tuple[Tensor, Tensor, Tensor]:
    from lemo.ops.attend_rows import kernel

    grad, query, key, value, output, lse = tensors
    lse, work = lse.contiguous(), _work(queries, keys)
    d_query, delta = kernel.backward_query(grad, query, key, value, (output, lse), work, *options)
    if own is not None:
        (key, value), work = own, work.with_own()
    return d_query, *kernel.backward_key(grad, query, key, value, (lse, delta), work, *options, True)


def _far_backward(
    tensors: tuple[Tensor, ...],
    sides: tuple[Rows, Rows],
    options: Options,
    own: Pair | None,
    far: FarKeys,
    backend: ExplicitBackend,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, query, _, _, output, lse = tensors
    (queries, keys), (scaling, window) = sides, options
    if keys is queries or window is not None:
        raise ValueError("far keys are drawn for queries among all keys, and without a window")
    chosen = far_stripes.choose(backend, query, keys, far)
    if chosen == "reference":
        found = attend_backward_reference(tensors, queries, keys, scaling=scaling, own=own, far=far)
        return _heads_inside(found[0]), _heads_inside(found[1]), _heads_inside(found[2])
    if own is None:
        return far_stripes.backward(tensors, queries, keys, far, scaling, chosen == "vendor")
    from lemo.ops.attend_rows import kernel

    d_query, delta = far_stripes.backward_query(tensors, queries, keys, far, scaling)
    if chosen == "vendor" and vendor.refuses(query, queries) is None:
        return d_query, *vendor.causal_backward((grad, query, *own, output, lse), queries, scaling)[1:]
    work = _work(queries, keys).with_own()
    return d_query, *kernel.backward_key(grad, query, *own, (lse.contiguous(), delta), work, scaling, None, True)


def _heads_inside(tensor: Tensor) -> Tensor:
    """The tensor laid out with heads inside rows."""
    return tiling.like_rows(tensor, True).copy_(tensor)
