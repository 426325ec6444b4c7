"""norm_rows: RMSNorm or LayerNorm of chosen rows in one pass, and its gradient written where it belongs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lemo.ops.backend import Backend, settle_backend
from lemo.ops.checks import check_floating, check_like, check_rows, flat_rows
from lemo.ops.norm_rows.reference import norm_rows_backward_reference, norm_rows_reference


def norm_rows(
    x_NM: Tensor,
    weight_M: Tensor,
    *,
    bias_M: Tensor | None = None,
    rows_n: Tensor | None = None,
    eps: float,
    kind: Literal["rms", "layer"] = "rms",
    keep_rows: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gathers rows and norms them: (x - mean)·rstd·weight + bias, with mean 0 for `rms`. No autograd.

    Args:
        x_NM: (..., M) floating and contiguous; leading dimensions are flattened to rows.
        weight_M: (M,) floating, of any precision.
        bias_M: (M,) floating; None for none.
        rows_n: (n,) int64 flat rows; None for all of them, in order.
        eps: added to the mean square (`rms`) or the variance (`layer`).
        kind: `rms` or `layer`.
        keep_rows: return the rows as they were read, too.
        backend: `triton`, `reference`, or `auto` to take the kernel where it can run.

    Returns:
        The normed rows (n, M) in the dtype of `x_NM`; the rows themselves, a compact copy (n, M) (the flattened `x_NM`
        where `rows_n` is None), or None; rstd (n,) and mean (n,; None for `rms`), fp32 or fp64 for fp64.

    Raises:
        BackendError: `triton` was asked for and cannot run; the message says why.
        ValueError: shapes, dtypes or devices do not fit.

    Cost:
        2·n·M elements moved, 3·n·M with a copy of the rows.

    Numerics:
        statistics and products in fp32 (fp64 for fp64), one rounding at the end.

    Source:
        LeMo section 4 (permutation-free loading); docs/method.md.
    """
    x = flat_rows("x_NM", x_NM)
    if kind not in ("rms", "layer"):
        raise ValueError(f"kind must be rms or layer, got {kind!r}")
    check_floating("weight_M", weight_M, x.shape[1:], x)
    if bias_M is not None:
        check_floating("bias_M", bias_M, x.shape[1:], x)
    if rows_n is not None:
        check_rows("rows_n", rows_n, x)
    if settle_backend("norm_rows", backend, x, lambda: _why_not_triton(x), x.shape[1]) == "triton":
        from lemo.ops.norm_rows import kernel

        return kernel.forward(x, weight_M, bias_M, rows_n, eps, kind == "layer", keep_rows)
    with torch.no_grad():
        return norm_rows_reference(x, weight_M, bias_M=bias_M, rows_n=rows_n, eps=eps, kind=kind, keep_rows=keep_rows)


def norm_rows_backward(
    grad_nM: Tensor,
    x_nM: Tensor,
    weight_M: Tensor,
    rstd_n: Tensor,
    *,
    mean_n: Tensor | None = None,
    residual_nM: Tensor | None = None,
    out_NM: Tensor | None = None,
    out_rows_n: Tensor | None = None,
    weight_grad: bool = False,
    bias_grad: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradient of norm_rows on compact rows: dx = residual + rstd·(g - mean(g) - x̂·mean(g·x̂)), g = grad·weight.

    x̂ is the normed row before the weight; mean(g) is left out for `rms`. **Without `out_NM`, dx overwrites `grad_nM`.**

    Args:
        grad_nM: (n, M) contiguous gradient of the normed rows.
        x_nM: (n, M) the rows, same dtype, contiguous.
        weight_M: (M,) floating.
        rstd_n: (n,) of the forward pass, fp32 or fp64.
        mean_n: (n,) of the forward pass; given for `layer` and only then.
        residual_nM: (n, M) added to dx; None for nothing. May be `grad_nM`, or `out_NM` where `out_rows_n` is None.
        out_NM: (..., M) contiguous; the rows of dx are written straight into it.
        out_rows_n: (n,) int64 distinct flat rows of `out_NM`; None for row by row.
        weight_grad: also return the gradient of the weight.
        bias_grad: also return the gradient of the bias.
        backend: as in `norm_rows`.

    Returns:
        dx (n, M), which is `grad_nM`, or None with `out_NM`; gradients of weight and bias (M,) in the dtype of
        `rstd_n`, or None.

    Raises:
        BackendError: `triton` was asked for and cannot run.
        ValueError: shapes, dtypes or devices do not fit.

    Cost:
        3·n·M elements moved, 4·n·M with a residual; with gradients of weight or bias 4·M bytes per program more.

    Numerics:
        all in fp32 (fp64 for fp64), one rounding of dx. Weight gradients are summed in two fixed stages: repeated runs
        agree bit for bit.
    """
    grad, x = flat_rows("grad_nM", grad_nM), flat_rows("x_nM", x_nM)
    out = None if out_NM is None else flat_rows("out_NM", out_NM)
    _check_backward(grad, x, weight_M, (rstd_n, mean_n), residual_nM, (out, out_rows_n))
    target = grad if out is None else out
    if settle_backend("norm_rows_backward", backend, x, lambda: _why_not_triton(x), x.shape[1]) == "triton":
        from lemo.ops.norm_rows import kernel

        sums = kernel.backward(
            grad, x, weight_M, rstd_n, mean_n, residual_nM, target, out_rows_n, weight_grad, bias_grad
        )
    else:
        with torch.no_grad():
            dx, *sums = norm_rows_backward_reference(grad, x, weight_M, rstd_n, mean_n=mean_n, residual_nM=residual_nM)
            if out_rows_n is None:
                target.copy_(dx)
            else:
                target.index_copy_(0, out_rows_n, dx)
    return grad if out is None else None, sums[0] if weight_grad else None, sums[1] if bias_grad else None


def _check_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    statistics: tuple[Tensor, Tensor | None],
    residual: Tensor | None,
    target: tuple[Tensor | None, Tensor | None],
) -> None:
    check_like("x_nM", x, grad.shape, grad)
    check_floating("weight_M", weight, grad.shape[1:], grad)
    rstd, mean = statistics
    wide = torch.promote_types(grad.dtype, torch.float32)
    for name, statistic in (("rstd_n", rstd), ("mean_n", mean)):
        if statistic is not None:
            check_floating(name, statistic, grad.shape[:1], grad)
            if statistic.dtype != wide:
                raise ValueError(f"{name} must be {wide}, got {statistic.dtype}")
    if residual is not None:
        check_like("residual_nM", residual, grad.shape, grad)
    out, out_rows = target
    if out_rows is not None:
        if out is None:
            raise ValueError("out_rows_n names rows of out_NM, which is missing")
        check_rows("out_rows_n", out_rows, grad)
        check_like("out_NM", out, (out.shape[0], grad.shape[1]), grad)
        if out_rows.shape[0] != grad.shape[0]:
            raise ValueError(f"out_rows_n has {len(out_rows)} rows, grad_nM {len(grad)}")
    elif out is not None:
        check_like("out_NM", out, grad.shape, grad)


def _why_not_triton(x: Tensor) -> str | None:
    try:
        from lemo.ops.norm_rows import kernel
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return kernel.why_not(x)
