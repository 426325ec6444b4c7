"""Triton kernels that write the residual stream in place.

The bypass is two thin products, x·down and t·up with R columns between them: a program takes a tile of rows, walks its
columns once for the sum of squares and t, then back from the last column to the first, adding t·up. What it read last
is what it needs first, so much of the second pass comes from the second-level cache. The gradient is the same walk with
the two maps transposed and 1/rms given.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.errors import BackendError
from lemo.ops.backend import interpreting, on_device_of, padded, shared_memory_bytes, why_no_kernel

MAX_WIDTH = 32768
# Beyond it a tile of the map no longer fits beside the rows; larger ranks take torch's products.
MAX_RANK = 128
# Elements of a program that copies rows: narrower rows are taken several at a time.
TILE = 4096


@dataclass(frozen=True)
class Tiling:
    """How the bypass is cut.

    Attributes:
        rows: rows of a program.
        columns: columns of a step.
        warps: warps of a program.
        stages: steps of the second walk whose operands are in flight.
    """

    rows: int
    columns: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns} w{self.warps} s{self.stages}"


# By the padded rank up to which they are meant.
CANDIDATES = {64: (Tiling(64, 128, 4, 3),), 128: (Tiling(64, 64, 8, 3),)}
# The product of fp32 operands runs on the ordinary units: small tiles, or the accumulators spill.
CANDIDATES_FP32 = (Tiling(32, 32, 4, 2), Tiling(16, 32, 4, 1), Tiling(16, 16, 4, 1))
INTERPRETED = Tiling(32, 64, 1, 1)


@cache
def tilings(rank: int, dtype: torch.dtype) -> list[Tiling]:
    """Candidates for this rank that fit into shared memory; the first is the one in use."""
    if interpreting():
        return [INTERPRETED]
    if dtype.itemsize >= 4:
        candidates = CANDIDATES_FP32
    else:
        candidates = CANDIDATES[min(limit for limit in CANDIDATES if limit >= padded(rank))]
    available = shared_memory_bytes() - 4096
    return [t for t in candidates if _shared_bytes(t, rank, dtype) <= available]


def why_not(stream: Tensor, rank: int) -> str | None:
    """Why the kernels cannot run; None if they can. `rank` 0: rows are only written."""
    if stream.shape[-1] > MAX_WIDTH:
        return f"rows of {stream.shape[-1]} elements exceed {MAX_WIDTH}"
    if rank > MAX_RANK:
        return f"rank {rank} exceeds {MAX_RANK}"
    if (reason := why_no_kernel(stream)) is not None:
        return reason
    if rank and not tilings(rank, stream.dtype):
        return f"no tile for rank {rank} in {stream.dtype} fits into shared memory"
    return None


def write(
    stream: Tensor, rows: Tensor, values: Tensor, residual: Tensor | None, valid: Tensor | None, add: bool = False
) -> None:
    """As write_rows_, for `stream` (N, M) contiguous."""
    width = stream.shape[1]
    padded_width = triton.next_power_of_2(width)
    lines = max(1, (256 if interpreting() else TILE) // padded_width)
    tiles = triton.cdiv(len(rows), lines)
    if tiles == 0:
        return
    with on_device_of(stream):
        _write_kernel[(tiles,)](
            stream, rows.contiguous(), values.contiguous(), None if residual is None else residual.contiguous(),
            None if valid is None else valid.contiguous(), len(rows),
            WIDTH=width, PADDED=padded_width, LINES=lines, ADD=add,
            num_warps=min(max(lines * padded_width // 1024, 4), 32),
        )  # fmt: skip


def bypass(
    stream: Tensor,
    rows: Tensor,
    down: Tensor,
    up: Tensor,
    eps: float,
    apply: Tensor | None,
    tiling: Tiling | None = None,
) -> Tensor:
    """As bypass_rows_, for `stream` (N, M) contiguous."""
    rstd = torch.empty(len(rows), dtype=torch.float32, device=stream.device)
    _walk(stream, rows, (down, up), rstd, eps, None if apply is None else apply.contiguous(), False, tiling)
    return rstd


def bypass_backward(
    grad: Tensor, rows: Tensor, rstd: Tensor, down: Tensor, up: Tensor, tiling: Tiling | None = None
) -> None:
    """As bypass_rows_backward_, for `grad` (N, M) contiguous."""
    _walk(grad, rows, (up.mT, down.mT), rstd.contiguous(), 0.0, None, True, tiling)


def _walk(
    stream: Tensor,
    rows: Tensor,
    maps: tuple[Tensor, Tensor],
    rstd: Tensor,
    eps: float,
    apply: Tensor | None,
    backward: bool,
    tiling: Tiling | None,
) -> None:
    """stream[rows] += rstd·(stream[rows]·first·second) for `maps` = (first (M, R), second (R, M))."""
    first, second = maps
    width, rank = first.shape
    if len(rows) == 0:
        return
    with on_device_of(stream):
        if tiling is None:
            fitting = tilings(rank, stream.dtype)
            if not fitting:
                raise BackendError(f"bypass_rows_: no tile for rank {rank} in {stream.dtype}")
            tiling = fitting[0]
        _bypass_kernel[(triton.cdiv(len(rows), tiling.rows),)](
            stream, rows.contiguous(), apply, rstd, first, second, *first.stride(), *second.stride(),
            len(rows), float(eps),
            WIDTH=width, RANK=rank, PADDED_RANK=padded(rank), ROWS=tiling.rows, COLUMNS=tiling.columns,
            STEPS=triton.cdiv(width, tiling.columns), BACKWARD=backward, STAGES=tiling.stages,
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip


def _shared_bytes(tiling: Tiling, rank: int, dtype: torch.dtype) -> int:
    """Operands of the steps in flight in the first walk; in the second the map, t, and a tile on its way to memory."""
    rank = padded(rank)
    first = tiling.columns * (tiling.rows + rank)
    second = tiling.stages * tiling.columns * rank + tiling.rows * (rank + tiling.columns)
    return max(first, second) * dtype.itemsize


@triton.jit
def _write_kernel(
    stream_ptr,
    rows_ptr,
    values_ptr,
    residual_ptr,
    valid_ptr,
    count,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    LINES: tl.constexpr,
    ADD: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    column = tl.arange(0, PADDED)
    written = line < count
    row = tl.load(rows_ptr + line, mask=written, other=0)
    if valid_ptr is not None:
        written = written & (tl.load(valid_ptr + line, mask=written, other=0) != 0)
    mask = written[:, None] & (column < WIDTH)[None, :]
    here = line[:, None] * WIDTH + column[None, :]
    values = tl.load(values_ptr + here, mask=mask, other=0.0)
    if residual_ptr is not None:
        values = values.to(tl.float32) + tl.load(residual_ptr + here, mask=mask, other=0.0).to(tl.float32)
    there = stream_ptr + row[:, None] * WIDTH + column[None, :]
    if ADD:
        values = values.to(tl.float32) + tl.load(there, mask=mask, other=0.0).to(tl.float32)
    tl.store(there, values.to(stream_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _inside(acts, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) mask of rows that are bypassed; of columns only where the last step is not full."""
    if WIDTH % COLUMNS == 0:
        return tl.broadcast_to(acts[:, None], (ROWS, COLUMNS))
    return acts[:, None] & (column < WIDTH)[None, :]


