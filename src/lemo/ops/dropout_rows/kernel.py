"""Triton kernel of dropout_rows: one pass over memory, one hash an element."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lemo.ops.backend import interpreting, on_device_of, why_no_kernel
from lemo.ops.dropout_rows.reference import Key, threshold


def why_not(x: Tensor) -> str | None:
    """Why the kernel cannot run on these rows; None if it can."""
    return why_no_kernel(x)


def launch(x: Tensor, p: float, key: Key, rows: Tensor | None, into: Tensor | None, out: Tensor) -> None:
    """As dropout_rows, into `out`, which may be `into`; all contiguous (n, M)."""
    count, width = x.shape
    if count == 0 or width == 0:
        return
    lines, block = (4, 64) if interpreting() else (4, 1024)
    tiles = triton.cdiv(width, block)
    with on_device_of(x):
        _kernel[(triton.cdiv(count, lines) * tiles,)](
            x, None if rows is None else rows.contiguous(), into, out, count, tiles,
            _signed(key[0]), _signed(key[1]), _signed(threshold(p)), 1.0 / (1.0 - p),
            WIDTH=width, LINES=lines, BLOCK=block, num_warps=4,
        )  # fmt: skip


def _signed(number: int) -> int:
    """The same 32 bits as a signed number: the launcher then gives every key one type."""
    return number - (1 << 32) if number >= 1 << 31 else number


@triton.jit
def _mixed(state):
    """As in the reference; products of 32-bit numbers wrap by themselves."""
    state = (state ^ (state >> 16)) * 0x85EBCA6B
    state = (state ^ (state >> 13)) * 0xC2B2AE35
    return state ^ (state >> 16)


@triton.jit(do_not_specialize=["row_key", "column_key", "threshold", "count", "tiles"])
def _kernel(
    x_ptr, rows_ptr, into_ptr, out_ptr, count, tiles, row_key, column_key, threshold, scale,
    WIDTH: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    line = (tl.program_id(0) // tiles).to(tl.int64) * LINES + tl.arange(0, LINES)
    column = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    exists = line < count
    mask = exists[:, None] & (column < WIDTH)[None, :]
    row = line
    if rows_ptr is not None:
        row = tl.load(rows_ptr + line, mask=exists, other=0)
    row_hash = _mixed(row.to(tl.uint32) * 0x9E3779B1 + tl.cast(row_key, tl.uint32, bitcast=True))
    column_hash = _mixed(column.to(tl.uint32) * 0x85EBCA77 + tl.cast(column_key, tl.uint32, bitcast=True))
    keep = _mixed(row_hash[:, None] ^ column_hash[None, :]) >= tl.cast(threshold, tl.uint32, bitcast=True)
    here = line[:, None] * WIDTH + column[None, :]
    x = tl.load(x_ptr + here, mask=mask, other=0.0).to(tl.float32)
    value = tl.where(keep, x * scale, 0.0)
    if into_ptr is not None:
        value += tl.load(into_ptr + here, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + here, value.to(out_ptr.dtype.element_ty), mask=mask)
