"""Triton kernel of pool_blocks.

One program owns a tile of whole blocks (each padded to a power of two rows) and a run of features. It walks the width
once: the matrix units form x·P, the ordinary ones the sum of squares from the same operand. 1/rms scales the finished
product, so the rows are never normalised in memory. Rows that are padding are loaded as zeros and masked in the pools.
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
from lemo.ops.pool_blocks.reference import POOLS, Blocks

MAX_BLOCK_ROWS = 128


@dataclass(frozen=True)
class Tiling:
    """How the kernel cuts the work.

    Attributes:
        rows: rows of a tile, a power of two; raised to the padded block.
        features: features of a tile, at most.
        width: columns of x taken at a time.
        warps: warps of a program.
        stages: runs of columns in flight.
    """

    rows: int
    features: int
    width: int
    warps: int
    stages: int


# The first whose operands fit into shared memory is taken; the benchmark times all that fit.
CANDIDATES = (
    Tiling(64, 128, 64, 4, 4),
    Tiling(64, 128, 128, 4, 4),
    Tiling(64, 128, 64, 8, 4),
    Tiling(128, 128, 64, 8, 4),
    Tiling(64, 64, 64, 4, 4),
    Tiling(64, 128, 64, 4, 2),
    Tiling(64, 64, 64, 4, 2),
    Tiling(64, 64, 32, 4, 1),
)
# The product of fp32 operands runs on the ordinary units: small tiles, or the accumulators spill.
CANDIDATES_FP32 = (Tiling(64, 64, 32, 8, 2), Tiling(64, 64, 16, 8, 1))
INTERPRETED = Tiling(16, 32, 32, 1, 1)


@cache
def choose_tiling(block_rows: int, dtype: torch.dtype) -> Tiling | None:
    """The first candidate that fits; None if none does. A table and not an autotuner: two runs do the same thing."""
    if interpreting():
        return INTERPRETED
    candidates = CANDIDATES_FP32 if dtype.itemsize >= 4 else CANDIDATES
    return next((tiling for tiling in candidates if fits(tiling, block_rows, dtype)), None)


def fits(tiling: Tiling, block_rows: int, dtype: torch.dtype) -> bool:
    """Whether the operands of the stages and the projected tile fit into shared memory; 2 KiB are the compiler's."""
    rows = max(tiling.rows, padded(block_rows))
    operands = tiling.stages * (rows + tiling.features) * tiling.width * dtype.itemsize
    return max(operands, 4 * rows * tiling.features) <= shared_memory_bytes() - 2048


def why_not(x: Tensor, block_rows: int) -> str | None:
    """Why the kernel cannot run on this input; None if it can."""
    if block_rows > MAX_BLOCK_ROWS:
        return f"blocks of {block_rows} rows exceed {MAX_BLOCK_ROWS}"
    if (reason := why_no_kernel(x)) is not None:
        return reason
    if choose_tiling(block_rows, x.dtype) is None:
        return f"no tile for blocks of {block_rows} rows of {x.dtype} fits into shared memory"
    return None


