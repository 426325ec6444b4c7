"""From block scores to rows: `topk` fills a budget per document, `threshold` drops further blocks inside it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lemo.core.layout import Layout
from lemo.core.selection import RowSet, Selection
from lemo.errors import ConfigError

POLICIES = ("topk", "threshold")


def check_ratios(forward_ratio: float, backward_ratio: float) -> None:
    """Raises ConfigError unless 0 < backward_ratio <= forward_ratio <= 1."""
    for name, ratio in (("forward_ratio", forward_ratio), ("backward_ratio", backward_ratio)):
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise ConfigError(f"{name} must lie in (0, 1], got {ratio!r}")
    if backward_ratio > forward_ratio:
        raise ConfigError(
            f"backward_ratio ({backward_ratio}) must not exceed forward_ratio ({forward_ratio}): "
            "a row can only pass gradient through a layer that it ran"
        )


def document_budgets(layout: Layout, ratio: float, bucket: int = 1) -> Tensor:
    """Blocks to keep of each document: (D,) int64 on the CPU.

    max(ceil(ratio · blocks), forced blocks), rounded up to a multiple of `bucket`, at most all blocks. Guards and
    supervised blocks count towards the ratio; where they exceed it they are all kept.
    """
    documents = len(layout.document_start_D)
    blocks = torch.bincount(layout.block_document_K, minlength=documents)
    forced = torch.bincount(layout.block_document_K[layout.forced_K], minlength=documents)
    wanted = torch.tensor([math.ceil(ratio * k - 1e-9) for k in blocks.tolist()], dtype=torch.int64)
    budget = torch.maximum(wanted, forced)
    return torch.minimum((budget + bucket - 1) // bucket * bucket, blocks)


def select(
    layout: Layout,
    scores_K: Tensor,
    *,
    forward_ratio: float,
    backward_ratio: float,
    policy: str = "topk",
    threshold: float | None = None,
    bucket: int = 1,
) -> Selection:
    """Rows of one layer from the scores of its blocks.

    Both sets come from one ranking, so backward rows are a subset of forward rows. No host synchronisation.

    Args:
        layout: documents and blocks of the batch.
        scores_K: (K,) floating scores of blocks, higher is kept first; ties keep the earlier block.
        forward_ratio: share of blocks of each document that run the layer.
        backward_ratio: share that also passes gradient.
        policy: `topk` fills the budgets; `threshold` also drops blocks that score below `threshold` from the backward
            set (and from the forward set where the two ratios are equal), forced ones excepted.
        threshold: least score of a block that is kept, `threshold` policy only.
        bucket: budgets are rounded up to a multiple of this many blocks.

    Raises:
        ConfigError: ratios outside 0 < backward <= forward <= 1, an unknown policy, or `threshold` without a value.
    """
    check_ratios(forward_ratio, backward_ratio)
    if policy not in POLICIES:
        raise ConfigError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    if policy == "threshold" and threshold is None:
        raise ConfigError("policy 'threshold' needs a threshold for every layer; calibrate the plan first")
    rank_K = rank_blocks(layout, scores_K)
    keep_K = None
    if policy == "threshold":
        keep_K = (scores_K >= threshold) | layout.forced_K.to(scores_K.device)
    if backward_ratio == forward_ratio:
        both = _row_set(layout, rank_K, forward_ratio, bucket, keep_K if forward_ratio < 1 else None)
        return Selection(both, both)
    forward = _row_set(layout, rank_K, forward_ratio, bucket, None)
    return Selection(forward, _row_set(layout, rank_K, backward_ratio, bucket, keep_K))


def rank_blocks(layout: Layout, scores_K: Tensor) -> Tensor:
    """Rank of each block inside its document, 0 for the first to keep: forced blocks, then by falling score. (K,)."""
    device = scores_K.device
    scores_K = torch.where(layout.forced_K.to(device), torch.inf, scores_K.detach().float().nan_to_num(nan=-torch.inf))
    by_score = torch.argsort(scores_K, descending=True, stable=True)
    document_K = layout.block_document_K.to(device)
    order = by_score[torch.argsort(document_K[by_score], stable=True)]
    documents = len(layout.document_start_D)
    blocks = torch.bincount(layout.block_document_K, minlength=documents)
    first = (torch.cumsum(blocks, 0) - blocks).to(device)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=device) - first[document_K[order]]
    return rank


def _row_set(layout: Layout, rank_K: Tensor, ratio: float, bucket: int, keep_K: Tensor | None) -> RowSet | None:
    """Rows of the best-ranked blocks; None when that is every row of the batch and nothing may be dropped."""
    budget_D = document_budgets(layout, ratio, bucket)
    blocks_kept = int(budget_D.sum())
    total_blocks = len(layout.block_start_K)
    if blocks_kept == total_blocks and keep_K is None:
        return None
    device = rank_K.device
    inside_K = rank_K < budget_D.to(device)[layout.block_document_K.to(device)]
    # Competing blocks all have block_size rows (a document's last block is a guard): the host knows the row counts.
    documents = len(budget_D)
    forced_blocks = torch.bincount(layout.block_document_K[layout.forced_K], minlength=documents)
    forced_rows = torch.zeros(documents, dtype=torch.int64).index_add_(
        0, layout.block_document_K[layout.forced_K], layout.block_length_K[layout.forced_K]
    )
    rows_D = forced_rows + (budget_D - forced_blocks) * layout.block_size

    kept = _first(inside_K, blocks_kept)
    rows_N = _rows_of(layout, kept, int(rows_D.sum()), device)
    skipped = _first(~inside_K, total_blocks - blocks_kept)
    skipped_S = _rows_of(layout, skipped, layout.real_rows - int(rows_D.sum()), device)
    lengths = tuple(rows_D.tolist())
    if keep_K is None:
        return RowSet(rows_N, lengths, skipped_S)
    valid_N = keep_K[layout.block_of_row_N[rows_N]]
    # Rows that were not chosen go to the end of their document, where causal attention of the others cannot see them.
    order = torch.argsort(layout.document_of_row_N[rows_N] * 2 + (~valid_N).long(), stable=True)
    return RowSet(rows_N[order], lengths, skipped_S, valid_N[order])


def _first(mask_K: Tensor, count: int) -> Tensor:
    """Ascending indices where the mask holds; `count` of them, known to the host, so the device is not asked."""
    return torch.argsort(mask_K.to(torch.uint8), descending=True, stable=True)[:count]


def _rows_of(layout: Layout, blocks: Tensor, total: int, device: torch.device) -> Tensor:
    """Flat rows of blocks, `total` of them."""
    start, length = layout.block_start_K.to(device)[blocks], layout.block_length_K.to(device)[blocks]
    index = torch.repeat_interleave(torch.arange(len(blocks), device=device), length, output_size=total)
    return start[index] + torch.arange(total, device=device) - (torch.cumsum(length, 0) - length)[index]
