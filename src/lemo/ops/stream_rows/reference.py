"""Plain torch specification of the ops that write the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

from lemo.ops.scatter_rows.reference import inverse_rms_reference


def write_rows_reference(
    old_nM: Tensor,
    values_nM: Tensor,
    *,
    residual_nM: Tensor | None = None,
    valid_n: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """What write_rows_ leaves in rows that held `old_nM`; see `lemo.ops.write_rows_` for the contract."""
    if residual_nM is not None or add:
        wide = torch.promote_types(values_nM.dtype, torch.float32)
        sum_nM = values_nM.to(wide) if residual_nM is None else values_nM.to(wide) + residual_nM
        values_nM = (sum_nM + old_nM if add else sum_nM).to(values_nM.dtype)
    return values_nM if valid_n is None else torch.where(valid_n[:, None], values_nM, old_nM)


def bypass_rows_reference(
    x_sM: Tensor, down_MR: Tensor, up_RM: Tensor, *, eps: float, apply_s: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(x + rmsnorm(x)·down·up, 1/rms) of compact rows; rows that are not applied stay as they are, with 1/rms 0."""
    rstd_s1 = inverse_rms_reference(x_sM, eps)
    if apply_s is not None:
        rstd_s1 = torch.where(apply_s[:, None], rstd_s1, 0)
    normed_sM = (x_sM.to(rstd_s1.dtype) * rstd_s1).to(x_sM.dtype)
    y_sM = x_sM + normed_sM @ down_MR @ up_RM
    # Where not applied the update is 0 unless x is not finite: such a row stays what it is, too.
    y_sM = y_sM if apply_s is None else torch.where(apply_s[:, None], y_sM, x_sM)
    return y_sM, rstd_s1.squeeze(1)


def bypass_rows_backward_reference(grad_sM: Tensor, rstd_s: Tensor, down_MR: Tensor, up_RM: Tensor) -> Tensor:
    """grad + rstd·(grad·upᵀ·downᵀ) of compact rows: 1/rms is a constant, the gradient approximate."""
    through_sM = grad_sM @ up_RM.mT @ down_MR.mT
    update_sM = (through_sM.to(rstd_s.dtype) * rstd_s[:, None]).to(grad_sM.dtype)
    return torch.where(rstd_s[:, None] != 0, grad_sM + update_sM, grad_sM)
