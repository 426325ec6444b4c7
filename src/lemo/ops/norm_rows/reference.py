"""Plain torch specification of norm_rows and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_rows_reference(
    x_NM: Tensor,
    weight_M: Tensor,
    *,
    bias_M: Tensor | None = None,
    rows_n: Tensor | None = None,
    eps: float,
    kind: str = "rms",
    keep_rows: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Differentiable norm_rows; see `lemo.ops.norm_rows` for the contract."""
    x_nM = x_NM.reshape(-1, x_NM.shape[-1])
    if rows_n is not None:
        x_nM = x_nM.index_select(0, rows_n)
    wide = x_nM.to(torch.promote_types(x_nM.dtype, torch.float32))
    mean_n = wide.mean(-1) if kind == "layer" else None
    if mean_n is not None:
        wide = wide - mean_n[:, None]
    rstd_n = (wide.square().mean(-1) + eps).rsqrt()
    normed_nM = wide * rstd_n[:, None] * weight_M
    if bias_M is not None:
        normed_nM = normed_nM + bias_M
    return normed_nM.to(x_NM.dtype), x_nM if keep_rows else None, rstd_n, mean_n


def norm_rows_backward_reference(
    grad_nM: Tensor,
    x_nM: Tensor,
    weight_M: Tensor,
    rstd_n: Tensor,
    *,
    mean_n: Tensor | None = None,
    residual_nM: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Out-of-place: residual + gradient of the rows, gradients of weight and bias; see `norm_rows_backward`."""
    wide = rstd_n.dtype
    x, grad = x_nM.to(wide), grad_nM.to(wide)
    normed = (x if mean_n is None else x - mean_n[:, None]) * rstd_n[:, None]
    weighted = grad * weight_M
    dx = weighted - normed * (weighted * normed).mean(-1, keepdim=True)
    if mean_n is not None:
        dx = dx - weighted.mean(-1, keepdim=True)
    dx = dx * rstd_n[:, None]
    if residual_nM is not None:
        dx = dx + residual_nM
    return dx.to(grad_nM.dtype), (grad * normed).sum(0), grad.sum(0)
