"""stream_rows: write_rows_, bypass_rows_ and its gradient, in place on chosen rows of the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

from lemo.ops.backend import Backend, settle_backend
from lemo.ops.checks import check_flags, check_floating, check_like, check_rows, flat_rows
from lemo.ops.stream_rows.reference import (
    bypass_rows_backward_reference,
    bypass_rows_reference,
    write_rows_reference,
)

# Rows that the reference computes at a time: bounds the fp32 copy that the norm needs.
REFERENCE_CHUNK_ROWS = 8192


def write_rows_(
    stream_NM: Tensor,
    rows_n: Tensor,
    values_nM: Tensor,
    *,
    residual_nM: Tensor | None = None,
    valid_n: Tensor | None = None,
    add: bool = False,
    backend: Backend = "auto",
) -> None:
    """stream[rows] = values + residual, or += with `add`, where valid; all other rows stay. No autograd.

    Args:
        stream_NM: (..., M) floating and contiguous; leading dimensions are flattened to rows.
        rows_n: (n,) int64 flat rows, distinct but for entries that are not valid: these may share a row that no valid
            entry names.
        values_nM: (n, M) contiguous, same dtype.
        residual_nM: (n, M) contiguous, same dtype, added; None for nothing.
        valid_n: (n,) bool; None when every row is written.
        add: add to what the rows hold instead of replacing it.
        backend: `triton`, `reference`, or `auto` to take the kernel where it can run.

    Raises:
        BackendError: `triton` was asked for and cannot run; the message says why.
        ValueError: shapes, dtypes or devices do not fit.

    Cost:
        2·n·M elements moved, n·M more with a residual and n·M more with `add`; no atomics.

    Numerics:
        the sum in fp32 (fp64 for fp64), one rounding; of values alone exact.

    Source:
        LeMo section 4 (permutation-free kernels, residual add fused); docs/method.md.
    """
    stream = flat_rows("stream_NM", stream_NM)
    check_rows("rows_n", rows_n, stream)
    shape = (rows_n.shape[0], stream.shape[1])
    check_like("values_nM", values_nM, shape, stream)
    if residual_nM is not None:
        check_like("residual_nM", residual_nM, shape, stream)
    if valid_n is not None:
        check_flags("valid_n", valid_n, rows_n)
    if settle_backend("write_rows_", backend, stream, lambda: _why_not_triton(stream, 0), stream.shape[1]) == "triton":
        from lemo.ops.stream_rows import kernel

        kernel.write(stream, rows_n, values_nM, residual_nM, valid_n, add)
        return
    with torch.no_grad():
        old_nM = stream.index_select(0, rows_n)
        new_nM = write_rows_reference(old_nM, values_nM, residual_nM=residual_nM, valid_n=valid_n, add=add)
        stream.index_copy_(0, rows_n, new_nM)


def bypass_rows_(
    stream_NM: Tensor,
    rows_s: Tensor,
    down_MR: Tensor,
    up_RM: Tensor,
    *,
    eps: float = 1e-6,
    apply_s: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """stream[rows] += rmsnorm(stream[rows])·down·up, in place. No autograd.

    Args:
        stream_NM: (..., M) floating and contiguous; leading dimensions are flattened to rows.
        rows_s: (s,) int64 distinct flat rows.
        down_MR: (M, R) same dtype as the stream.
        up_RM: (R, M) same dtype as the stream.
        eps: added to the mean square of a row.
        apply_s: (s,) bool; rows where it is false stay as they are. None: all of them.
        backend: `triton`, `reference`, or `auto` to take the kernel where it can run.

    Returns:
        (s,) 1/rms of each row, 0 where it was not applied; fp32, or fp64 for fp64. `bypass_rows_backward_` needs it.

    Raises:
        BackendError: `triton` was asked for and cannot run; the message says why.
        ValueError: shapes, dtypes or devices do not fit.

    Cost:
        4·s·M·R FLOPs, 2·s·M elements moved at least; rows are read twice, the second time mostly from cache.

    Numerics:
        rms and sums in fp32 (fp64 for fp64), products of operands in the stream's dtype; the R intermediate numbers of
        a row are rounded to it.

    Source:
        docs/method.md (bypass).
    """
    stream = _check_bypass("stream_NM", stream_NM, rows_s, down_MR, up_RM)
    if apply_s is not None:
        check_flags("apply_s", apply_s, rows_s)
    sizes = down_MR.shape
    if settle_backend("bypass_rows_", backend, stream, lambda: _why_not_triton(stream, sizes[1]), *sizes) == "triton":
        from lemo.ops.stream_rows import kernel

        return kernel.bypass(stream, rows_s, down_MR, up_RM, eps, apply_s)
    rstd_s = stream.new_empty(len(rows_s), dtype=torch.promote_types(stream.dtype, torch.float32))
    with torch.no_grad():
        for at in range(0, len(rows_s), REFERENCE_CHUNK_ROWS):
            part = slice(at, at + REFERENCE_CHUNK_ROWS)
            apply = None if apply_s is None else apply_s[part]
            x = stream.index_select(0, rows_s[part])
            y, rstd_s[part] = bypass_rows_reference(x, down_MR, up_RM, eps=eps, apply_s=apply)
            stream.index_copy_(0, rows_s[part], y)
    return rstd_s


def bypass_rows_backward_(
    grad_NM: Tensor, rows_s: Tensor, rstd_s: Tensor, down_MR: Tensor, up_RM: Tensor, *, backend: Backend = "auto"
) -> None:
    """grad[rows] += rstd·(grad[rows]·upᵀ·downᵀ), in place; rows whose rstd is 0 stay as they are.

    Args:
        grad_NM: (..., M) floating and contiguous gradient of the stream.
        rows_s: (s,) int64 distinct flat rows.
        rstd_s: (s,) as `bypass_rows_` returned it.
        down_MR: (M, R) same dtype as the gradient.
        up_RM: (R, M) same dtype as the gradient.
        backend: as in `bypass_rows_`.

    Raises:
        BackendError: `triton` was asked for and cannot run.
        ValueError: shapes, dtypes or devices do not fit.

    Cost:
        as `bypass_rows_`.

    Numerics:
        as `bypass_rows_`. An approximate gradient: 1/rms is held constant.
    """
    grad = _check_bypass("grad_NM", grad_NM, rows_s, down_MR, up_RM)
    check_floating("rstd_s", rstd_s, rows_s.shape, grad)
    if rstd_s.dtype != torch.promote_types(grad.dtype, torch.float32):
        raise ValueError(f"rstd_s must be what bypass_rows_ returned, got {rstd_s.dtype} for a {grad.dtype} gradient")
    sizes = down_MR.shape
    chosen = settle_backend("bypass_rows_backward_", backend, grad, lambda: _why_not_triton(grad, sizes[1]), *sizes)
    if chosen == "triton":
        from lemo.ops.stream_rows import kernel

        kernel.bypass_backward(grad, rows_s, rstd_s, down_MR, up_RM)
        return
    with torch.no_grad():
        for at in range(0, len(rows_s), REFERENCE_CHUNK_ROWS):
            rows, rstd = rows_s[at : at + REFERENCE_CHUNK_ROWS], rstd_s[at : at + REFERENCE_CHUNK_ROWS]
            grad_sM = bypass_rows_backward_reference(grad.index_select(0, rows), rstd, down_MR, up_RM)
            grad.index_copy_(0, rows, grad_sM)


def _check_bypass(name: str, stream_NM: Tensor, rows: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The flattened stream.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    stream = flat_rows(name, stream_NM)
    check_rows("rows_s", rows, stream)
    if down.ndim != 2:
        raise ValueError(f"down_MR must be (M, R), got {tuple(down.shape)}")
    check_like("down_MR", down, (stream.shape[1], down.shape[1]), stream)
    check_like("up_RM", up, (down.shape[1], stream.shape[1]), stream)
    return stream


def _why_not_triton(stream: Tensor, rank: int) -> str | None:
    try:
        from lemo.ops.stream_rows import kernel
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return kernel.why_not(stream, rank)
