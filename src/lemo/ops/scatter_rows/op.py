"""scatter_rows: the residual stream after a layer that only some rows ran."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lemo.ops.scatter_rows.reference import inverse_rms_reference

# Rows of the bypass computed at a time: bounds the fp32 copy that the norm needs.
BYPASS_CHUNK_ROWS = 8192


def scatter_rows(
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
    inplace: bool = True,
) -> Tensor:
    """Residual stream y after a layer: y = x; y[rows] = values; constants and bypass on other rows.

    | rows of the stream x | value of y | gradient of y goes to |
    |---|---|---|
    | `rows_N` (valid) | `values_NM` | `values_NM`; none to x |
    | `constant_rows` | `constant_values` | x, unchanged (y = x + stopgrad(value - x)) |
    | `skipped_rows` | x + rmsnorm(x)·down·up | x, with 1/rms held constant |
    | `rows_N`, `valid_N` false | a constant row's if it is one, else a skipped row's | x likewise, not `values_NM` |
    | all others | x | x, unchanged |

    Args:
        stream_NM: (..., M) floating; leading dimensions are flattened to rows.
        rows_N: (n,) int64 distinct flat rows.
        values_NM: (n, M), same dtype as the stream.
        constant_rows: (c,) int64 distinct flat rows; may contain entries of `rows_N`, which win where valid.
        constant_values: (c, M), same dtype as the stream; no gradient reaches them.
        skipped_rows: (s,) int64 distinct flat rows, disjoint from the two above; without `down_MR` they pass unchanged.
        down_MR: (M, R) bypass, a constant, same dtype as the stream.
        up_RM: (R, M) bypass, a constant, same dtype as the stream.
        eps: added to the mean square of a row.
        valid_N: (n,) bool; None when every entry of `rows_N` is chosen.
        inplace: write into `stream_NM`. Where autograd refuses that (a leaf that requires grad, a view of one, one of
            several views, an inference tensor, a tensor that is not contiguous), the stream is copied once instead.

    Returns:
        y, of the stream's shape and dtype; the same tensor object as `stream_NM` when written in place.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the bypass requires grad.

    Cost:
        (n + c + s)·M elements written, 4·s·M·R FLOPs; saves the index tensors and 4 bytes per bypassed row.

    Numerics:
        rms in fp32 (fp64 for fp64), bypass products in the stream's dtype. The gradient of the bypass is approximate:
        1/rms is a constant. In place equals out of place bit for bit.

    Source:
        LeMo section 4 (rows that are dropped ride on in the residual stream); docs/method.md.
    """
    writes = _Writes(rows_N, valid_N, constant_rows, constant_values, skipped_rows, down_MR, up_RM, eps)
    _check(stream_NM, values_NM, writes)
    return _ScatterRows.apply(stream_NM, values_NM, writes, inplace and writable(stream_NM, values_NM.requires_grad))


class _Writes(NamedTuple):
    """Everything scatter_rows writes besides the values that carry gradient."""

    rows: Tensor
    valid: Tensor | None
    constant_rows: Tensor | None
    constant_values: Tensor | None
    skipped: Tensor | None
    down: Tensor | None
    up: Tensor | None
    eps: float


class _ScatterRows(torch.autograd.Function):
    """An autograd.Function and not a torch.library op: custom ops may not mutate an input that needs gradient.

    (`torch.library.custom_op` refuses to register autograd for an op with `mutates_args`; its out-of-place form
    would hold two residual streams per layer, which is what this op exists to avoid.)
    """

    @staticmethod
    def forward(ctx: Any, stream: Tensor, values: Tensor, writes: _Writes, inplace: bool) -> Tensor:
        y = stream if inplace else stream.clone(memory_format=torch.contiguous_format)
        flat = y.view(-1, y.shape[-1])
        # Rows that were not chosen are read before anything is written: `flat` may be the stream itself.
        unchosen_scale = None
        if writes.valid is not None:
            unchosen, unchosen_scale = _unchosen(flat, writes)
        if writes.constant_rows is not None:
            flat.index_copy_(0, writes.constant_rows, writes.constant_values.detach())
        skipped_scale = _bypass_(flat, writes)
        if writes.valid is not None:
            values = torch.where(writes.valid[:, None], values, unchosen)
        flat.index_copy_(0, writes.rows, values)
        if inplace:
            ctx.mark_dirty(stream)
        ctx.save_for_backward(
            writes.rows, writes.valid, writes.skipped, writes.down, writes.up, skipped_scale, unchosen_scale
        )
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, valid, skipped, down, up, skipped_scale, unchosen_scale = ctx.saved_tensors
        grad = grad_y.reshape(-1, grad_y.shape[-1])
        grad_stream = grad_values = None
        if ctx.needs_input_grad[1]:
            grad_values = grad.index_select(0, rows)
            if valid is not None:
                grad_values = torch.where(valid[:, None], grad_values, 0)
        if ctx.needs_input_grad[0]:
            grad_stream = grad.clone(memory_format=torch.contiguous_format)
            if skipped_scale is not None:
                for at in range(0, len(skipped), BYPASS_CHUNK_ROWS):
                    chunk = slice(at, at + BYPASS_CHUNK_ROWS)
                    grad_rows = grad.index_select(0, skipped[chunk])
                    grad_stream.index_copy_(0, skipped[chunk], _bypass_grad(grad_rows, skipped_scale[chunk], down, up))
            if valid is None:
                grad_stream.index_fill_(0, rows, 0)
            else:
                grad_rows = grad.index_select(0, rows)
                if unchosen_scale is not None:
                    grad_rows = _bypass_grad(grad_rows, unchosen_scale, down, up)
                grad_stream.index_copy_(0, rows, torch.where(valid[:, None], 0, grad_rows))
            grad_stream = grad_stream.view(grad_y.shape)
        return grad_stream, grad_values, None, None


def _unchosen(flat: Tensor, writes: _Writes) -> tuple[Tensor, Tensor | None]:
    """Values of entries of `rows` in case they are not chosen, and their 1/rms (0 where no bypass acts)."""
    x = flat.index_select(0, writes.rows)
    unchosen, scale = x, None
    if writes.down is not None:
        scale = inverse_rms_reference(x, writes.eps)
        unchosen = _bypass(x, scale, writes)
    if writes.constant_rows is not None:
        # Position of a row among the constants, without asking the device: -1 for rows that are none.
        place = torch.full((len(flat),), -1, device=flat.device)
        place[writes.constant_rows] = torch.arange(len(writes.constant_rows), device=flat.device)
        place = place[writes.rows, None]
        if len(writes.constant_rows):
            constant = writes.constant_values.detach().index_select(0, place.squeeze(1).clamp(min=0))
            unchosen = torch.where(place >= 0, constant, unchosen)
        scale = None if scale is None else torch.where(place >= 0, 0, scale)
    return unchosen, scale


def _bypass_(flat: Tensor, writes: _Writes) -> Tensor | None:
    """Adds the bypass to skipped rows of `flat` in place; returns their 1/rms, (s, 1)."""
    if writes.skipped is None or writes.down is None:
        return None
    scales = []
    for rows in writes.skipped.split(BYPASS_CHUNK_ROWS):
        x = flat.index_select(0, rows)
        scales.append(inverse_rms_reference(x, writes.eps))
        flat.index_copy_(0, rows, _bypass(x, scales[-1], writes))
    return torch.cat(scales)


def _bypass(x: Tensor, scale: Tensor, writes: _Writes) -> Tensor:
    normed = (x.to(scale.dtype) * scale).to(x.dtype)
    return x + normed @ writes.down @ writes.up


def _bypass_grad(grad: Tensor, scale: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Gradient of x + (x · scale)·down·up with respect to x, scale constant."""
    through = grad @ up.mT @ down.mT
    return grad + (through.to(scale.dtype) * scale).to(grad.dtype)


