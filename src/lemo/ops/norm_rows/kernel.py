"""Triton kernels of norm_rows and its gradient.

A program holds whole rows in registers: one pass over memory each way. Narrow rows share a program. Sums over rows for
the gradients of weight and bias are made by a fixed number of programs, each over every so-many-th tile, and a second
sum over the programs, so repeated runs agree.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.ops.backend import interpreting, on_device_of, why_no_kernel

MAX_WIDTH = 32768
# Elements of a program: narrower rows are taken several at a time.
TILE = 4096
# Programs that sum the gradients of weight and bias. A constant and not the number of multiprocessors: the order of
# summation is then the same on every device.
SUMMING_PROGRAMS = 512


def why_not(x: Tensor) -> str | None:
    """Why the kernels cannot run on these rows; None if they can."""
    if x.shape[-1] > MAX_WIDTH:
        return f"rows of {x.shape[-1]} elements exceed {MAX_WIDTH}"
    return why_no_kernel(x)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, eps: float, layer: bool, keep_rows: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """As norm_rows, for `x` (N, M) contiguous."""
    count, width = len(x) if rows is None else len(rows), x.shape[1]
    normed = torch.empty(count, width, dtype=x.dtype, device=x.device)
    rstd = torch.empty(count, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if layer else None
    kept = None
    if keep_rows:
        kept = x if rows is None else torch.empty_like(normed)
    sizes = _sizes(width)
    tiles = triton.cdiv(count, sizes["LINES"])
    if tiles:
        with on_device_of(x):
            _forward_kernel[(tiles,)](
                x, weight.contiguous(), None if bias is None else bias.contiguous(),
                None if rows is None else rows.contiguous(), normed, kept, rstd, mean, count, float(eps),
                LAYER=layer, HAS_BIAS=bias is not None, HAS_ROWS=rows is not None,
                KEEP=keep_rows and rows is not None, **sizes,
            )  # fmt: skip
    return normed, kept, rstd, mean


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    mean: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    out_rows: Tensor | None,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """As norm_rows_backward, written to rows of `out`; returns the gradients of weight and bias."""
    count, width = grad.shape
    sizes = _sizes(width)
    programs = tiles = triton.cdiv(count, sizes["LINES"])
    if weight_grad or bias_grad:
        programs = min(tiles, 3 if interpreting() else SUMMING_PROGRAMS)
    sums = [
        torch.empty(programs, width, dtype=torch.float32, device=grad.device) if wanted else None
        for wanted in (weight_grad, bias_grad)
    ]
    if tiles:
        with on_device_of(grad):
            _backward_kernel[(programs,)](
                grad, x, weight.contiguous(), rstd.contiguous(), None if mean is None else mean.contiguous(),
                None if residual is None else residual.contiguous(), out,
                None if out_rows is None else out_rows.contiguous(), *sums, count, tiles, programs,
                LAYER=mean is not None, HAS_RESIDUAL=residual is not None, HAS_ROWS=out_rows is not None,
                WEIGHT_GRAD=weight_grad, BIAS_GRAD=bias_grad, **sizes,
            )  # fmt: skip
    d_weight, d_bias = (None if partial is None else partial.sum(0) for partial in sums)
    return d_weight, d_bias


def _sizes(width: int) -> dict[str, int]:
    padded = triton.next_power_of_2(width)
    lines = max(1, TILE // padded)
    if interpreting():
        lines = min(lines, 8)
    return {
        "WIDTH": width,
        "PADDED": padded,
        "LINES": lines,
        "num_warps": min(max(lines * padded // 1024, 4), 32),
    }


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    rows_ptr,
    out_ptr,
    kept_ptr,
    rstd_ptr,
    mean_ptr,
    count,
    eps,
    LAYER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    KEEP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    LINES: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    column = tl.arange(0, PADDED)
    exists = line < count
    inside = column < WIDTH
    mask = exists[:, None] & inside[None, :]
    row = line
    if HAS_ROWS:
        row = tl.load(rows_ptr + line, mask=exists, other=0)
    x = tl.load(x_ptr + row[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
    # Fetched before the sums, which wait for x: they are on the way meanwhile.
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    here = line[:, None] * WIDTH + column[None, :]
    if KEEP:
        tl.store(kept_ptr + here, x, mask=mask)
    x = x.to(tl.float32)
    if LAYER:
        mean = tl.sum(x, 1) / WIDTH
        x = tl.where(mask, x - mean[:, None], 0.0)
        tl.store(mean_ptr + line, mean, mask=exists)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / WIDTH + eps)
    tl.store(rstd_ptr + line, rstd, mask=exists)
    normed = x * rstd[:, None] * weight.to(tl.float32)[None, :]
    if HAS_BIAS:
        normed += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + here, normed.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, weight_ptr, rstd_ptr, mean_ptr, residual_ptr, out_ptr, rows_ptr, weight_grad_ptr, bias_grad_ptr,
    count, tiles, programs, LAYER: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_ROWS: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr, BIAS_GRAD: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    LINES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((LINES, PADDED), dtype=tl.float32)
    bias_sum = tl.zeros((LINES, PADDED), dtype=tl.float32)
    for tile in range(tl.program_id(0), tiles, programs):
        line = tl.cast(tile, tl.int64) * LINES + tl.arange(0, LINES)
        exists = line < count
        mask = exists[:, None] & inside[None, :]
        here = line[:, None] * WIDTH + column[None, :]
        grad = tl.load(grad_ptr + here, mask=mask, other=0.0).to(tl.float32)
        normed = tl.load(x_ptr + here, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + line, mask=exists, other=0.0)
        # Fetched before the sums, which wait for the rows.
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + here, mask=mask, other=0.0)
        if LAYER:
            mean = tl.load(mean_ptr + line, mask=exists, other=0.0)
            normed = tl.where(mask, normed - mean[:, None], 0.0)
        normed = normed * rstd[:, None]
        if WEIGHT_GRAD:
            weight_sum += grad * normed
        if BIAS_GRAD:
            bias_sum += grad
        grad = grad * weight[None, :]
        dx = grad - normed * (tl.sum(grad * normed, 1) / WIDTH)[:, None]
        if LAYER:
            dx = dx - (tl.sum(grad, 1) / WIDTH)[:, None]
        dx = dx * rstd[:, None]
        if HAS_RESIDUAL:
            dx += residual.to(tl.float32)
        if HAS_ROWS:
            row = tl.load(rows_ptr + line, mask=exists, other=0)
            tl.store(out_ptr + row[:, None] * WIDTH + column[None, :], dx.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(out_ptr + here, dx.to(out_ptr.dtype.element_ty), mask=mask)
    place = tl.program_id(0).to(tl.int64) * WIDTH + column
    if WEIGHT_GRAD:
        tl.store(weight_grad_ptr + place, tl.sum(weight_sum, 0), mask=inside)
    if BIAS_GRAD:
        tl.store(bias_grad_ptr + place, tl.sum(bias_sum, 0), mask=inside)
