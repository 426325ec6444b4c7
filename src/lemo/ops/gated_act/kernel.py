"""Triton kernels of gated_act and its gradient: one pass over memory.

Without adapters contiguous tensors are one long row. With them a program has a tile of rows and columns, to which it
adds the product of both factors.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lemo.ops.backend import interpreting, on_device_of, padded, why_no_kernel
from lemo.ops.gated_act.reference import ACTS, Adapters


def why_not(gate: Tensor) -> str | None:
    """Why the kernels cannot run on this tensor; None if they can."""
    return why_no_kernel(gate)


def forward(gate: Tensor, up: Tensor | None, act: str, adapters: Adapters, out: Tensor) -> None:
    """As gated_act, into `out`."""
    if adapters == (None, None):
        _launch(_forward_kernel, (gate, up, out), ACTS.index(act))
    else:
        _launch_adapted(_adapted_forward_kernel, (gate, up, out), adapters, ACTS.index(act))


def backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    act: str,
    adapters: Adapters,
    out: tuple[Tensor, Tensor | None, Tensor | None],
) -> None:
    """As gated_act_backward, into `out` = (gradient of gate, of up, activation)."""
    if adapters == (None, None):
        _launch(_backward_kernel, (grad, gate, up, *out), ACTS.index(act))
    else:
        _launch_adapted(_adapted_backward_kernel, (grad, gate, up, *out), adapters, ACTS.index(act))


def _launch(kernel: triton.JITFunction, tensors: tuple[Tensor | None, ...], act: int) -> None:
    given = [t for t in tensors if t is not None]
    rows, width = given[0].shape
    if rows == 0 or width == 0:
        return
    if all(t.is_contiguous() for t in given):
        rows, width = 1, rows * width
    strides = [0 if t is None else t.stride(0) for t in tensors]
    block = 64 if interpreting() else 2048
    tiles = triton.cdiv(width, block)
    with on_device_of(given[0]):
        kernel[(rows * tiles,)](*tensors, *strides, width, tiles, ACT=act, BLOCK=block, num_warps=4)


def _launch_adapted(
    kernel: triton.JITFunction, tensors: tuple[Tensor | None, ...], adapters: Adapters, act: int
) -> None:
    first = next(t for t in tensors if t is not None)
    rows, width = first.shape
    if rows == 0 or width == 0:
        return
    factors = [t for adapter in adapters for t in (adapter or (None, None))]
    ranks = [0 if adapter is None else adapter.low_nR.shape[1] for adapter in adapters]
    strides = [0 if t is None else t.stride(0) for t in (*tensors, *factors)]
    block_rows, block = (16, 32) if interpreting() else (64, 64)
    grid = (triton.cdiv(width, block) * triton.cdiv(rows, block_rows),)
    sizes = {"ROWS": block_rows, "BLOCK": block, "PADDED": padded(max(ranks))}
    with on_device_of(first):
        kernel[grid](*tensors, *factors, *strides, rows, width, *ranks, ACT=act, **sizes, num_warps=4)


@triton.jit
def _value_and_slope(x, ACT: tl.constexpr):
    """act(x) and act'(x), acts in the order of ACTS: silu, gelu, its tanh form, relu."""
    if ACT == 3:
        value = tl.maximum(x, 0.0)
        slope = tl.where(x > 0.0, 1.0, 0.0)
    elif ACT == 1:
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * share
        slope = share + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACT == 2:
        # 1 + tanh(u) = 2·sigmoid(2u): no difference of nearly equal numbers.
        share = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        value = x * share
        slope = share + value * (1.0 - share) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    else:
        share = _sigmoid(x)
        value = x * share
        slope = share + value * (1.0 - share)
    return value, slope


@triton.jit
def _sigmoid(x):
    """1/(1 + exp(-x)); 0 and not NaN where exp overflows."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _place(width, tiles, BLOCK: tl.constexpr):
    """Row, columns and mask of a program."""
    row = tl.program_id(0) // tiles
    column = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row.to(tl.int64), column, column < width


@triton.jit
def _forward_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    gate_stride,
    up_stride,
    out_stride,
    width,
    tiles,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, mask = _place(width, tiles, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    value, _ = _value_and_slope(gate, ACT)
    if up_ptr is not None:
        value *= tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + column, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    d_gate_ptr,
    d_up_ptr,
    value_ptr,
    grad_stride,
    gate_stride,
    up_stride,
    d_gate_stride,
    d_up_stride,
    value_stride,
    width,
    tiles,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, mask = _place(width, tiles, BLOCK)
    # Everything is read before anything is written: results may take the place of arguments.
    grad = tl.load(grad_ptr + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    value, slope = _value_and_slope(gate, ACT)
    d_gate = grad * slope
    if up_ptr is not None:
        up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
        d_gate *= up
        d_up = grad * value
        value *= up
        tl.store(d_up_ptr + row * d_up_stride + column, d_up.to(d_up_ptr.dtype.element_ty), mask=mask)
    tl.store(d_gate_ptr + row * d_gate_stride + column, d_gate.to(d_gate_ptr.dtype.element_ty), mask=mask)
    if value_ptr is not None:
        tl.store(value_ptr + row * value_stride + column, value.to(value_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tile(width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows and columns of a program: tiles of the same rows run side by side."""
    tiles = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    return row, column


