"""Triton kernels of rank_blocks and select_rows.

Both count instead of sorting: a program owns a tile of blocks and walks the blocks of their documents. A block's rank
is the number of blocks that come before it; where its rows go is the number of rows in front of it among its own kind.
There are few blocks (16,384 in a million rows), so every pair can be looked at, and one launch does each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.ops.backend import interpreting, on_device_of

MAX_BLOCK_ROWS = 512
BLOCKS, OTHERS = 16, 128


def why_not(per_block: Tensor, block_rows: int) -> str | None:
    """Why the kernels cannot run on this input (scores or ranks); None if they can."""
    if per_block.dtype == torch.float64:
        return "they compare in fp32, not torch.float64"
    if block_rows > MAX_BLOCK_ROWS:
        return f"blocks of {block_rows} rows exceed {MAX_BLOCK_ROWS}"
    if interpreting():
        return "the interpreter has no bf16" if per_block.dtype == torch.bfloat16 else None
    if per_block.device.type != "cuda":
        return f"the tensors are on {per_block.device.type}, they need a CUDA device"
    return None


def rank(scores: Tensor, spans: Tensor) -> Tensor:
    """(K,) int64 ranks; `spans` (3, K): first block of each one's document, the one behind its last, and forced."""
    blocks = len(scores)
    found = torch.empty(blocks, dtype=torch.int64, device=scores.device)
    with on_device_of(scores):
        _rank_kernel[(-(-blocks // BLOCKS),)](
            scores, spans, found, scores.stride(0), blocks, torch.finfo(scores.dtype).max,
            BLOCKS=BLOCKS, OTHERS=OTHERS, num_warps=4,
        )  # fmt: skip
    return found


def select(
    ranks: Tensor, keep: Tensor | None, columns: Tensor, sizes: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Chosen rows, skipped rows, and which of the chosen are valid; `sizes`: how many, and the longest block.

    `columns` (7, K) as `_Budget.on` in op.py makes them.
    """
    chosen, skipped, longest = sizes
    blocks, device = len(ranks), ranks.device
    rows = torch.empty(chosen, dtype=torch.int64, device=device)
    others = torch.empty(skipped, dtype=torch.int64, device=device)
    valid = None if keep is None else torch.empty(chosen, dtype=torch.uint8, device=device)
    with on_device_of(ranks):
        _select_kernel[(-(-blocks // BLOCKS),)](
            ranks.contiguous(), ranks if keep is None else keep.contiguous().view(torch.uint8), columns,
            rows, others, rows if valid is None else valid, blocks,
            LENGTH=1 << (longest - 1).bit_length(), KEEP=keep is not None, BLOCKS=BLOCKS, OTHERS=OTHERS, num_warps=4,
        )  # fmt: skip
    return rows, others, None if valid is None else valid.view(torch.bool)


@triton.jit
def _key(score_ptr, score_stride, forced_ptr, block, exists, largest):
    """What blocks are ordered by: the score; -inf for one that is no number, +inf for forced blocks alone."""
    score = tl.load(score_ptr + block.to(tl.int64) * score_stride, mask=exists, other=0.0).to(tl.float32)
    score = tl.where(score != score, float("-inf"), tl.minimum(score, largest))
    return tl.where(tl.load(forced_ptr + block, mask=exists, other=0) != 0, float("inf"), score)


# The number of blocks changes from batch to batch and must not compile the kernels anew.
@triton.jit(do_not_specialize=["blocks"])
def _rank_kernel(
    score_ptr, spans_ptr, rank_ptr, score_stride, blocks, largest, BLOCKS: tl.constexpr, OTHERS: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    exists = block < blocks
    first = tl.load(spans_ptr + block, mask=exists, other=blocks).to(tl.int32)
    end = tl.load(spans_ptr + blocks + block, mask=exists, other=0).to(tl.int32)
    forced_ptr = spans_ptr + 2 * blocks
    mine = _key(score_ptr, score_stride, forced_ptr, block, exists, largest)
    ahead = tl.zeros((BLOCKS,), dtype=tl.int32)
    # Blocks are ordered by document: those of the tile's documents lie between these two.
    for at in range(tl.min(first, axis=0), tl.max(end, axis=0), OTHERS):
        other = at + tl.arange(0, OTHERS)
        key = _key(score_ptr, score_stride, forced_ptr, other, other < blocks, largest)
        same = (other[None, :] >= first[:, None]) & (other[None, :] < end[:, None])
        tied = (key[None, :] == mine[:, None]) & (other[None, :] < block[:, None])
        ahead += tl.sum((same & ((key[None, :] > mine[:, None]) | tied)).to(tl.int32), axis=1)
    tl.store(rank_ptr + block, ahead.to(tl.int64), mask=exists)


@triton.jit
def _inside(rank_ptr, keep_ptr, budget_ptr, block, exists, KEEP: tl.constexpr):
    """Whether blocks are inside their budgets, and whether they are also kept."""
    rank = tl.load(rank_ptr + block, mask=exists, other=0)
    inside = exists & (rank < tl.load(budget_ptr + block, mask=exists, other=0))
    kept = inside
    if KEEP:
        kept = inside & (tl.load(keep_ptr + block, mask=exists, other=0) != 0)
    return inside, kept


@triton.jit(do_not_specialize=["blocks"])
def _select_kernel(
    rank_ptr, keep_ptr, columns_ptr, rows_ptr, skipped_ptr, valid_ptr, blocks,
    LENGTH: tl.constexpr, KEEP: tl.constexpr, BLOCKS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    exists = block < blocks
    length_ptr, budget_ptr = columns_ptr + blocks, columns_ptr + 4 * blocks
    first = tl.load(columns_ptr + 2 * blocks + block, mask=exists, other=blocks).to(tl.int32)
    end = tl.load(columns_ptr + 3 * blocks + block, mask=exists, other=0).to(tl.int32)
    inside, kept = _inside(rank_ptr, keep_ptr, budget_ptr, block, exists, KEEP)
    ahead = tl.zeros((BLOCKS,), dtype=tl.int32)
    last = tl.max(end, axis=0)
    if not KEEP:
        last = tl.minimum(last, (tl.program_id(0) + 1) * BLOCKS)
    for at in range(tl.min(first, axis=0), last, OTHERS):
        other = at + tl.arange(0, OTHERS)
        there = other < blocks
        rows = tl.load(length_ptr + other, mask=there, other=0).to(tl.int32)
        other_inside, other_kept = _inside(rank_ptr, keep_ptr, budget_ptr, other, there, KEEP)
        before = other[None, :] < block[:, None]
        counted = before & (other_inside[None, :] == inside[:, None])
        if KEEP:
            # Chosen rows come first; behind them all, the dropped ones in order.
            dropped = other_kept[None, :] | (before & other_inside[None, :])
            mine = tl.where(kept[:, None], before & other_kept[None, :], dropped)
            counted = tl.where(inside[:, None], mine, counted)
        same = (other[None, :] >= first[:, None]) & (other[None, :] < end[:, None])
        ahead += tl.sum(tl.where(same & counted, rows[None, :], 0), axis=1)

    start = tl.load(columns_ptr + block, mask=exists, other=0)
    length = tl.load(length_ptr + block, mask=exists, other=0)
    base_ptr = columns_ptr + tl.where(inside, 5, 6) * blocks
    place = tl.load(base_ptr + block, mask=exists, other=0) + ahead
    offset = tl.arange(0, LENGTH)
    mask = exists[:, None] & (offset[None, :] < length[:, None])
    at = place[:, None] + offset[None, :]
    row = start[:, None] + offset[None, :]
    tl.store(rows_ptr + at, row, mask=mask & inside[:, None])
    tl.store(skipped_ptr + at, row, mask=mask & (inside[:, None] == 0))
    if KEEP:
        valid = tl.broadcast_to(kept[:, None], (BLOCKS, LENGTH)).to(tl.uint8)
        tl.store(valid_ptr + at, valid, mask=mask & inside[:, None])
