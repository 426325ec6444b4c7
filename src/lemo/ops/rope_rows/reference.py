"""Plain torch specification of rope_rows_."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_rows_reference(
    state_NHD: Tensor,
    cos_PR: Tensor,
    sin_PR: Tensor,
    *,
    rows_N: Tensor | None = None,
    inverse: bool = False,
    interleaved: bool = False,
) -> Tensor:
    """Out-of-place, differentiable rope_rows_ of one state; see `lemo.ops.rope_rows_` for the contract."""
    rows_N = torch.arange(len(state_NHD), device=state_NHD.device) if rows_N is None else rows_N
    wide = torch.promote_types(state_NHD.dtype, torch.float32)
    cos_N1R, sin_N1R = (t.index_select(0, rows_N % len(t)).to(wide)[:, None] for t in (cos_PR, sin_PR))
    rotated, rest = state_NHD.split([cos_PR.shape[1], state_NHD.shape[2] - cos_PR.shape[1]], dim=2)
    x = rotated.to(wide)
    if interleaved:
        x = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
    if inverse:
        first, second = (x * sin_N1R).chunk(2, dim=-1)
        y = x * cos_N1R + torch.cat([second, -first], dim=-1)
    else:
        first, second = x.chunk(2, dim=-1)
        y = x * cos_N1R + torch.cat([-second, first], dim=-1) * sin_N1R
    if interleaved:
        y = torch.stack(y.chunk(2, dim=-1), dim=-1).flatten(-2)
    return torch.cat([y.to(state_NHD.dtype), rest], dim=2)
