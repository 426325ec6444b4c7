"""Plain torch specification of dropout_rows."""

from __future__ import annotations

import torch
from torch import Tensor

Key = tuple[int, int]
"""Two numbers of 32 bits."""

MASK = 0xFFFFFFFF
ROW_STEP, COLUMN_STEP = 0x9E3779B1, 0x85EBCA77
FIRST, SECOND = 0x85EBCA6B, 0xC2B2AE35
ELEMENTS = 1 << 24  # whose 64-bit hashes exist at a time


def dropout_rows_reference(
    x_nM: Tensor, p: float, key: Key, rows_n: Tensor | None = None, *, into_nM: Tensor | None = None
) -> Tensor:
    """Differentiable x·mask/(1 - p) + into; see `lemo.ops.dropout_rows` for the contract."""
    wide = torch.promote_types(x_nM.dtype, torch.float32)
    rows_n = torch.arange(x_nM.shape[0], device=x_nM.device) if rows_n is None else rows_n
    lines = max(1, ELEMENTS // max(1, x_nM.shape[1]))
    masks = [keep_mask(rows, x_nM.shape[1], p, key) for rows in rows_n.split(lines)]
    mask_nM = torch.cat(masks) if masks else x_nM.bool()
    value = x_nM.to(wide) * mask_nM * (1.0 / (1.0 - p))
    return (value if into_nM is None else value + into_nM).to(x_nM.dtype)


def keep_mask(rows_n: Tensor, width: int, p: float, key: Key) -> Tensor:
    """(n, width) bool: true with probability 1 - p, the same for the same key, row and column.

    32-bit arithmetic in 64-bit numbers: products wrap, and their low 32 bits are those of the 32-bit product.
    """
    columns = torch.arange(width, device=rows_n.device)
    row_hash = _mixed((rows_n * ROW_STEP + key[0]) & MASK)
    column_hash = _mixed((columns * COLUMN_STEP + key[1]) & MASK)
    return _mixed(row_hash[:, None] ^ column_hash) >= threshold(p)


def threshold(p: float) -> int:
    """Hashes below it are dropped."""
    return min(round(p * 2**32), MASK)


def _mixed(state: Tensor) -> Tensor:
    """Every bit of the result depends on every bit of the 32-bit state; one to one."""
    state = ((state ^ (state >> 16)) * FIRST) & MASK
    state = ((state ^ (state >> 13)) * SECOND) & MASK
    return state ^ (state >> 16)
