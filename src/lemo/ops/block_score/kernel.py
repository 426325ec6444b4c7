"""Triton kernel of block_score.

One program computes one tile of the matrix of scores and never stores it: it loops over the heads, adds relu(q·k) of
each to an fp32 accumulator in registers, and writes the maximum over every pair of blocks in the tile. A tile is a run
of whole blocks (padded to a power of two rows each), so the address of a row comes from its block and any layout works:
ragged blocks, packed documents, gaps. Tiles above the diagonal are not launched, tiles that join two documents end at
once. Rows that are padding are loaded as zeros; their score is 0, which no maximum notices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.errors import BackendError
from lemo.ops.backend import interpreting, on_device_of, padded, shared_memory_bytes, why_no_kernel

MAX_BLOCK_ROWS = 128
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Tiling:
    """How the kernel cuts the work.

    Attributes:
        query_rows: rows of a tile; a power of two, at least the padded block.
        key_rows: columns of a tile; a power of two that divides `query_rows` and is at least the padded block.
        warps: warps of a program.
        stages: heads whose operands are in flight at a time.
        group: tile rows that share their key tiles in the second-level cache.
    """

    query_rows: int = 128
    key_rows: int = 128
    warps: int = 8
    stages: int = 3
    group: int = 8


# Tried in this order for 16-bit operands; the benchmark times those that fit.
CANDIDATES = (
    Tiling(),
    Tiling(stages=2),
    Tiling(key_rows=64, stages=3),
    Tiling(key_rows=64, warps=4, stages=2),
    Tiling(key_rows=64, stages=2),
    Tiling(stages=1),
    Tiling(key_rows=64, stages=1),
)
# The product of fp32 operands runs on the ordinary units: small tiles, or the accumulators spill.
CANDIDATES_FP32 = (Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 1), Tiling(stages=2), Tiling(stages=1))


def choose_tiling(head_dim: int, block_rows: int, dtype: torch.dtype) -> Tiling | None:
    """The first candidate whose tile holds a block and whose operands fit into shared memory; None if none does.

    A table and not an autotuner: the first call costs nothing extra, and two runs do the same thing.
    """
    if interpreting():
        side = padded(block_rows)
        return Tiling(side, side, warps=1, stages=1, group=2)
    candidates = CANDIDATES_FP32 if dtype.itemsize >= 4 else CANDIDATES
    return next((tiling for tiling in candidates if fits(tiling, head_dim, block_rows, dtype)), None)


def fits(tiling: Tiling, head_dim: int, block_rows: int, dtype: torch.dtype) -> bool:
    """Whether a tile holds a block, and the operands of its stages fit into shared memory."""
    operand_bytes = (tiling.query_rows + tiling.key_rows) * padded(head_dim) * dtype.itemsize
    return tiling.key_rows >= padded(block_rows) and tiling.stages * operand_bytes <= shared_memory_bytes() - 1024


def why_not(query: Tensor, block_rows: int) -> str | None:
    """Why the kernel cannot run on this input; None if it can."""
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"head dimension {query.shape[-1]} exceeds {MAX_HEAD_DIM}"
    if block_rows > MAX_BLOCK_ROWS:
        return f"blocks of {block_rows} rows exceed {MAX_BLOCK_ROWS}"
    if (reason := why_no_kernel(query)) is not None:
        return reason
    if choose_tiling(query.shape[-1], block_rows, query.dtype) is None:
        return f"no tile for blocks of {block_rows} rows, {query.shape[-1]} wide {query.dtype} fits into shared memory"
    return None


def launch(
    query: Tensor,
    key: Tensor,
    layout: tuple[Tensor, Tensor, Tensor],
    scaling: float,
    softcap: float | None,
    block_rows: int,
    tiling: Tiling | None = None,
) -> Tensor:
    """Runs the kernel; arguments as in `block_score`, `layout` = (start, length, document) of the blocks."""
    heads, _, head_dim = query.shape
    start, length, document = (t.to(query.device, torch.int64, non_blocking=True).contiguous() for t in layout)
    blocks = len(start)
    out = torch.zeros(blocks, blocks, dtype=torch.float32, device=query.device)
    tiling = tiling or choose_tiling(head_dim, block_rows, query.dtype)
    if tiling is None:
        raise BackendError(f"block_score: no tiling for head dimension {head_dim} and blocks of {block_rows} rows")
    padded_block = padded(block_rows)
    query_blocks, key_blocks = tiling.query_rows // padded_block, tiling.key_rows // padded_block
    groups = triton.cdiv(triton.cdiv(blocks, query_blocks), tiling.group)
    # Group g spans `group` tile rows and the columns up to its last row: group · width · (g + 1) tiles.
    width = tiling.group * query_blocks // key_blocks
    grid = (tiling.group * width * groups * (groups + 1) // 2,)
    with on_device_of(query):
        _block_score_kernel[grid](
            query,
            key,
            start,
            length,
            document,
            out,
            *query.stride(),
            *key.stride(),
            out.stride(0),
            blocks,
            float(scaling),
            float(softcap or 1.0),
            HEADS=heads,
            HEADS_PER_KEY=heads // key.shape[0],
            HEAD_DIM=head_dim,
            PADDED_DIM=padded(head_dim),
            BLOCK=padded_block,
            QUERY_BLOCKS=query_blocks,
            KEY_BLOCKS=key_blocks,
            GROUP=tiling.group,
            SOFTCAP=softcap is not None,
            STAGES=tiling.stages,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
    return out


@triton.jit
def _tile_of(pid, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """Tile row and column of a program: groups of GROUP tile rows, each running down its columns.

    Programs that run at the same time then form a patch of about GROUP rows, which reads few distinct operands.
    """
    unit = pid // (GROUP * WIDTH)
    group = ((tl.sqrt(8.0 * unit.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is rounded: the group may be off by one.
    group = tl.where(group * (group + 1) // 2 > unit, group - 1, group)
    group = tl.where((group + 1) * (group + 2) // 2 <= unit, group + 1, group)
    inside = pid - GROUP * WIDTH * (group * (group + 1) // 2)
    return group * GROUP + inside % GROUP, inside // GROUP


@triton.jit
def _tile_rows(start_ptr, length_ptr, document_ptr, first_block, blocks, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Flat row, validity and document of each row of a tile that begins with block `first_block`."""
    line = tl.arange(0, ROWS)
    block = first_block + line // BLOCK
    offset = line % BLOCK
    exists = block < blocks
    valid = exists & (offset < tl.load(length_ptr + block, mask=exists, other=0))
    row = tl.load(start_ptr + block, mask=exists, other=0) + offset
    return row, valid, tl.load(document_ptr + block, mask=exists, other=-1)


