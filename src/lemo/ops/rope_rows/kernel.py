"""Triton kernel of rope_rows_: a program rotates all heads of one row, of one or two states."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lemo.ops.backend import on_device_of, why_no_kernel

# Elements of the padded halves of all heads of a row; more would not stay in registers.
MAX_TILE = 32768


def why_not(states: list[Tensor]) -> str | None:
    """Why the kernel cannot run on these states; None if it can."""
    for state in states:
        if (size := _padded(state.shape[1]) * _padded(state.shape[2])) > 2 * MAX_TILE:
            return f"{state.shape[1]} heads x {state.shape[2]}, padded to {size} elements, exceed {2 * MAX_TILE}"
        if (reason := why_no_kernel(state)) is not None:
            return reason
    return None


def launch(
    states: list[Tensor], cos: Tensor, sin: Tensor, rows: Tensor | None, inverse: bool, interleaved: bool
) -> None:
    """As rope_rows_; states go two by two."""
    count, half = len(states[0]), cos.shape[1] // 2
    if count == 0 or half == 0:
        return
    for at in range(0, len(states), 2):
        first, second = states[at], states[at + 1] if at + 1 < len(states) else None
        heads = first.shape[1], 0 if second is None else second.shape[1]
        with on_device_of(cos):
            _rope_kernel[(count,)](
                first, second, cos, sin, None if rows is None else rows.contiguous(), len(cos),
                first.stride(0), 0 if second is None else second.stride(0),
                FIRST_HEADS=heads[0], FIRST_PADDED=_padded(heads[0]), FIRST_DIM=first.shape[2],
                SECOND_HEADS=heads[1], SECOND_PADDED=_padded(heads[1]),
                SECOND_DIM=0 if second is None else second.shape[2],
                HALF=half, PADDED_HALF=_padded(half), HAS_ROWS=rows is not None, INVERSE=inverse,
                INTERLEAVED=interleaved, num_warps=_warps(max(heads), half),
            )  # fmt: skip


def _padded(size: int) -> int:
    return triton.next_power_of_2(max(size, 1))


def _warps(heads: int, half: int) -> int:
    return min(max(_padded(heads) * _padded(half) // 512, 1), 16)


@triton.jit
def _rotate(
    row_ptr,
    cos_left,
    cos_right,
    sin_left,
    sin_right,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """(x₁, x₂) becomes (x₁·c₁ - x₂·s₁, x₂·c₂ + x₁·s₂) in all heads of a row."""
    head = tl.arange(0, PADDED)
    column = tl.arange(0, PADDED_HALF)
    mask = (head[:, None] < HEADS) & (column[None, :] < HALF)
    if INTERLEAVED:
        left_ptrs = row_ptr + head[:, None] * DIM + 2 * column[None, :]
        right_ptrs = left_ptrs + 1
    else:
        left_ptrs = row_ptr + head[:, None] * DIM + column[None, :]
        right_ptrs = left_ptrs + HALF
    left = tl.load(left_ptrs, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(right_ptrs, mask=mask, other=0.0).to(tl.float32)
    new_left = left * cos_left[None, :] - right * sin_left[None, :]
    new_right = right * cos_right[None, :] + left * sin_right[None, :]
    tl.store(left_ptrs, new_left.to(row_ptr.dtype.element_ty), mask=mask)
    tl.store(right_ptrs, new_right.to(row_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rope_kernel(
    first_ptr,
    second_ptr,
    cos_ptr,
    sin_ptr,
    rows_ptr,
    table,
    first_stride,
    second_stride,
    FIRST_HEADS: tl.constexpr,
    FIRST_PADDED: tl.constexpr,
    FIRST_DIM: tl.constexpr,
    SECOND_HEADS: tl.constexpr,
    SECOND_PADDED: tl.constexpr,
    SECOND_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    INVERSE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = row
    if HAS_ROWS:
        place = tl.load(rows_ptr + row)
    near = (place % table) * (2 * HALF) + tl.arange(0, PADDED_HALF)
    inside = tl.arange(0, PADDED_HALF) < HALF
    cos_left = tl.load(cos_ptr + near, mask=inside, other=0.0).to(tl.float32)
    cos_right = tl.load(cos_ptr + near + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_left = tl.load(sin_ptr + near, mask=inside, other=0.0).to(tl.float32)
    sin_right = tl.load(sin_ptr + near + HALF, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        # The transpose of ((c₁, -s₁), (s₂, c₂)) is ((c₁, s₂), (-s₁, c₂)).
        turned = -sin_left
        sin_left = -sin_right
        sin_right = turned
    _rotate(
        first_ptr + row * first_stride, cos_left, cos_right, sin_left, sin_right,
        FIRST_HEADS, FIRST_PADDED, FIRST_DIM, HALF, PADDED_HALF, INTERLEAVED,
    )  # fmt: skip
    if SECOND_HEADS > 0:
        _rotate(
            second_ptr + row * second_stride, cos_left, cos_right, sin_left, sin_right,
            SECOND_HEADS, SECOND_PADDED, SECOND_DIM, HALF, PADDED_HALF, INTERLEAVED,
        )  # fmt: skip
