"""rank_blocks and select_rows: which rows run a layer, given the scores of its blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lemo.ops.backend import Backend, choose_backend, send
from lemo.ops.host import repeat
from lemo.ops.select_rows.reference import BlockTable, SelectedRows


def rank_blocks(scores_K: Tensor, table: BlockTable, *, backend: Backend = "auto") -> Tensor:
    """Rank of each block inside its document, 0 first: forced blocks in order, then the others by falling score.

    Ties keep the earlier block first; a score that is not a number comes last, with those that are -inf.

    Args:
        scores_K: (K,) floating, on any device.
        table: the blocks of the batch.
        backend: `triton`, `reference` (torch's sorts), or `auto` to take the kernel where it can run.

    Returns:
        (K,) int64 on the device of `scores_K`.

    Raises:
        BackendError: `triton` was asked for and cannot run; the message says why.
        ValueError: shapes do not fit.

    Cost:
        the kernel compares every pair of blocks of a document, one launch; else two sorts of K numbers. No host
        synchronisation; what the table says is copied to the device once.
    """
    _check(scores_K, table)
    chosen = choose_backend("rank_blocks", backend, lambda: _why_not_triton(scores_K, table))
    scores_K = scores_K.detach()
    if chosen == "triton" and len(scores_K):
        from lemo.ops.select_rows import kernel

        return kernel.rank(scores_K, _spans(table, scores_K.device))
    _, _, document_K, forced_K = _on(table, scores_K.device)
    score_K = scores_K.nan_to_num(nan=-torch.inf, posinf=torch.finfo(scores_K.dtype).max, neginf=-torch.inf)
    score_K = torch.where(forced_K, torch.inf, score_K)
    by_score = torch.argsort(score_K, descending=True, stable=True)
    order = by_score[torch.argsort(document_K[by_score], stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - _spans(table, order.device)[0][order]
    return rank


def select_rows(
    rank_K: Tensor, budget_D: Tensor, table: BlockTable, *, keep_K: Tensor | None = None, backend: Backend = "auto"
) -> SelectedRows:
    """Rows of the blocks whose rank is below their document's budget, in a number that the host knows beforehand.

    Args:
        rank_K: (K,) int64 of `rank_blocks`, on any device.
        budget_D: (D,) int64 on the CPU, blocks to take of each document; at least its forced blocks.
        table: the blocks of the batch.
        keep_K: (K,) bool on the device of `rank_K`: blocks inside the budget where it is false are dropped, that is,
            their rows come last in their document and are marked not valid. None drops nothing.
        backend: `triton`, `reference` (torch's sorts), or `auto` to take the kernel where it can run.

    Returns:
        SelectedRows, tensors on the device of `rank_K`.

    Raises:
        BackendError: `triton` was asked for and cannot run; the message says why.
        ValueError: shapes do not fit, or a budget lies below the forced blocks or above all blocks.

    Cost:
        the kernel visits every pair of blocks of a document, one launch; else two sorts of K and, with `keep_K`, one of
        N numbers. No host synchronisation; what the table and the budgets say is copied to the device once.
    """
    _check(rank_K, table)
    if keep_K is not None and (keep_K.shape != rank_K.shape or keep_K.dtype != torch.bool):
        raise ValueError(f"keep_K must be ({len(rank_K)},) bool, got {tuple(keep_K.shape)} {keep_K.dtype}")
    budget = _budget(table, budget_D)
    chosen = choose_backend("select_rows", backend, lambda: _why_not_triton(rank_K, table))
    if chosen == "triton" and len(rank_K):
        from lemo.ops.select_rows import kernel

        sizes = budget.rows, budget.skipped, _longest(table)
        rows_N, skipped_S, valid_N = kernel.select(rank_K, keep_K, budget.on(table, rank_K.device), sizes)
        return SelectedRows(rows_N, budget.lengths, skipped_S, valid_N)
    return _select_by_sorting(rank_K, budget, table, keep_K)


@dataclass(frozen=True, eq=False)
class _Budget:
    """What follows from the budgets alone: rows of each document, rows and blocks in all, each block's budget."""

    lengths: tuple[int, ...]
    rows: int
    skipped: int
    blocks: int
    of_block_K: Tensor

    def on(self, table: BlockTable, device: torch.device) -> Tensor:
        """All that the kernel reads of each block, (7, K) int64 on the device, copied once.

        Start, length, first block of the document and the one behind its last, budget, and where the document's rows
        begin among the chosen and among the skipped ones.
        """
        return table.once((id(self), device), lambda: self._columns(table, device))

    def _columns(self, table: BlockTable, device: torch.device) -> Tensor:
        lengths_D = torch.tensor(self.lengths)
        document_K = table.document_K
        all_D = torch.zeros_like(lengths_D).index_add_(0, document_K, table.length_K)
        skipped_D = all_D - lengths_D
        chosen_at_K = (lengths_D.cumsum(0) - lengths_D)[document_K]
        skipped_at_K = (skipped_D.cumsum(0) - skipped_D)[document_K]
        spans = _document_spans(table)
        columns = (table.start_K, table.length_K, *spans, self.of_block_K, chosen_at_K, skipped_at_K)
        return send(torch.stack(columns), device)


def _budget(table: BlockTable, budget_D: Tensor) -> _Budget:
    """Budgets, checked and worked out once per table and value."""
    return table.once(("budget", *budget_D.tolist()), lambda: _work_out(table, budget_D))


def _work_out(table: BlockTable, budget_D: Tensor) -> _Budget:
    documents = len(budget_D)
    blocks_D = torch.bincount(table.document_K, minlength=documents)
    forced_D = torch.bincount(table.document_K[table.forced_K], minlength=documents)
    if len(blocks_D) != documents or bool(((budget_D < forced_D) | (budget_D > blocks_D)).any()):
        raise ValueError("budget_D must lie between the forced blocks and all blocks of each document")
    competing = table.length_K[~table.forced_K]
    rows_D = torch.zeros(documents, dtype=torch.int64)
    rows_D.index_add_(0, table.document_K[table.forced_K], table.length_K[table.forced_K])
    rows_D = rows_D + (budget_D - forced_D) * (competing[0] if len(competing) else 0)
    rows = int(rows_D.sum())
    skipped = int(table.length_K.sum()) - rows
    return _Budget(tuple(rows_D.tolist()), rows, skipped, int(budget_D.sum()), budget_D[table.document_K])


def _select_by_sorting(rank_K: Tensor, budget: _Budget, table: BlockTable, keep_K: Tensor | None) -> SelectedRows:
    """Stable sorts bring the blocks of each kind to the front, in a number that the host knows."""
    device = rank_K.device
    start_K, length_K, document_K, _ = _on(table, device)
    inside_K = rank_K < table.once((id(budget), "blocks", device), lambda: send(budget.of_block_K, device))
    blocks, skipped = _first(inside_K, budget.blocks), _first(~inside_K, len(rank_K) - budget.blocks)
    rows_N = expand_runs(start_K[blocks], length_K[blocks], budget.rows)
    skipped_S = expand_runs(start_K[skipped], length_K[skipped], budget.skipped)
    if keep_K is None:
        return SelectedRows(rows_N, budget.lengths, skipped_S, None)
    block_N = torch.repeat_interleave(blocks, length_K[blocks], output_size=budget.rows)
    valid_N = keep_K[block_N]
    # Rows that were dropped go to the end of their document, where causal attention of the others cannot see them.
    order = torch.argsort(document_K[block_N] * 2 + (~valid_N).long(), stable=True)
    return SelectedRows(rows_N[order], budget.lengths, skipped_S, valid_N[order])


def _first(mask_K: Tensor, count: int) -> Tensor:
    """Ascending indices where the mask holds; `count` of them, known to the host, so the device is not asked."""
    if mask_K.device.type == "cpu":
        return mask_K.nonzero().squeeze(1)
    return torch.argsort(mask_K.to(torch.uint8), descending=True, stable=True)[:count]


def expand_runs(start: Tensor, length: Tensor, total: int) -> Tensor:
    """Rows of consecutive runs, `total` of them: start[0], start[0]+1, ..., start[1], ... as int64."""
    shift = start - (torch.cumsum(length, 0) - length)
    on_host = start.device.type == "cpu"
    rows = repeat(shift, length) if on_host else torch.repeat_interleave(shift, length, output_size=total)
    return rows.add_(torch.arange(total, device=start.device))


def _document_spans(table: BlockTable) -> tuple[Tensor, Tensor]:
    """First block of each block's document, and the one behind its last: two (K,) int64 on the CPU."""
    blocks_D = torch.bincount(table.document_K)
    end_K = torch.cumsum(blocks_D, 0)[table.document_K]
    return end_K - blocks_D[table.document_K], end_K


def _spans(table: BlockTable, device: torch.device) -> Tensor:
    """(3, K) int64 on the device: first block of the document, the one behind its last, and whether forced."""
    return table.once(
        ("spans", device), lambda: send(torch.stack([*_document_spans(table), table.forced_K.long()]), device)
    )


def _on(table: BlockTable, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The table's tensors on the device, copied once."""
    columns = (table.start_K, table.length_K, table.document_K, table.forced_K)
    start, length, document, forced = table.once(("table", device), lambda: tuple(send(t, device) for t in columns))
    return start, length, document, forced


def _check(per_block_K: Tensor, table: BlockTable) -> None:
    if per_block_K.shape != table.start_K.shape:
        raise ValueError(f"a number per block is needed, ({len(table.start_K)},), got {tuple(per_block_K.shape)}")


def _why_not_triton(per_block: Tensor, table: BlockTable) -> str | None:
    try:
        from lemo.ops.select_rows import kernel
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return kernel.why_not(per_block, _longest(table))


def _longest(table: BlockTable) -> int:
    return table.once("longest block", lambda: int(table.length_K.max()) if len(table.length_K) else 0)
