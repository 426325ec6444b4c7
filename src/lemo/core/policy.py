"""From block scores to rows: `topk` fills a budget per document, `threshold` drops further blocks inside it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lemo.core.layout import Layout
from lemo.core.selection import RowSet, Selection
from lemo.errors import ConfigError
from lemo.ops import rank_blocks, select_rows
from lemo.ops.select_rows.reference import BlockTable

POLICIES = ("topk", "threshold")
RATIOS_OF = ("all", "context")


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


def document_budgets(layout: Layout, ratio: float, bucket: int = 1, ratio_of: str = "all") -> Tensor:
    """Blocks to keep of each document: (D,) int64 on the CPU.

    max(ceil(ratio · blocks), forced blocks), rounded up to a multiple of `bucket`, at most all blocks. Guards and
    supervised blocks count towards the ratio; where they exceed it they are all kept. With `ratio_of` "context" the
    ratio is that of the blocks without a supervised row, and supervised blocks come on top; guards still count.
    """
    return layout.once(("budgets", ratio, bucket, ratio_of), lambda: _budgets(layout, ratio, bucket, ratio_of))


def _budgets(layout: Layout, ratio: float, bucket: int, ratio_of: str) -> Tensor:
    documents = len(layout.document_start_D)
    blocks = torch.bincount(layout.block_document_K, minlength=documents)
    if ratio == 1:
        return blocks
    forced = torch.bincount(layout.block_document_K[layout.forced_K], minlength=documents)
    extra = torch.zeros_like(blocks)
    if ratio_of == "context":
        extra = torch.bincount(layout.block_document_K[layout.supervised_K], minlength=documents)
    wanted = torch.tensor([math.ceil(ratio * k - 1e-9) for k in (blocks - extra).tolist()], dtype=torch.int64)
    budget = torch.maximum(wanted + extra, forced)
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
    ratio_of: str = "all",
) -> Selection:
    """Rows of one layer from the scores of its blocks.

    Both sets come from one ranking, so backward rows are a subset of forward rows. No host synchronisation.

    Args:
        layout: documents and blocks of the batch.
        scores_K: (K,) floating scores of blocks, higher is kept first; ties keep the earlier block. On the device of
            the batch, or on the host: then the rows are found there and sent.
        forward_ratio: share of blocks of each document that run the layer.
        backward_ratio: share that also passes gradient.
        policy: `topk` fills the budgets; `threshold` also drops blocks that score below `threshold` from the backward
            set (and from the forward set where the two ratios are equal), forced ones excepted.
        threshold: least score of a block that is kept, `threshold` policy only.
        bucket: budgets are rounded up to a multiple of this many blocks.
        ratio_of: what ratios are shares of: `all` blocks, or those of the `context`, which hold no supervised row.

    Raises:
        ConfigError: ratios outside 0 < backward <= forward <= 1, an unknown policy or `ratio_of`, or `threshold`
            without a value.
    """
    check_ratios(forward_ratio, backward_ratio)
    if policy not in POLICIES:
        raise ConfigError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    if ratio_of not in RATIOS_OF:
        raise ConfigError(f"ratio_of must be one of {', '.join(RATIOS_OF)}, got {ratio_of!r}")
    keep_K = None
    if policy == "threshold":
        if threshold is None:
            raise ConfigError("policy 'threshold' needs a threshold for every layer; calibrate the plan first")
        device = scores_K.device
        forced_K = layout.once(("forced", device), lambda: layout.forced_K.to(device, non_blocking=True))
        keep_K = (scores_K >= threshold) | forced_K
    rank_K = rank_blocks(scores_K, block_table(layout))
    if backward_ratio == forward_ratio:
        share = (forward_ratio, bucket, ratio_of)
        both = _row_set(layout, rank_K, share, keep_K if forward_ratio < 1 else None)
        return Selection(both, both)
    forward = _row_set(layout, rank_K, (forward_ratio, bucket, ratio_of), None)
    return Selection(forward, _row_set(layout, rank_K, (backward_ratio, bucket, ratio_of), keep_K))


def _row_set(layout: Layout, rank_K: Tensor, share: tuple[float, int, str], keep_K: Tensor | None) -> RowSet | None:
    """Rows of the best-ranked blocks; None when that is every row of the batch and nothing may be dropped.

    `share` is the ratio, the bucket and what the ratio is of.
    """
    budget_D = document_budgets(layout, *share)
    everything = layout.once(("everything", *share), lambda: int(budget_D.sum()) == len(layout.block_start_K))
    if everything and keep_K is None:
        return None
    selected = select_rows(rank_K, budget_D, block_table(layout), keep_K=keep_K)
    rows = RowSet(selected.rows_N, selected.segment_lengths, selected.skipped_S, selected.valid_N)
    return rows.on(layout.device) if rows.rows_N.is_cpu else rows


def block_table(layout: Layout) -> BlockTable:
    """The layout's blocks as the ops take them; one per batch, so that copies to the device are made once."""
    return layout.once(
        "table of blocks",
        lambda: BlockTable(layout.block_start_K, layout.block_length_K, layout.block_document_K, layout.forced_K),
    )
