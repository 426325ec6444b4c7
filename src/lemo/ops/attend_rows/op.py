"""attend_rows: exact causal attention of selected query rows, by original positions, on compact tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lemo.ops.attend_rows import tiling
from lemo.ops.attend_rows.checks import check, why_not_triton
from lemo.ops.attend_rows.reference import Rows, chunks, mask_of, own_among_keys
from lemo.ops.backend import Backend, choose_backend


def attend_rows(
    query_HND: Tensor,
    key_GKD: Tensor,
    value_GKD: Tensor,
    queries: Rows,
    keys: Rows,
    *,
    scaling: float,
    window: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """o_i = Σ_j softmax_j(scaling · q_i·k_j) v_j over the keys j of i's document that i sees.

    i sees j when position_j <= position_i, position_i - position_j < window, and j is valid; it always sees the key at
    its own position. Keys and values that require no gradient get none, and then their backward pass does not run.

    Args:
        query_HND: (H, N, D) floating, any strides.
        key_GKD: (G, K, D) of the same dtype, H a multiple of G; documents in the order of the queries'.
        value_GKD: (G, K, D).
        queries: documents and positions of the query rows. With `valid_N`, positions need not ascend.
        keys: documents and positions of the key rows, among them every query's own. With `valid_N` the kernel cannot
            run.
        scaling: positive factor of the scores.
        window: keys farther back than this are not seen; None for no window.
        backend: `triton`; `reference` for torch's attention with masks, a chunk of queries at a time; or `auto` to take
            the kernel where it can run.

    Returns:
        (H, N, D) in the dtype of `query_HND`; 0 for rows outside all documents.

    Raises:
        BackendError: `triton` was asked for and cannot run; the message says why.
        ValueError: shapes, dtypes, devices or documents do not fit, or `scaling` or `window` is not positive.

    Cost:
        4·D·H FLOPs per pair (i, j) that is seen forward, 14·D·H backward (6 without gradient of keys). The kernel
        stores the output and 4 bytes per query and head, and repeats no keys for the heads of a group. No host
        synchronisation.

    Numerics:
        kernel: scores, softmax and sums in fp32, products of 16-bit operands, tf32 is never used, repeated runs agree
        bit for bit. Exact gradients; no second derivative.

    Source:
        LeMo section 4 (token-wise computation on kept rows); FlashAttention-2; docs/method.md.
    """
    check(query_HND, (key_GKD, value_GKD), queries, keys, (scaling, window))
    chosen = choose_backend("attend_rows", backend, lambda: why_not_triton(query_HND, keys))
    if chosen == "triton":
        return _kernel(query_HND, (key_GKD, value_GKD), (None, None), queries, keys, (scaling, window))[0]
    # Not by way of the log-sum-exp: the reference would need the scores once more for it.
    return _by_document(query_HND, (key_GKD, value_GKD), queries, keys, (scaling, window))


def attend_rows_with_lse(
    query_HND: Tensor,
    key_GKD: Tensor,
    value_GKD: Tensor,
    queries: Rows,
    keys: Rows,
    *,
    scaling: float,
    window: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """As `attend_rows`; also the log-sum-exp of every query's scores.

    Returns:
        Output (H, N, D), and (H, N) fp32 (fp64 for fp64 input) natural log-sum-exp without gradient, 0 for rows
        outside all documents. The reference needs the scores a second time for it.
    """
    check(query_HND, (key_GKD, value_GKD), queries, keys, (scaling, window))
    chosen = choose_backend("attend_rows", backend, lambda: why_not_triton(query_HND, keys))
    if chosen == "triton":
        return _kernel(query_HND, (key_GKD, value_GKD), (None, None), queries, keys, (scaling, window))
    output_HND = _by_document(query_HND, (key_GKD, value_GKD), queries, keys, (scaling, window))
    return output_HND, _log_sum_exp(query_HND.detach(), key_GKD.detach(), queries, keys, (scaling, window))


def attend_rows_constant(
    query_HND: Tensor,
    own: tuple[Tensor, Tensor],
    constant: tuple[Tensor, Tensor],
    queries: Rows,
    keys: Rows,
    *,
    scaling: float,
    window: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """attend_rows whose keys are constants but for the queries' own: the `rows` gradient of exact forward.

    The value is that of `attend_rows(query, *constant, ...)`. The gradient of a query runs over all keys; keys and
    values get a gradient at the N query rows only: their backward pass costs N·N/2 pairs instead of about N·K/2.

    Args:
        query_HND: (H, N, D), as in `attend_rows`, like all arguments not named here.
        own: keys and values (G, N, D) of the query rows.
        constant: keys and values (G, K, D) of all key rows; where they are a query's own, equal to `own`.
        queries: documents and positions of the query rows.
        keys: documents and positions of all key rows; positions ascend.
        scaling: factor of the scores.
        window: keys farther back than this are not seen.
        backend: as in `attend_rows`.

    Returns:
        (H, N, D) in the dtype of `query_HND`.

    Raises:
        BackendError: `triton` was asked for and cannot run.
        ValueError: as `attend_rows`.

    Cost:
        as `attend_rows`; the reference also copies keys and values once.
    """
    check(query_HND, constant, queries, keys, (scaling, window))
    check(query_HND, own, queries, queries, (scaling, window))
    chosen = choose_backend("attend_rows", backend, lambda: why_not_triton(query_HND, keys))
    if chosen == "triton":
        constant = constant[0].detach(), constant[1].detach()
        return _kernel(query_HND, constant, own, queries, keys, (scaling, window))[0]
    merged = own_among_keys(own, constant, queries, keys)
    return _by_document(query_HND, merged, queries, keys, (scaling, window))


def _kernel(
    query: Tensor,
    pair: Sequence[Tensor],
    own: Sequence[Tensor | None],
    queries: Rows,
    keys: Rows,
    options: tuple[float, int | None],
) -> tuple[Tensor, Tensor]:
    """Output, and log-sum-exp without gradient."""
    sides = (queries.starts, queries.lengths, keys.starts, keys.lengths)
    segments = [number for part in sides for number in part]
    positions = queries.position_N.contiguous(), keys.position_N.contiguous()
    return torch.ops.lemo.attend_rows(query, *pair, *own, *positions, segments, *options, queries.valid_N is None)


def _by_document(
    query_HND: Tensor, pair: Sequence[Tensor], queries: Rows, keys: Rows, options: tuple[float, int | None]
) -> Tensor:
    """Torch's attention with masks that exist for a chunk of queries at a time; keys are repeated for their group."""
    scaling, window = options
    repeat = query_HND.shape[0] // pair[0].shape[0]
    repeated = [t.repeat_interleave(repeat, 0) if repeat > 1 else t for t in pair]
    pieces, covered = [], 0
    for rows, columns in chunks(queries, keys):
        # Rows between documents belong to nobody.
        pieces.append(query_HND.new_zeros(len(query_HND), rows.start - covered, query_HND.shape[2]))
        mask_QK = mask_of(queries, keys, rows, columns, window)
        output_1HQD = F.scaled_dot_product_attention(
            query_HND[None, :, rows], *(t[None, :, columns] for t in repeated), attn_mask=mask_QK, scale=scaling
        )
        pieces.append(output_1HQD[0])
        covered = rows.stop
    pieces.append(query_HND.new_zeros(len(query_HND), query_HND.shape[1] - covered, query_HND.shape[2]))
    return torch.cat(pieces, dim=1)


