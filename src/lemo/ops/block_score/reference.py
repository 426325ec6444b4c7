"""Plain torch specification of block_score."""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes of scores that exist at a time.
LIMIT_BYTES = 1 << 27


def block_score_reference(
    query_HND: Tensor,
    key_GND: Tensor,
    block_start_K: Tensor,
    block_length_K: Tensor,
    block_document_K: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """Differentiable block_score; see `lemo.ops.block_score` for the contract.

    Blocks may come in any order. Scores are formed for a slice of query blocks at a time, one head after another.
    """
    wide = torch.promote_types(query_HND.dtype, torch.float32)
    start, length, document = (t.cpu() for t in (block_start_K, block_length_K, block_document_K))
    blocks = len(start)
    block_of_row = torch.repeat_interleave(torch.arange(blocks), length)
    rows = start[block_of_row] + torch.arange(len(block_of_row)) - (torch.cumsum(length, 0) - length)[block_of_row]
    limit_rows = max(LIMIT_BYTES // (max(len(rows), 1) * wide.itemsize), 1)

    lines = []
    for first, last in _slices(length.tolist(), limit_rows):
        chosen = (block_of_row >= first) & (block_of_row < last)
        keys = torch.isin(document[block_of_row], document[first:last].unique())
        q_rows, k_rows = (t.to(query_HND.device) for t in (rows[chosen], rows[keys]))
        q_block, k_block = (t.to(query_HND.device) for t in (block_of_row[chosen] - first, block_of_row[keys]))
        s_QS = _scores(query_HND[:, q_rows].to(wide), key_GND[:, k_rows].to(wide), scaling, softcap)
        documents = document.to(query_HND.device)
        seen = (k_rows <= q_rows[:, None]) & (documents[k_block] == documents[q_block + first][:, None])
        s_QS = torch.where(seen, s_QS, 0)
        by_key = s_QS.new_zeros(len(q_rows), blocks).scatter_reduce(1, k_block.expand_as(s_QS), s_QS, "amax")
        lines.append(
            by_key.new_zeros(last - first, blocks).scatter_reduce(0, q_block[:, None].expand_as(by_key), by_key, "amax")
        )
    return torch.cat(lines) if lines else query_HND.new_zeros(0, 0, dtype=wide)


def _scores(query_HQD: Tensor, key_GSD: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """s_ij = mean over heads of relu(q_i·k_j·scaling), (Q, S); never more than one head's scores beside the sum."""
    heads, groups = query_HQD.shape[0], key_GSD.shape[0]
    total = query_HQD.new_zeros(query_HQD.shape[1], key_GSD.shape[1])
    for head in range(heads):
        logits = (query_HQD[head] @ key_GSD[head // (heads // groups)].mT) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        total = total + torch.relu(logits)
    return total / heads


def _slices(length: list[int], limit_rows: int) -> list[tuple[int, int]]:
    """Runs of blocks [first, last) of at most `limit_rows` rows, one block at least."""
    runs, first, rows = [], 0, 0
    for block, count in enumerate(length):
        if rows and rows + count > limit_rows:
            runs.append((first, block))
            first, rows = block, 0
        rows += count
    return [*runs, (first, len(length))] if length else []


def key_block_scores_reference(pairs_KK: Tensor, block_document_K: Tensor) -> Tensor:
    """Score of key block n = mean of pairs[m, n] over the query blocks m >= n of its document; (K,)."""
    document = block_document_K.to(pairs_KK.device)
    counted = (document[:, None] == document).tril()
    return torch.where(counted, pairs_KK, 0).sum(0) / counted.sum(0)