@triton.jit
def _tanh(x):
    """Tanh of x >= 0, to fp32 accuracy near 0 as well, where (1-e)/(1+e) would cancel."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    decay = tl.exp(-2.0 * x)
    return tl.where(x < 0.25, series, (1.0 - decay) / (1.0 + decay))


@triton.jit
def _operand_pointers(ptr, row, stride_n, stride_d, valid, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """(ROWS, PADDED_DIM) pointers to rows of the first head, and which of them may be read. 64-bit addresses."""
    dim = tl.arange(0, PADDED_DIM)
    pointers = ptr + row[:, None] * stride_n + dim[None, :].to(tl.int64) * stride_d
    mask = valid[:, None]
    if PADDED_DIM != HEAD_DIM:
        mask = mask & (dim[None, :] < HEAD_DIM)
    return pointers, mask


@triton.jit
def _store_maxima(
    total,
    out_ptr,
    out_stride,
    first_m,
    first_n,
    blocks,
    BLOCK: tl.constexpr,
    QUERY_BLOCKS: tl.constexpr,
    KEY_BLOCKS: tl.constexpr,
):
    """Writes the largest element of every pair of blocks of a tile, those on and below the diagonal."""
    best = tl.max(tl.reshape(total, (QUERY_BLOCKS * BLOCK, KEY_BLOCKS, BLOCK)), axis=2)
    best = tl.max(tl.reshape(best, (QUERY_BLOCKS, BLOCK, KEY_BLOCKS)), axis=1)
    block_m = first_m + tl.arange(0, QUERY_BLOCKS)
    block_n = first_n + tl.arange(0, KEY_BLOCKS)
    out_ptrs = out_ptr + block_m[:, None].to(tl.int64) * out_stride + block_n[None, :]
    tl.store(out_ptrs, best, mask=(block_m[:, None] < blocks) & (block_n[None, :] <= block_m[:, None]))


@triton.jit
def _block_score_kernel(
    query_ptr,
    key_ptr,
    start_ptr,
    length_ptr,
    document_ptr,
    out_ptr,
    query_stride_h,
    query_stride_n,
    query_stride_d,
    key_stride_g,
    key_stride_n,
    key_stride_d,
    out_stride,
    blocks,
    scaling,
    softcap,
    HEADS: tl.constexpr,
    HEADS_PER_KEY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERY_BLOCKS: tl.constexpr,
    KEY_BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr,
):
    QUERY_ROWS: tl.constexpr = QUERY_BLOCKS * BLOCK
    KEY_ROWS: tl.constexpr = KEY_BLOCKS * BLOCK
    tile_m, tile_n = _tile_of(tl.program_id(0), GROUP, GROUP * QUERY_BLOCKS // KEY_BLOCKS)
    first_m, first_n = tile_m * QUERY_BLOCKS, tile_n * KEY_BLOCKS
    if (first_m >= blocks) | (first_n >= tl.minimum(first_m + QUERY_BLOCKS, blocks)):
        return
    # Blocks are ordered by document: the tile is empty when its last key block belongs to an earlier one.
    if tl.load(document_ptr + tl.minimum(first_n + KEY_BLOCKS, blocks) - 1) < tl.load(document_ptr + first_m):
        return

    row_m, valid_m, document_m = _tile_rows(start_ptr, length_ptr, document_ptr, first_m, blocks, BLOCK, QUERY_ROWS)
    row_n, valid_n, document_n = _tile_rows(start_ptr, length_ptr, document_ptr, first_n, blocks, BLOCK, KEY_ROWS)
    query_ptrs, mask_m = _operand_pointers(
        query_ptr, row_m, query_stride_n, query_stride_d, valid_m, HEAD_DIM, PADDED_DIM
    )
    key_ptrs, mask_n = _operand_pointers(key_ptr, row_n, key_stride_n, key_stride_d, valid_n, HEAD_DIM, PADDED_DIM)

    total = tl.zeros((QUERY_ROWS, KEY_ROWS), dtype=tl.float32)
    for head in tl.range(0, HEADS, num_stages=STAGES):
        far = tl.cast(head, tl.int64)
        query = tl.load(query_ptrs + far * query_stride_h, mask=mask_m, other=0.0)
        key = tl.load(key_ptrs + (far // HEADS_PER_KEY) * key_stride_g, mask=mask_n, other=0.0)
        score = tl.maximum(tl.dot(query, tl.trans(key), input_precision="ieee"), 0.0)
        if SOFTCAP:
            score = _tanh(score * (scaling / softcap))
        total += score
    # relu(s·q·k) = s·relu(q·k) for s > 0: scaling, softcap and the mean are one factor at the end.
    total = total * ((softcap if SOFTCAP else scaling) / HEADS)

    seen = (row_n[None, :] <= row_m[:, None]) & (document_n[None, :] == document_m[:, None])
    total = tl.where(seen & valid_m[:, None] & valid_n[None, :], total, 0.0)
    _store_maxima(total, out_ptr, out_stride, first_m, first_n, blocks, BLOCK, QUERY_BLOCKS, KEY_BLOCKS)
