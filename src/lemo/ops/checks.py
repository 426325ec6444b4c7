"""What the row ops ask of their tensors and of the machine; none of it reads device data."""

from __future__ import annotations

import torch
from torch import Tensor


def check_rows(name: str, rows: Tensor, beside: Tensor) -> None:
    """Raises ValueError unless `rows` is one-dimensional int64 on the device of `beside`."""
    if rows.dtype != torch.int64 or rows.ndim != 1 or rows.device != beside.device:
        raise ValueError(f"{name} must be (n,) int64 on {beside.device}, got {show(rows)}")


def check_like(name: str, tensor: Tensor, shape: tuple[int, ...], beside: Tensor) -> None:
    """Raises ValueError unless `tensor` has this shape and the dtype and device of `beside`."""
    if tensor.shape != shape or tensor.dtype != beside.dtype or tensor.device != beside.device:
        raise ValueError(f"{name} must be {tuple(shape)} {beside.dtype} on {beside.device}, got {show(tensor)}")


def check_floating(name: str, tensor: Tensor, shape: tuple[int, ...], beside: Tensor) -> None:
    """Raises ValueError unless `tensor` is floating, of any precision, with this shape, on the device of `beside`."""
    if tensor.shape != shape or not tensor.is_floating_point() or tensor.device != beside.device:
        raise ValueError(f"{name} must be floating {tuple(shape)} on {beside.device}, got {show(tensor)}")


def check_flags(name: str, flags: Tensor, rows: Tensor) -> None:
    """Raises ValueError unless `flags` is bool, shaped as `rows` and on its device."""
    if flags.shape != rows.shape or flags.dtype != torch.bool or flags.device != rows.device:
        raise ValueError(f"{name} must be bool {tuple(rows.shape)} on {rows.device}, got {show(flags)}")


def flat_rows(name: str, tensor: Tensor) -> Tensor:
    """(..., M) as (N, M), sharing memory.

    Raises:
        ValueError: fewer than two dimensions, not floating, or not contiguous.
    """
    if tensor.ndim < 2 or not tensor.is_floating_point() or not tensor.is_contiguous():
        raise ValueError(f"{name} must be a contiguous floating tensor of at least 2 dimensions, got {show(tensor)}")
    return tensor if tensor.ndim == 2 else tensor.view(-1, tensor.shape[-1])


def show(tensor: Tensor) -> str:
    """Shape, strides where they matter, dtype and device, for messages."""
    strides = "" if tensor.is_contiguous() else f" with strides {tuple(tensor.stride())}"
    return f"{tuple(tensor.shape)}{strides} {tensor.dtype} on {tensor.device}"