def writable(stream: Tensor, requires_grad: bool) -> bool:
    """Whether autograd lets an operation write values, which require grad or do not, into `stream` here."""
    if not stream.is_contiguous() or (stream.is_inference() and not torch.is_inference_mode_enabled()):
        return False
    if not torch.is_grad_enabled() or not (stream.requires_grad or requires_grad):
        return True
    if stream.requires_grad and stream.is_leaf:
        return False
    if not stream._is_view():
        return True
    if stream._base.requires_grad and stream._base.is_leaf:
        return False
    # Views made by unbind, split, no_grad or a custom function are refused only after the write: ask before it.
    meta = torch._C._autograd
    return meta._get_creation_meta(stream) == meta.CreationMeta.DEFAULT


def _check(stream: Tensor, values: Tensor, writes: _Writes) -> None:
    """Raises ValueError where shapes, dtypes or devices do not fit; reads no device data."""
    if not stream.is_floating_point() or stream.dim() < 2:
        raise ValueError(f"stream_NM must be a floating tensor of at least 2 dimensions, got {_show(stream)}")
    width = stream.shape[-1]
    _check_rows("rows_N", writes.rows, stream)
    _check_like("values_NM", values, (len(writes.rows), width), stream)
    if (writes.constant_rows is None) != (writes.constant_values is None):
        raise ValueError("constant_rows and constant_values must be given together")
    if writes.constant_rows is not None:
        _check_rows("constant_rows", writes.constant_rows, stream)
        _check_like("constant_values", writes.constant_values, (len(writes.constant_rows), width), stream)
    if writes.skipped is not None:
        _check_rows("skipped_rows", writes.skipped, stream)
    if (writes.down is None) != (writes.up is None):
        raise ValueError("down_MR and up_RM must be given together")
    if writes.down is not None:
        _check_like("down_MR", writes.down, (width, writes.down.shape[-1]), stream)
        _check_like("up_RM", writes.up, (writes.down.shape[-1], width), stream)
        if torch.is_grad_enabled() and (writes.down.requires_grad or writes.up.requires_grad):
            raise ValueError("down_MR and up_RM are constants here and get no gradient: detach them")
    if writes.valid is not None and (
        writes.valid.dtype != torch.bool
        or writes.valid.shape != writes.rows.shape
        or writes.valid.device != stream.device
    ):
        raise ValueError(f"valid_N must be bool, shaped as rows_N and beside the stream, got {_show(writes.valid)}")


def _check_rows(name: str, rows: Tensor, stream: Tensor) -> None:
    if rows.dtype != torch.int64 or rows.dim() != 1 or rows.device != stream.device:
        raise ValueError(f"{name} must be (n,) int64 on {stream.device}, got {_show(rows)}")


def _check_like(name: str, tensor: Tensor, shape: tuple[int, ...], stream: Tensor) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != stream.dtype or tensor.device != stream.device:
        raise ValueError(f"{name} must be {shape} {stream.dtype} on {stream.device}, got {_show(tensor)}")


def _show(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
