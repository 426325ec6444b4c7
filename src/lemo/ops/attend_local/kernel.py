"""Triton kernels of attend_local: two parts of one softmax become one, and copies' gradients one sum."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lemo.ops.backend import on_device_of, padded

Pair = tuple[Tensor, Tensor]
ROWS, WARPS = 32, 4
WIDTH = 2048  # numbers of a row that a program sums


def put_merged(first: Pair, second: Pair, into: Pair) -> None:
    """Writes output and log-sum-exp over the keys of both parts, each with its own softmax.

    Args:
        first: output (B, H, Q, D) and natural log-sum-exp (B, H, Q) over some keys, at least one; any strides.
        second: the same over others.
        into: where both go: (B, H, Q, D) in the dtype of the outputs and (B, H, Q) fp32, any strides.
    """
    batch, heads, rows, head_dim = first[0].shape
    if first[0].numel() == 0:
        return
    outputs, sums = zip(first, second, into, strict=True)
    strides = [stride for t in outputs for stride in t.stride()] + [stride for t in sums for stride in t.stride()]
    with on_device_of(first[0]):
        _merge_kernel[(batch * triton.cdiv(rows, ROWS), heads)](
            *outputs, *sums, *strides, rows, HEAD_DIM=head_dim, PADDED_DIM=padded(head_dim), ROWS=ROWS, num_warps=WARPS
        )


def sum_copies(table_CO: Tensor, order_C: Tensor, first_K: Tensor) -> Tensor:
    """Sum of the rows `order_C[first_K[k]:first_K[k + 1]]` of a table for every key k: (K, O), 0 for none.

    Args:
        table_CO: (C, O) rows, contiguous.
        order_C: (C,) int64 rows of the table, key after key.
        first_K: (K + 1,) int64 where each key's begin; the last is C.

    Returns:
        (K, O) in the dtype of the table, summed in fp32 in the order of `order_C`.
    """
    keys, width = len(first_K) - 1, table_CO.shape[1]
    found = table_CO.new_empty(keys, width)
    if found.numel() == 0:
        return found
    size = min(WIDTH, triton.next_power_of_2(width))
    with on_device_of(table_CO):
        _sum_kernel[(keys, triton.cdiv(width, size))](
            table_CO, order_C, first_K, found, width, WIDTH=size, num_warps=WARPS
        )
    return found


@triton.jit
def _sum_kernel(table_ptr, order_ptr, first_ptr, found_ptr, width, WIDTH: tl.constexpr):
    key = tl.cast(tl.program_id(0), tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for at in range(tl.load(first_ptr + key), tl.load(first_ptr + key + 1)):
        row = tl.load(order_ptr + at)
        total += tl.load(table_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(found_ptr + key * width + column, total.to(found_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _merge_kernel(
    first_ptr, second_ptr, into_ptr, first_sum_ptr, second_sum_ptr, into_sum_ptr,
    first_b, first_h, first_q, first_d, second_b, second_h, second_q, second_d, into_b, into_h, into_q, into_d,
    first_sum_b, first_sum_h, first_sum_q, second_sum_b, second_sum_h, second_sum_q,
    into_sum_b, into_sum_h, into_sum_q, rows,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(rows, ROWS)
    part = tl.cast(tl.program_id(0) // tiles, tl.int64)
    head = tl.cast(tl.program_id(1), tl.int64)
    row = tl.cast(tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS), tl.int64)
    inside = row < rows
    column = tl.arange(0, PADDED_DIM)
    mask = inside[:, None] & (column < HEAD_DIM)[None, :]

    first_at = part * first_b + head * first_h + row[:, None] * first_q + column[None, :] * first_d
    second_at = part * second_b + head * second_h + row[:, None] * second_q + column[None, :] * second_d
    first = tl.load(first_ptr + first_at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(second_ptr + second_at, mask=mask, other=0.0).to(tl.float32)
    first_sum = tl.load(
        first_sum_ptr + part * first_sum_b + head * first_sum_h + row * first_sum_q, mask=inside, other=0.0
    )
    second_sum = tl.load(
        second_sum_ptr + part * second_sum_b + head * second_sum_h + row * second_sum_q, mask=inside, other=0.0
    )
    top = tl.maximum(first_sum, second_sum)
    first_weight, second_weight = tl.exp(first_sum - top), tl.exp(second_sum - top)
    weight = first_weight + second_weight
    merged = (first * first_weight[:, None] + second * second_weight[:, None]) / weight[:, None]
    into_at = part * into_b + head * into_h + row[:, None] * into_q + column[None, :] * into_d
    tl.store(into_ptr + into_at, merged.to(into_ptr.dtype.element_ty), mask=mask)
    into_sum_at = part * into_sum_b + head * into_sum_h + row * into_sum_q
    tl.store(into_sum_ptr + into_sum_at, top + tl.log(weight), mask=inside)
