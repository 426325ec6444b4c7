"""rank_blocks and select_rows: which rows run a layer, given the scores of its blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from lemo.ops.select_rows.reference import SelectedRows


def rank_blocks(scores_K: Tensor, block_document_K: Tensor, forced_K: Tensor) -> Tensor:
    """Rank of each block inside its document, 0 first: forced blocks in order, then the others by falling score.

    Ties keep the earlier block first; a score that is not a number comes last.

    Args:
        scores_K: (K,) floating, on any device.
        block_document_K: (K,) int64 document of each block, ascending, on the CPU.
        forced_K: (K,) bool on the CPU, blocks that come first whatever their score.

    Returns:
        (K,) int64 on the device of `scores_K`.

    Raises:
        ValueError: shapes do not fit, or the layout is not on the CPU.

    Cost:
        two sorts of K numbers; no host synchronisation.
    """
    _check_layout(scores_K, block_document_K, forced_K)
    device = scores_K.device
    document_K = _to(block_document_K, device)
    score_K = scores_K.detach().nan_to_num(nan=-torch.inf, posinf=torch.finfo(scores_K.dtype).max, neginf=-torch.inf)
    score_K = torch.where(_to(forced_K, device), torch.inf, score_K)
    by_score = torch.argsort(score_K, descending=True, stable=True)
    order = by_score[torch.argsort(document_K[by_score], stable=True)]
    blocks_D = torch.bincount(block_document_K)
    first_D = _to(torch.cumsum(blocks_D, 0) - blocks_D, device)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=device) - first_D[document_K[order]]
    return rank


def select_rows(
    rank_K: Tensor,
    budget_D: Tensor,
    block_start_K: Tensor,
    block_length_K: Tensor,
    block_document_K: Tensor,
    forced_K: Tensor,
    *,
    keep_K: Tensor | None = None,
) -> SelectedRows:
    """Rows of the blocks whose rank is below their document's budget, in a number that the host knows beforehand.

    Args:
        rank_K: (K,) int64 of `rank_blocks`, on any device.
        budget_D: (D,) int64 on the CPU, blocks to take of each document; at least its forced blocks.
        block_start_K: (K,) int64 on the CPU, first flat row of each block, ascending.
        block_length_K: (K,) int64 on the CPU; blocks that are not forced all have one length.
        block_document_K: (K,) int64 on the CPU, ascending.
        forced_K: (K,) bool on the CPU.
        keep_K: (K,) bool on the device of `rank_K`: blocks inside the budget where it is false are dropped, that is,
            their rows come last in their document and are marked not valid. None drops nothing.

    Returns:
        SelectedRows, tensors on the device of `rank_K`.

    Raises:
        ValueError: shapes do not fit, the layout is not on the CPU, blocks that are not forced differ in length, or a
            budget lies below the forced blocks or above all blocks.

    Cost:
        two sorts of K and, with `keep_K`, one of N numbers; no host synchronisation.
    """
    _check_layout(rank_K, block_document_K, forced_K, block_start_K, block_length_K)
    rows_D = _row_counts(budget_D, block_length_K, block_document_K, forced_K)
    device, total_blocks = rank_K.device, len(rank_K)
    blocks_kept, rows_kept = int(budget_D.sum()), int(rows_D.sum())
    document_K = _to(block_document_K, device)
    start_K, length_K = _to(block_start_K, device), _to(block_length_K, device)
    inside_K = rank_K < _to(budget_D, device)[document_K]

    rows_N, block_N = _rows_of(_first(inside_K, blocks_kept), start_K, length_K, rows_kept)
    skipped = _first(~inside_K, total_blocks - blocks_kept)
    skipped_S, _ = _rows_of(skipped, start_K, length_K, int(block_length_K.sum()) - rows_kept)
    lengths = tuple(rows_D.tolist())
    if keep_K is None:
        return SelectedRows(rows_N, lengths, skipped_S, None)
    valid_N = keep_K[block_N]
    # Rows that were dropped go to the end of their document, where causal attention of the others cannot see them.
    order = torch.argsort(document_K[block_N] * 2 + (~valid_N).long(), stable=True)
    return SelectedRows(rows_N[order], lengths, skipped_S, valid_N[order])


def _row_counts(budget_D: Tensor, block_length_K: Tensor, block_document_K: Tensor, forced_K: Tensor) -> Tensor:
    """Rows that the budgets take of each document, (D,): the forced blocks' and the competing blocks' common length."""
    documents = len(budget_D)
    blocks_D = torch.bincount(block_document_K, minlength=documents)
    forced_D = torch.bincount(block_document_K[forced_K], minlength=documents)
    if len(blocks_D) != documents or bool(((budget_D < forced_D) | (budget_D > blocks_D)).any()):
        raise ValueError("budget_D must lie between the forced blocks and all blocks of each document")
    competing = block_length_K[~forced_K]
    if len(competing) and bool((competing != competing[0]).any()):
        raise ValueError("blocks that are not forced must all have one length")
    rows_D = torch.zeros(documents, dtype=torch.int64)
    rows_D.index_add_(0, block_document_K[forced_K], block_length_K[forced_K])
    return rows_D + (budget_D - forced_D) * (competing[0] if len(competing) else 0)


def _first(mask_K: Tensor, count: int) -> Tensor:
    """Ascending indices where the mask holds; `count` of them, known to the host, so the device is not asked."""
    return torch.argsort(mask_K.to(torch.uint8), descending=True, stable=True)[:count]


def _rows_of(blocks: Tensor, start_K: Tensor, length_K: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Flat rows of blocks, `total` of them, and the block of each."""
    start, length = start_K[blocks], length_K[blocks]
    index = torch.repeat_interleave(torch.arange(len(blocks), device=blocks.device), length, output_size=total)
    offset = torch.arange(total, device=blocks.device) - (torch.cumsum(length, 0) - length)[index]
    return start[index] + offset, blocks[index]


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)


def _check_layout(per_block_K: Tensor, *layout: Tensor) -> None:
    if any(t.dim() != 1 or len(t) != len(per_block_K) for t in (per_block_K, *layout)):
        raise ValueError(
            f"all arguments per block must be (K,), got {[tuple(t.shape) for t in (per_block_K, *layout)]}"
        )
    if any(t.device.type != "cpu" for t in layout):
        raise ValueError("the layout of the blocks must be on the CPU, where reading it asks no device")