def _log_sum_exp(
    query_HND: Tensor, key_GKD: Tensor, queries: Rows, keys: Rows, options: tuple[float, int | None]
) -> Tensor:
    scaling, window = options
    wide = torch.promote_types(query_HND.dtype, torch.float32)
    lse_HN = query_HND.new_zeros(query_HND.shape[:2], dtype=wide)
    for rows, columns in chunks(queries, keys):
        query = query_HND[:, rows].to(wide).unflatten(0, (key_GKD.shape[0], -1))
        scores = query @ key_GKD[:, None, columns].to(wide).mT * scaling
        scores = scores.masked_fill(~mask_of(queries, keys, rows, columns, window), -torch.inf)
        lse_HN[:, rows] = torch.logsumexp(scores, -1).flatten(0, 1)
    return lse_HN


def _work(query_position: Tensor, key_position: Tensor, segments: Sequence[int]) -> tiling.Work:
    count = len(segments) // 4
    parts = tuple(tuple(segments[at : at + count]) for at in range(0, 4 * count, count)) if count else ((),) * 4
    return tiling.Work(query_position, key_position, parts)


_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? own_key, Tensor? own_value, Tensor query_position, "
    "Tensor key_position, int[] segments, float scaling, int? window, bool ordered) -> (Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? own_key, Tensor? own_value, Tensor query_position, "
    "Tensor key_position, Tensor output, Tensor lse, int[] segments, float scaling, int? window, bool ordered, "
    "bool grad_key) -> (Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("lemo::attend_rows", mutates_args=(), schema=_SCHEMA)
def _attend_rows(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from lemo.ops.attend_rows import kernel

    *positions, segments, scaling, window, _ = rest[2:]
    return kernel.forward(query, key, value, _work(*positions, segments), scaling, window)


@_attend_rows.register_fake
def _fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return tiling.like_rows(query, True), query.new_empty(query.shape[:2], dtype=torch.float32)


@torch.library.custom_op("lemo::attend_rows_backward", mutates_args=(), schema=_BACKWARD_SCHEMA)
def _attend_rows_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, or of the own keys and values; empty where not asked for."""
    from lemo.ops.attend_rows import kernel

    own_key, own_value, query_position, key_position, output, lse, *options = rest
    segments, scaling, window, ordered, grad_key = options
    work = _work(query_position, key_position, segments)
    d_query, delta = kernel.backward_query(grad, query, key, value, (output, lse), work, scaling, window)
    if not grad_key:
        return d_query, key.new_empty(0), key.new_empty(0)
    if own_key is not None and own_value is not None:
        key, value, work = own_key, own_value, work.with_own()
    pair = kernel.backward_key(grad, query, key, value, (lse, delta), work, scaling, window, ordered)
    return d_query, *pair


@_attend_rows_backward.register_fake
def _backward_fake(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, own_key: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    if not rest[-1]:
        return tiling.like_rows(query, True), key.new_empty(0), key.new_empty(0)
    keys = key if own_key is None else own_key
    return tuple(tiling.like_rows(t, True) for t in (query, keys, keys))


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.options = inputs[7:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    own = ctx.saved_tensors[3] is not None
    wanted = ctx.needs_input_grad
    grad_key = any(wanted[3:5] if own else wanted[1:3])
    found = torch.ops.lemo.attend_rows_backward(grad, *ctx.saved_tensors, *ctx.options, grad_key)
    pair = found[1:] if grad_key else (None, None)
    return (found[0], *((None, None, *pair) if own else (*pair, None, None)), *(None,) * 6)


_attend_rows.register_autograd(_backward, setup_context=_setup_context)
