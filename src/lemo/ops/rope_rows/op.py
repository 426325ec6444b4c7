"""rope_rows_: rotary embedding at original positions, in place on the layout of the projections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lemo.ops.backend import Backend, settle_backend
from lemo.ops.checks import check_floating, check_rows, show
from lemo.ops.rope_rows.reference import rope_rows_reference


def rope_rows_(
    state_NHD: Tensor | Sequence[Tensor],
    cos_PR: Tensor,
    sin_PR: Tensor,
    *,
    rows_N: Tensor | None = None,
    inverse: bool = False,
    interleaved: bool = False,
    backend: Backend = "auto",
) -> None:
    """Rotates the first R of D dimensions in place: x·cos + rotate_half(x)·sin. No autograd.

    rotate_half(x) = (-x₂, x₁) for x = (x₁, x₂), the two halves of the R dimensions; with `interleaved` x₁ are the even
    dimensions and x₂ the odd ones, pair i takes column i of the tables.

    Args:
        state_NHD: (N, H, D) floating, heads and dimensions contiguous inside a row, rows at any distance (a slice of a
            fused projection). Or several such tensors with the same N, as queries and keys: two take one launch.
        cos_PR: (P, R) floating, R even, at most D; fp32 or the dtype of the state.
        sin_PR: (P, R), dtype of `cos_PR`.
        rows_N: (N,) int64 original flat rows; row i takes table row rows_N[i] % P. None: i % P.
        inverse: rotate by the transpose, which is the gradient.
        interleaved: pairs are neighbours.
        backend: `triton`, `reference`, or `auto` to take the kernel where it can run.

    Raises:
        BackendError: `triton` was asked for and cannot run; the message says why.
        ValueError: shapes, strides, dtypes or devices do not fit.

    Cost:
        2·N·H·R elements moved; nothing is saved.

    Numerics:
        fp32 (fp64 for fp64), one rounding. The transpose undoes the rotation up to that, and up to a factor that the
        tables may hold (attention scaling of YaRN).
    """
    states = [state_NHD] if isinstance(state_NHD, Tensor) else list(state_NHD)
    _check(states, cos_PR, sin_PR, rows_N)
    sizes = [size for state in states for size in state.shape[1:]]
    if settle_backend("rope_rows_", backend, states[0], lambda: _why_not_triton(states), *sizes) == "triton":
        from lemo.ops.rope_rows import kernel

        kernel.launch(states, cos_PR, sin_PR, rows_N, inverse, interleaved)
        return
    width = cos_PR.shape[1]
    with torch.no_grad():
        for state in states:
            rotated = rope_rows_reference(
                state, cos_PR, sin_PR, rows_N=rows_N, inverse=inverse, interleaved=interleaved
            )
            state[..., :width].copy_(rotated[..., :width])


def _check(states: list[Tensor], cos: Tensor, sin: Tensor, rows: Tensor | None) -> None:
    if not states:
        raise ValueError("no state to rotate")
    if cos.ndim != 2 or cos.shape[1] % 2 or not cos.shape[0] or not cos.is_contiguous() or not sin.is_contiguous():
        raise ValueError(f"cos_PR must be contiguous (P, R) with R even and P > 0, got {show(cos)}")
    check_floating("sin_PR", sin, cos.shape, states[0])
    if cos.dtype != sin.dtype:
        raise ValueError(f"cos_PR is {cos.dtype}, sin_PR {sin.dtype}")
    first = states[0]
    for state in states:
        inner = state.ndim == 3
        if inner:
            (_, heads, width), (_, head_stride, stride) = state.shape, state.stride()
            inner = (stride == 1 or width == 1) and (heads == 1 or head_stride == width)
        if not inner or not state.is_floating_point() or state.shape[2] < cos.shape[1]:
            raise ValueError(
                f"state_NHD must be floating (N, H, D) with D >= {cos.shape[1]} and heads contiguous inside rows, "
                f"got {show(state)}"
            )
        if state.shape[0] != first.shape[0] or state.dtype != first.dtype or state.device != cos.device:
            raise ValueError(f"states and tables must agree in rows, dtype and device, got {show(state)}")
    if rows is not None:
        check_rows("rows_N", rows, states[0])
        if rows.shape[0] != first.shape[0]:
            raise ValueError(f"rows_N has {len(rows)} rows, the states {len(states[0])}")


def _why_not_triton(states: list[Tensor]) -> str | None:
    try:
        from lemo.ops.rope_rows import kernel
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return kernel.why_not(states)