@triton.jit
def _read(ptr, stride, row, column, mask):
    """A tile in fp32."""
    return tl.load(ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _write(ptr, stride, row, column, mask, value):
    """A tile, rounded once."""
    tl.store(ptr + row[:, None] * stride + column[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _factors(low_ptr, second_ptr, low_stride, second_stride, row, column, in_r, in_w, rank, PADDED: tl.constexpr):
    """Both factors of what an adapter adds to a tile: (rows, rank) and (rank, columns)."""
    place = tl.arange(0, PADDED)
    inside = (place < rank)[None, :]
    low = tl.load(low_ptr + row[:, None] * low_stride + place[None, :], mask=in_r[:, None] & inside, other=0.0)
    second_ptrs = second_ptr + column[:, None] * second_stride + place[None, :]
    second = tl.load(second_ptrs, mask=in_w[:, None] & inside, other=0.0)
    return low, tl.trans(second)


@triton.jit
def _adapted_forward_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    gate_low,
    gate_second,
    up_low,
    up_second,
    gate_stride,
    up_stride,
    out_stride,
    gate_ls,
    gate_ss,
    up_ls,
    up_ss,
    rows,
    width,
    gate_rank,
    up_rank,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    row, column = _tile(width, ROWS, BLOCK)
    in_r, in_w = row < rows, column < width
    mask = in_r[:, None] & in_w[None, :]
    gate = _read(gate_ptr, gate_stride, row, column, mask)
    if gate_low is not None:
        low, second = _factors(gate_low, gate_second, gate_ls, gate_ss, row, column, in_r, in_w, gate_rank, PADDED)
        gate += tl.dot(low, second, input_precision="ieee")
    value, _ = _value_and_slope(gate, ACT)
    if up_ptr is not None:
        up = _read(up_ptr, up_stride, row, column, mask)
        if up_low is not None:
            low, second = _factors(up_low, up_second, up_ls, up_ss, row, column, in_r, in_w, up_rank, PADDED)
            up += tl.dot(low, second, input_precision="ieee")
        value *= up
    _write(out_ptr, out_stride, row, column, mask, value)


@triton.jit
def _adapted_backward_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    d_gate_ptr,
    d_up_ptr,
    value_ptr,
    gate_low,
    gate_second,
    up_low,
    up_second,
    grad_stride,
    gate_stride,
    up_stride,
    d_gate_stride,
    d_up_stride,
    value_stride,
    gate_ls,
    gate_ss,
    up_ls,
    up_ss,
    rows,
    width,
    gate_rank,
    up_rank,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    row, column = _tile(width, ROWS, BLOCK)
    in_r, in_w = row < rows, column < width
    mask = in_r[:, None] & in_w[None, :]
    # Everything is read before anything is written: results may take the place of arguments.
    grad = _read(grad_ptr, grad_stride, row, column, mask)
    gate = _read(gate_ptr, gate_stride, row, column, mask)
    if gate_low is not None:
        low, second = _factors(gate_low, gate_second, gate_ls, gate_ss, row, column, in_r, in_w, gate_rank, PADDED)
        gate += tl.dot(low, second, input_precision="ieee")
    value, slope = _value_and_slope(gate, ACT)
    d_gate = grad * slope
    if up_ptr is not None:
        up = _read(up_ptr, up_stride, row, column, mask)
        if up_low is not None:
            low, second = _factors(up_low, up_second, up_ls, up_ss, row, column, in_r, in_w, up_rank, PADDED)
            up += tl.dot(low, second, input_precision="ieee")
        d_gate *= up
        _write(d_up_ptr, d_up_stride, row, column, mask, grad * value)
        value *= up
    _write(d_gate_ptr, d_gate_stride, row, column, mask, d_gate)
    if value_ptr is not None:
        _write(value_ptr, value_stride, row, column, mask, value)
