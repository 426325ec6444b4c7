"""Specification of rank_blocks and select_rows: one document after another, one block after another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SelectedRows(NamedTuple):
    """Rows of a batch, document by document.

    Attributes:
        rows_N: (capacity,) int64 flat rows on the device of the scores; in a document the chosen ones ascending, then
            those that were dropped, ascending.
        segment_lengths: rows of each document in `rows_N`; host integers.
        skipped_S: int64 ascending flat rows of the blocks outside the budgets.
        valid_N: (capacity,) bool, which entries of `rows_N` were chosen; None when nothing may be dropped.
    """

    rows_N: Tensor
    segment_lengths: tuple[int, ...]
    skipped_S: Tensor
    valid_N: Tensor | None


def rank_blocks_reference(scores_K: Tensor, block_document_K: Tensor, forced_K: Tensor) -> Tensor:
    """See `lemo.ops.rank_blocks` for the contract."""
    scores, forced, document = scores_K.tolist(), forced_K.tolist(), block_document_K.tolist()
    rank_K = torch.zeros(len(scores), dtype=torch.int64)
    for d in set(document):
        blocks = [k for k in range(len(scores)) if document[k] == d]
        forced_first = [k for k in blocks if forced[k]]
        # sorted is stable: equal scores keep the earlier block first. A score that is not a number comes last.
        others = sorted(
            (k for k in blocks if not forced[k]), key=lambda k: -scores[k] if scores[k] == scores[k] else float("inf")
        )
        for rank, k in enumerate(forced_first + others):
            rank_K[k] = rank
    return rank_K.to(scores_K.device)


def select_rows_reference(
    rank_K: Tensor,
    budget_D: Tensor,
    block_start_K: Tensor,
    block_length_K: Tensor,
    block_document_K: Tensor,
    forced_K: Tensor,
    *,
    keep_K: Tensor | None = None,
) -> SelectedRows:
    """See `lemo.ops.select_rows` for the contract."""
    rank, budget, document = rank_K.tolist(), budget_D.tolist(), block_document_K.tolist()
    runs = [range(s, s + n) for s, n in zip(block_start_K.tolist(), block_length_K.tolist(), strict=True)]
    rows, valid, lengths, skipped = [], [], [], []
    for d in range(len(budget)):
        blocks = [k for k in range(len(rank)) if document[k] == d]
        inside = [k for k in blocks if rank[k] < budget[d]]
        chosen = [k for k in inside if keep_K is None or bool(keep_K[k])]
        dropped = [k for k in inside if k not in chosen]
        entries = [row for k in chosen + dropped for row in runs[k]]
        rows += entries
        valid += [k in chosen for k in chosen + dropped for _ in runs[k]]
        lengths.append(len(entries))
        skipped += [row for k in blocks if k not in inside for row in runs[k]]
    device = rank_K.device
    return SelectedRows(
        torch.tensor(rows, dtype=torch.int64, device=device),
        tuple(lengths),
        torch.tensor(skipped, dtype=torch.int64, device=device),
        None if keep_K is None else torch.tensor(valid, dtype=torch.bool, device=device),
    )
