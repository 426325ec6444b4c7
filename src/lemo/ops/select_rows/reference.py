"""Specification of rank_blocks and select_rows: one document after another, one block after another."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class BlockTable:
    """The blocks of a batch as the host knows them; K of them, tensors on the CPU.

    Attributes:
        start_K: int64 first flat row of each block, ascending.
        length_K: int64 rows of each block; blocks that are not forced all have one length.
        document_K: int64 document of each block, ascending.
        forced_K: bool, blocks that are always taken.

    Raises:
        ValueError: shapes do not fit, the tensors are not on the CPU, or blocks that are not forced differ in length.
    """

    start_K: Tensor
    length_K: Tensor
    document_K: Tensor
    forced_K: Tensor

    def __post_init__(self) -> None:
        """Checks once what every layer relies on."""
        tensors = (self.start_K, self.length_K, self.document_K, self.forced_K)
        if any(t.dim() != 1 or t.shape != self.start_K.shape for t in tensors):
            raise ValueError(f"a table of blocks holds (K,) tensors, got {[tuple(t.shape) for t in tensors]}")
        if any(t.device.type != "cpu" for t in tensors):
            raise ValueError("a table of blocks must be on the CPU, where reading it asks no device")
        competing = self.length_K[~self.forced_K]
        if len(competing) and bool((competing != competing[0]).any()):
            raise ValueError("blocks that are not forced must all have one length")

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made once: every layer asks for the same host-side arithmetic and copies."""
        made: dict[Hashable, T] = self.__dict__.setdefault("_once", {})
        if key not in made:
            made[key] = make()
        return made[key]


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


def rank_blocks_reference(scores_K: Tensor, table: BlockTable) -> Tensor:
    """See `lemo.ops.rank_blocks` for the contract."""
    scores, forced, document = scores_K.tolist(), table.forced_K.tolist(), table.document_K.tolist()
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
    rank_K: Tensor, budget_D: Tensor, table: BlockTable, *, keep_K: Tensor | None = None
) -> SelectedRows:
    """See `lemo.ops.select_rows` for the contract."""
    rank, budget, document = rank_K.tolist(), budget_D.tolist(), table.document_K.tolist()
    runs = [range(s, s + n) for s, n in zip(table.start_K.tolist(), table.length_K.tolist(), strict=True)]
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
