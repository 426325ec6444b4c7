"""Plain torch specification of gather_rows."""

from __future__ import annotations

from torch import Tensor


def gather_rows_reference(x_NM: Tensor, rows: Tensor) -> Tensor:
    """y = x[rows]; see `lemo.ops.gather_rows` for the contract."""
    return x_NM.reshape(-1, x_NM.shape[-1])[rows]
