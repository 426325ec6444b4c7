"""Triton kernels of gated_act and its gradient: one pass over memory. Contiguous tensors are one long row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lemo.ops.backend import interpreting, on_device_of, why_no_kernel
from lemo.ops.gated_act.reference import ACTS


def why_not(gate: Tensor) -> str | None:
    """Why the kernels cannot run on this tensor; None if they can."""
    return why_no_kernel(gate)


def forward(gate: Tensor, up: Tensor | None, act: str, out: Tensor) -> None:
    """As gated_act, into `out`."""
    _launch(_forward_kernel, (gate, up, out), ACTS.index(act))


def backward(
    grad: Tensor, gate: Tensor, up: Tensor | None, act: str, out: tuple[Tensor, Tensor | None, Tensor | None]
) -> None:
    """As gated_act_backward, into `out` = (gradient of gate, of up, activation)."""
    _launch(_backward_kernel, (grad, gate, up, *out), ACTS.index(act))


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
