"""gather_rows: chosen rows of the residual stream as a compact tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_rows(x_NM: Tensor, rows: Tensor) -> Tensor:
    """Compact copy y = x[rows]; backward adds the gradient into zeros at `rows`.

    Args:
        x_NM: (..., M) any dtype; leading dimensions are flattened to rows.
        rows: (n,) int64 flat rows; may repeat.

    Returns:
        (n, M), dtype of `x_NM`.

    Raises:
        ValueError: `rows` is not a one-dimensional int64 tensor on the device of `x_NM`.

    Cost:
        n·M elements read and written; saves `rows`, not the stream, so the stream may be overwritten afterwards.

    Numerics:
        exact. Where `rows` repeat, their gradients are added in the dtype of `x_NM`.
    """
    if x_NM.dim() < 2:
        raise ValueError(f"x_NM must have at least 2 dimensions, got {tuple(x_NM.shape)}")
    if rows.dtype != torch.int64 or rows.dim() != 1 or rows.device != x_NM.device:
        raise ValueError(
            f"rows must be (n,) int64 on {x_NM.device}, got {tuple(rows.shape)} {rows.dtype} on {rows.device}"
        )
    # torch's own op, not a torch.library one of ours: its backward is index_add, and torch.compile can fuse it.
    return x_NM.reshape(-1, x_NM.shape[-1]).index_select(0, rows)
