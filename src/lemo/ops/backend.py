"""Which implementation of an op runs: asked for by name, or chosen and logged once."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from lemo.errors import BackendError

Backend = Literal["auto", "triton", "reference"]

_log = logging.getLogger("lemo")
_logged: set[tuple[str, str, str]] = set()


def choose_backend(op: str, backend: Backend, why_not_triton: Callable[[], str | None]) -> Backend:
    """Resolves `backend` for one call of an op.

    Args:
        op: name of the op, for messages.
        backend: `triton` and `reference` are obeyed; `auto` takes triton where it can run and logs its choice once.
        why_not_triton: returns the reason why the Triton kernel cannot run on this input, or None if it can.

    Returns:
        `triton` or `reference`.

    Raises:
        BackendError: `triton` was asked for and cannot run, or the name is unknown.
    """
    if backend not in ("auto", "triton", "reference"):
        raise BackendError(f"backend of {op} must be auto, triton or reference, got {backend!r}")
    if backend == "reference":
        return backend
    reason = why_not_triton()
    if backend == "triton":
        if reason is not None:
            raise BackendError(f"{op}: backend 'triton' cannot run here: {reason}")
        return backend
    chosen, because = ("triton", "it can run") if reason is None else ("reference", f"triton cannot run: {reason}")
    log_choice(op, chosen, because)
    return chosen


def choose_with_vendor(
    op: str, backend: str, why_not_vendor: Callable[[], str | None], why_not_triton: Callable[[], str | None]
) -> str:
    """As `choose_backend`, for ops that a vendor's kernels can do, too: `auto` takes those where they can run.

    Returns:
        `vendor`, `triton` or `reference`.

    Raises:
        BackendError: the backend asked for cannot run, or the name is unknown.
    """
    if backend in ("auto", "vendor"):
        reason = why_not_vendor()
        if reason is None:
            if backend == "auto":
                log_choice(op, "vendor", "it can run")
            return "vendor"
        if backend == "vendor":
            raise BackendError(f"{op}: backend 'vendor' cannot run here: {reason}")
    return choose_backend(op, backend, why_not_triton)  # type: ignore[arg-type]


_settled: dict[tuple, Backend] = {}


def settle_backend(
    op: str, backend: Backend, tensor: Tensor, why_not_triton: Callable[[], str | None], *sizes: int
) -> Backend:
    """`choose_backend`, asked once for each dtype, device and `sizes`: all that `why_not_triton` may depend on.

    Ops that run several times a layer spend more time on asking than on launching.
    """
    key = (op, backend, tensor.dtype, tensor.device, *sizes)
    found = _settled.get(key)
    if found is None:
        found = _settled[key] = choose_backend(op, backend, why_not_triton)
    return found


def log_choice(op: str, chosen: str, because: str) -> None:
    """Says once which backend `auto` took, and why."""
    if (op, chosen, because) not in _logged:
        _logged.add((op, chosen, because))
        _log.info("%s uses backend %s (%s)", op, chosen, because)


@cache
def interpreting() -> bool:
    """Whether Triton was told, before its import, to run kernels in its CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_no_kernel(tensor: Tensor) -> str | None:
    """Why no Triton kernel of this package runs on a tensor of this dtype and device; None if one may."""
    return _why_no_kernel(tensor.dtype, tensor.device)


@cache  # asked at every launch
def _why_no_kernel(dtype: torch.dtype, device: torch.device) -> str | None:
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it takes fp16, bf16 and fp32, not {dtype}"
    if interpreting():
        return "the interpreter has no bf16" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return f"the tensors are on {device.type}, it needs a CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    return None


def shared_memory_bytes() -> int:
    """Shared memory that one program may take on the current CUDA device."""
    return _shared_memory_bytes(torch.cuda.current_device())


@cache
def _shared_memory_bytes(device: int) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def padded(size: int) -> int:
    """Next power of two, at least 16, the least a matrix instruction takes."""
    return max(16, 1 << (size - 1).bit_length())


_NOTHING = contextlib.nullcontext()


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device the current one, where kernels are launched; nothing on the CPU."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device. Pinned memory lets the copy run without the host waiting for the device."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# Of tensors that share one piece of memory: no kernel can tell them from such as have memory of their own.
ALIGNMENT_BYTES = 256


def send_all(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the host on a device, as `send` does, in one copy; they share their memory there."""
    if not tensors:
        return []
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.numel() * tensor.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    packed = torch.empty(max(end, 1), dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    views = [_typed(packed, start, tensor) for start, tensor in zip(starts, tensors, strict=True)]
    for view, tensor in zip(views, tensors, strict=True):
        view.copy_(tensor)
    if device.type == "cpu":
        return views
    sent = packed.to(device, non_blocking=True)
    return [_typed(sent, start, tensor) for start, tensor in zip(starts, tensors, strict=True)]


def _typed(packed: Tensor, start: int, like: Tensor) -> Tensor:
    return packed[start : start + like.numel() * like.itemsize].view(like.dtype).view(like.shape)


class HostCopy:
    """A tensor on its way to the host. The copy begins at once and lets the host go on; `read` waits for it."""

    def __init__(self, tensor: Tensor) -> None:
        """Begins to copy; a tensor of the host is the copy itself."""
        self._copy, self._copied = tensor, None
        if tensor.is_cuda:
            target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy, self._copied = target.copy_(tensor, non_blocking=True), torch.cuda.Event()
            self._copied.record()

    def read(self) -> Tensor:
        """The copy, once the device has come past the place where it was asked for."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy
