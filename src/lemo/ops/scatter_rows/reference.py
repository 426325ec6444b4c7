"""Plain torch specification of scatter_rows."""

from __future__ import annotations

import torch
from torch import Tensor


def scatter_rows_reference(
    stream_NM: Tensor,
    rows_N: Tensor,
    values_NM: Tensor,
    *,
    constant_rows: Tensor | None = None,
    constant_values: Tensor | None = None,
    skipped_rows: Tensor | None = None,
    down_MR: Tensor | None = None,
    up_RM: Tensor | None = None,
    eps: float = 1e-6,
    valid_N: Tensor | None = None,
) -> Tensor:
    """Out-of-place scatter_rows; see `lemo.ops.scatter_rows` for the contract.

    Its autograd gradient is the specified one: exact for `values_NM`, identity for constant rows, and the gradient of
    the bypass with 1/rms held constant.
    """
    x_NM = stream_NM.reshape(-1, stream_NM.shape[-1])
    y_NM = x_NM
    if constant_rows is not None and constant_values is not None:
        x = x_NM.index_select(0, constant_rows)
        # x - x.detach() is zero: the value is exactly the constant, the gradient exactly the identity.
        y_NM = y_NM.index_copy(0, constant_rows, constant_values.detach() + (x - x.detach()))
    if skipped_rows is not None and down_MR is not None and up_RM is not None:
        y_NM = y_NM.index_copy(
            0, skipped_rows, bypass_reference(x_NM.index_select(0, skipped_rows), down_MR, up_RM, eps)
        )
    if valid_N is not None:
        unchosen = x_NM.index_select(0, rows_N)
        if down_MR is not None and up_RM is not None:
            unchosen = bypass_reference(unchosen, down_MR, up_RM, eps)
        if constant_rows is not None:
            is_constant = torch.zeros_like(x_NM[:, 0], dtype=torch.bool).index_fill(0, constant_rows, True)
            unchosen = torch.where(is_constant[rows_N, None], y_NM.index_select(0, rows_N), unchosen)
        values_NM = torch.where(valid_N[:, None], values_NM, unchosen)
    return y_NM.index_copy(0, rows_N, values_NM).reshape(stream_NM.shape)


def bypass_reference(x_NM: Tensor, down_MR: Tensor, up_RM: Tensor, eps: float) -> Tensor:
    """x + rmsnorm(x)·down·up, with 1/rms (fp32) constant in backward and `down`, `up` constants."""
    inverse_rms = inverse_rms_reference(x_NM, eps)
    normed = (x_NM.to(inverse_rms.dtype) * inverse_rms).to(x_NM.dtype)
    return x_NM + normed @ down_MR.detach() @ up_RM.detach()


def inverse_rms_reference(x_NM: Tensor, eps: float) -> Tensor:
    """(N, 1) 1/sqrt(mean(x²) + eps), without gradient; fp32, or fp64 for fp64 input."""
    wide = x_NM.detach().to(torch.promote_types(x_NM.dtype, torch.float32))
    return (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