def launch(
    x: Tensor,
    projection: Tensor,
    blocks: Blocks,
    pools: tuple[str, ...],
    extra: Tensor | None,
    eps: float,
    tiling: Tiling | None = None,
) -> Tensor:
    """Runs the kernel; arguments as in `pool_blocks`, `projection` in the dtype of `x`."""
    count, (width, features) = len(blocks.start_K), projection.shape
    extras = 0 if extra is None else extra.shape[1]
    out = torch.empty(count, len(pools) * features + extras, dtype=torch.float32, device=x.device)
    tiling = tiling or choose_tiling(blocks.rows, x.dtype)
    if tiling is None:
        raise BackendError(f"pool_blocks: no tiling for blocks of {blocks.rows} rows of {x.dtype}")
    block, feature_tile = padded(blocks.rows), min(tiling.features, padded(features))
    per_tile = max(1, tiling.rows // block)
    extra = out if extra is None else extra
    grid = (-(-count // per_tile), -(-features // feature_tile))
    places = {f"{name.upper()}_AT": pools.index(name) if name in pools else -1 for name in POOLS}
    with on_device_of(x):
        _pool_blocks_kernel[grid](
            x, projection, blocks.start_K, blocks.length_K, extra, out,
            *x.stride(), *projection.stride(), *extra.stride(), out.stride(0),
            blocks.start_K.stride(0), blocks.length_K.stride(0), count, float(eps),
            WIDTH=width, FEATURES=features, EXTRAS=extras, PADDED_EXTRAS=padded(max(extras, 1)),
            BLOCK=block, BLOCKS=per_tile, FEATURE_TILE=feature_tile, WIDTH_TILE=tiling.width,
            POOLS=len(pools), **places, STAGES=tiling.stages, num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
    return out


@triton.jit
def _project(
    x_ptr, projection_ptr, row, valid, feature,
    x_stride_n, x_stride_m, projection_stride_m, projection_stride_f, eps,
    WIDTH: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr, FEATURE_TILE: tl.constexpr,
    WIDTH_TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(rows of the tile, features) of the normalised rows times P. 64-bit addresses."""
    column = tl.arange(0, WIDTH_TILE)
    inside = feature < FEATURES
    x_rows = x_ptr + row[:, None] * x_stride_n
    projection_columns = projection_ptr + feature[None, :].to(tl.int64) * projection_stride_f
    product = tl.zeros((ROWS, FEATURE_TILE), dtype=tl.float32)
    square = tl.zeros((ROWS,), dtype=tl.float32)
    for at in tl.range(0, WIDTH, WIDTH_TILE, num_stages=STAGES):
        m = (at + column).to(tl.int64)
        x = tl.load(x_rows + m[None, :] * x_stride_m, mask=valid[:, None] & (m[None, :] < WIDTH), other=0.0)
        projection = tl.load(
            projection_columns + m[:, None] * projection_stride_m,
            mask=(m[:, None] < WIDTH) & inside[None, :],
            other=0.0,
        )
        product = tl.dot(x, projection, product, input_precision="ieee")
        wide = x.to(tl.float32)
        square += tl.sum(wide * wide, axis=1)
    return product * (1.0 / tl.sqrt(square / WIDTH + eps))[:, None]


# The number of blocks changes from batch to batch and must not compile the kernel anew.
@triton.jit(do_not_specialize=["blocks"])
def _pool_blocks_kernel(
    x_ptr, projection_ptr, start_ptr, length_ptr, extra_ptr, out_ptr,
    x_stride_n, x_stride_m, projection_stride_m, projection_stride_f, extra_stride_k, extra_stride_e, out_stride,
    start_stride, length_stride, blocks, eps,
    WIDTH: tl.constexpr, FEATURES: tl.constexpr, EXTRAS: tl.constexpr, PADDED_EXTRAS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, FEATURE_TILE: tl.constexpr, WIDTH_TILE: tl.constexpr,
    POOLS: tl.constexpr, MEAN_AT: tl.constexpr, MAX_AT: tl.constexpr, LSE_AT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    line = tl.arange(0, BLOCKS * BLOCK)
    mine = tl.program_id(0) * BLOCKS + line // BLOCK
    offset = line % BLOCK
    exists = mine < blocks
    valid = exists & (offset < tl.load(length_ptr + mine * length_stride, mask=exists, other=0))
    row = tl.load(start_ptr + mine * start_stride, mask=exists, other=0).to(tl.int64) + offset
    feature = tl.program_id(1) * FEATURE_TILE + tl.arange(0, FEATURE_TILE)
    value = _project(
        x_ptr, projection_ptr, row, valid, feature,
        x_stride_n, x_stride_m, projection_stride_m, projection_stride_f, eps,
        WIDTH, FEATURES, BLOCKS * BLOCK, FEATURE_TILE, WIDTH_TILE, STAGES,
    )  # fmt: skip

    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    length = tl.load(length_ptr + block * length_stride, mask=block < blocks, other=1).to(tl.float32)
    out_ptrs = out_ptr + block[:, None].to(tl.int64) * out_stride + feature[None, :]
    stored = (block[:, None] < blocks) & (feature[None, :] < FEATURES)
    if MEAN_AT >= 0:
        total = tl.sum(tl.reshape(tl.where(valid[:, None], value, 0.0), (BLOCKS, BLOCK, FEATURE_TILE)), axis=1)
        tl.store(out_ptrs + MEAN_AT * FEATURES, total / length[:, None], mask=stored)
    if (MAX_AT >= 0) | (LSE_AT >= 0):
        low = tl.reshape(tl.where(valid[:, None], value, float("-inf")), (BLOCKS, BLOCK, FEATURE_TILE))
        top = tl.max(low, axis=1)
        if MAX_AT >= 0:
            tl.store(out_ptrs + MAX_AT * FEATURES, top, mask=stored)
        if LSE_AT >= 0:
            # Tiles past the last block hold no row: their maximum is -inf and must not be subtracted from itself.
            top = tl.where(block[:, None] < blocks, top, 0.0)
            total = tl.sum(tl.exp(low - top[:, None, :]), axis=1)
            tl.store(out_ptrs + LSE_AT * FEATURES, top + tl.log(total) - tl.log(length)[:, None], mask=stored)

    if EXTRAS > 0:  # noqa: SIM102, known when compiling
        if tl.program_id(1) == 0:
            place = tl.arange(0, PADDED_EXTRAS)
            mask = (block[:, None] < blocks) & (place[None, :] < EXTRAS)
            from_ptrs = extra_ptr + block[:, None].to(tl.int64) * extra_stride_k + place[None, :] * extra_stride_e
            to_ptrs = out_ptr + block[:, None].to(tl.int64) * out_stride + POOLS * FEATURES + place[None, :]
            tl.store(to_ptrs, tl.load(from_ptrs, mask=mask).to(tl.float32), mask=mask)
