"""Plain torch specification of pool_blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

POOLS = ("mean", "max", "lse")
ROWS_AT_ONCE = 32768


class Blocks(NamedTuple):
    """Where the blocks of a batch lie; tensors on the device of the rows.

    Attributes:
        start_K: (K,) int64 first flat row of each block.
        length_K: (K,) int64 rows of each block, at least 1.
        rows: the most rows that a block has; known to the host.
    """

    start_K: Tensor
    length_K: Tensor
    rows: int


def pool_blocks_reference(
    x_NM: Tensor,
    projection_MF: Tensor,
    blocks: Blocks,
    *,
    pools: Sequence[str] = POOLS,
    extra_KE: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """RMS norm, projection and pooling in fp32 (fp64 for fp64); see `lemo.ops.pool_blocks` for the contract."""
    wide = torch.promote_types(x_NM.dtype, torch.float32)
    projected = []
    for part_NM in x_NM.split(ROWS_AT_ONCE):
        part_NM = part_NM.to(wide)
        normed_NM = part_NM * torch.rsqrt(part_NM.square().mean(-1, keepdim=True) + eps)
        projected.append(normed_NM @ projection_MF.to(wide))
    projected_NF, members = torch.cat(projected), rows_of_blocks(blocks)
    features = [pool_rows_reference(projected_NF, members, pool) for pool in pools]
    return torch.cat([*features, *([] if extra_KE is None else [extra_KE.to(wide)])], -1)


def rows_of_blocks(blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of each block (K, C), the last one repeated past a short block's end; which are real; and lengths (K, 1)."""
    length_K1 = blocks.length_K[:, None]
    offset_1C = torch.arange(blocks.rows, device=length_K1.device)[None]
    return blocks.start_K[:, None] + torch.minimum(offset_1C, length_K1 - 1), offset_1C < length_K1, length_K1


def pool_rows_reference(value_NF: Tensor, members: tuple[Tensor, Tensor, Tensor], pool: str) -> Tensor:
    """Mean, max or log-mean-exp of rows over each block: (K, F). `members` as `rows_of_blocks` makes them."""
    rows_KC, inside_KC, length_K1 = members
    rows_KCF = value_NF[rows_KC]
    if pool == "max":
        # Rows past a short block's end repeat its last row, which leaves the maximum alone.
        return rows_KCF.amax(1)
    if pool == "lse":
        outside_KC1 = ~inside_KC[..., None]
        return rows_KCF.masked_fill(outside_KC1, -torch.inf).logsumexp(1) - torch.log(length_K1.to(value_NF.dtype))
    return (rows_KCF * inside_KC[..., None]).sum(1) / length_K1