@triton.jit
def _bypass_kernel(
    stream_ptr, rows_ptr, apply_ptr, rstd_ptr, first_ptr, second_ptr, first_stride_m, first_stride_r, second_stride_r,
    second_stride_m, count, eps, WIDTH: tl.constexpr, RANK: tl.constexpr, PADDED_RANK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, BACKWARD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    acts = line < count
    row = tl.load(rows_ptr + line, mask=acts, other=0)
    rstd = tl.zeros((ROWS,), dtype=tl.float32)
    if BACKWARD:
        rstd = tl.load(rstd_ptr + line, mask=acts, other=0.0)
        acts = acts & (rstd != 0.0)
    if apply_ptr is not None:
        acts = acts & (tl.load(apply_ptr + line, mask=acts, other=0) != 0)
    row_ptrs = stream_ptr + row[:, None] * WIDTH
    rank = tl.arange(0, PADDED_RANK)

    total = tl.zeros((ROWS, PADDED_RANK), dtype=tl.float32)
    squares = tl.zeros((ROWS,), dtype=tl.float32)
    # Not pipelined: on an H200 (Triton 3.6) two or three stages left wrong rows in tiles that were not full, in 12 to
    # 49 of 120 runs; with one stage none of 480 runs did, at 1.2 times the time.
    for step in tl.range(0, STEPS, num_stages=1):
        column = step * COLUMNS + tl.arange(0, COLUMNS)
        x = tl.load(row_ptrs + column[None, :], mask=_inside(acts, column, WIDTH, ROWS, COLUMNS), other=0.0)
        first = tl.load(
            first_ptr + column[:, None].to(tl.int64) * first_stride_m + rank[None, :].to(tl.int64) * first_stride_r,
            mask=(column[:, None] < WIDTH) & (rank[None, :] < RANK),
            other=0.0,
        )
        total = tl.dot(x, first, total, input_precision="ieee")
        if not BACKWARD:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
    if not BACKWARD:
        rstd = tl.where(acts, 1.0 / tl.sqrt_rn(squares / WIDTH + eps), 0.0)
        tl.store(rstd_ptr + line, rstd, mask=line < count)
    between = (total * rstd[:, None]).to(stream_ptr.dtype.element_ty)

    # From the last column to the first: those were read last.
    for step in tl.range(0, STEPS, num_stages=STAGES):
        column = (STEPS - 1 - step) * COLUMNS + tl.arange(0, COLUMNS)
        mask = _inside(acts, column, WIDTH, ROWS, COLUMNS)
        x = tl.load(row_ptrs + column[None, :], mask=mask, other=0.0)
        second = tl.load(
            second_ptr + rank[:, None].to(tl.int64) * second_stride_r + column[None, :].to(tl.int64) * second_stride_m,
            mask=(rank[:, None] < RANK) & (column[None, :] < WIDTH),
            other=0.0,
        )
        update = tl.dot(between, second, input_precision="ieee")
        y = x.to(tl.float32) + update
        y = y.to(stream_ptr.dtype.element_ty)
        tl.store(row_ptrs + column[None, :], y, mask=mask)
