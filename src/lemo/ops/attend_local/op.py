"""attend_local: attention of rows to the keys of their own chunk, of the chunk before and of the document's start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lemo.ops.attend_local import vendor
from lemo.ops.attend_local.plan import LocalRows
from lemo.ops.attend_local.reference import attend_local_reference
from lemo.ops.attend_rows import tiling
from lemo.ops.attend_rows.checks import check
from lemo.ops.attend_rows.stripes import ordered
from lemo.ops.backend import choose_with_vendor

LocalBackend = Literal["auto", "vendor", "triton", "reference"]
Pair = tuple[Tensor, Tensor]


def attend_local(
    query_HND: Tensor,
    key_GKD: Tensor,
    value_GKD: Tensor,
    local: LocalRows,
    *,
    scaling: float,
    backend: LocalBackend = "auto",
) -> tuple[Tensor, Tensor]:
    """o_i = Σ_j softmax_j(scaling · q_i·k_j) v_j over the keys j that i sees locally, and the scores' log-sum-exp.

    i sees j of its document when position_j <= position_i and j is in the chunk of i, in the chunk before it, or among
    the document's first `sink` rows (`plan_local`); a window takes keys farther back out. Autograd gets no gradient:
    `attend_local_backward` is the other pass.

    Args:
        query_HND: (H, N, D) floating, any strides.
        key_GKD: (G, K, D) of the same dtype, H a multiple of G.
        value_GKD: (G, K, D).
        local: documents, positions and the rule, of `plan_local`.
        scaling: positive factor of the scores.
        backend: `triton`; `vendor` to have whole chunks and those before them by cuDNN or FlashAttention-2 and the rest
            by the kernel; `reference`; or `auto` to take the first of vendor, triton and reference that can run.

    Returns:
        Output (H, N, D) in the dtype of `query_HND`, heads inside rows in memory, 0 for rows outside all documents; and
        (H, N) fp32 (fp64 for fp64 input) natural log-sum-exp. Rows that are not valid get something finite.

    Raises:
        BackendError: the backend asked for cannot run; the message says why.
        ValueError: shapes, dtypes, devices or documents do not fit, or `scaling` is not positive.

    Cost:
        4·D·H FLOPs per pair that is seen: at most 2·chunk + sink keys a row. The reference computes all pairs, a run
        of queries at a time. No host synchronisation outside the reference.

    Numerics:
        scores, softmax and sums in fp32 (fp64 for fp64 input); kernels round the output once more where they meet.
        Repeated runs agree bit for bit.
    """
    check(query_HND, (key_GKD, value_GKD), local.queries, local.keys, (scaling, local.window))
    with torch.no_grad():
        chosen = choose("attend_local", backend, query_HND, lambda: vendor.why_not(query_HND, local))
        if chosen == "reference":
            output_HND, lse_HN = attend_local_reference(query_HND, key_GKD, value_GKD, local, scaling=scaling)
            return tiling.like_rows(output_HND, True).copy_(output_HND), lse_HN
        return _kernels(query_HND, (key_GKD, value_GKD), local, scaling, chosen == "vendor")


def choose(op: str, backend: LocalBackend, query: Tensor, why_not_vendor: Callable[[], str | None]) -> str:
    """`vendor`, `triton` or `reference`; the vendor's kernels leave a part to ours."""
    return choose_with_vendor(
        op, backend, lambda: why_not_vendor() or why_not_triton(query), lambda: why_not_triton(query)
    )


def why_not_triton(query: Tensor) -> str | None:
    """Why the Triton kernels cannot run on this input; None if they can."""
    try:
        from lemo.ops.attend_rows import kernel  # noqa: F401 - imports triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return tiling.why_not(query)


def _kernels(query: Tensor, pair: Pair, local: LocalRows, scaling: float, with_vendor: bool) -> Pair:
    """Near keys, then the sink's: a row always sees itself, so the second pass starts from something."""
    from lemo.ops.attend_rows import kernel

    rising = ordered(local.queries)
    work = tiling.Work.between(rising, rising if local.keys is local.queries else ordered(local.keys))
    near, sink = local.seen_4N[:2], local.seen_4N[2:]
    start, left = None, work
    if with_vendor:
        batched = vendor.batched_kernel(query.dtype, query.shape[2], query.device)
        assert batched is not None
        start = vendor.forward_near(query, pair, local, scaling, batched)
        left = replace(work, segments=_behind_whole_chunks(work.segments, local.chunk))
    # Any window makes the kernel heed where near keys begin.
    found = start
    if found is None or sum(left.segments[1]):
        found = kernel.forward(query, *pair, left, scaling, 1, seen=near, start=start)
    if local.sink and local.reaches_far:
        found = kernel.forward(query, *pair, work, scaling, 1, seen=sink, start=found)
    return found


def _behind_whole_chunks(segments: tuple[tuple[int, ...], ...], chunk: int) -> tuple[tuple[int, ...], ...]:
    """Documents' rows behind their last whole chunk, and all their keys."""
    starts, lengths, *keys = segments
    rests = tuple(length % chunk for length in lengths)
    return (tuple(a + n - rest for a, n, rest in zip(starts, lengths, rests, strict=True)), rests, *keys)
