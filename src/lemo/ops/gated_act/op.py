"""gated_act: act(gate)·up of an MLP, and its gradient with the activation recomputed in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from lemo.ops.backend import Backend, settle_backend
from lemo.ops.checks import check_like, show
from lemo.ops.gated_act.reference import (
    ACTS,
    Adapters,
    LowRank,
    gated_act_backward_reference,
    gated_act_reference,
)

MOST_RANK = 64
"""Of an adapter that the kernels add on the way: its second factor stays in registers."""


def gated_act(
    gate_nF: Tensor,
    up_nF: Tensor | None,
    act: str,
    *,
    adapters: Adapters = (None, None),
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """act(gate)·up, or act(gate) where `up_nF` is None. No autograd.

    With `adapters`, gate and up are what they are given as plus low·secondᵀ, which is never written.

    Args:
        gate_nF: (n, F) floating, contiguous inside rows, rows at any distance (a half of a fused projection).
        up_nF: (n, F), same dtype, contiguous inside rows; None for a plain MLP.
        act: `silu`, `gelu`, `gelu_tanh` or `relu`.
        adapters: what adapters of rank R <= 64 add to gate and to up, in their dtype; None for one without.
        out: (n, F) to write into; may be `gate_nF` or `up_nF`. None allocates.
        backend: `triton`, `reference`, or `auto` to take the kernel where it can run.

    Returns:
        (n, F) in the dtype of `gate_nF`; `out` if given.

    Raises:
        BackendError: `triton` was asked for and cannot run; the message says why.
        ValueError: shapes, strides, dtypes or devices do not fit, an unknown `act`, or a rank above 64.

    Cost:
        3·n·F elements moved (2·n·F without `up_nF`), with adapters n·R and F·R more.

    Numerics:
        fp32 (fp64 for fp64), one rounding.
    """
    _check(gate_nF, act, {"up_nF": up_nF, "out": out}, adapters)
    if settle_backend("gated_act", backend, gate_nF, lambda: _why_not_triton(gate_nF)) == "triton":
        from lemo.ops.gated_act import kernel

        out = torch.empty_like(gate_nF, memory_format=torch.contiguous_format) if out is None else out
        kernel.forward(gate_nF, up_nF, act, adapters, out)
        return out
    with torch.no_grad():
        value = gated_act_reference(gate_nF, up_nF, act, adapters)
    return value if out is None else out.copy_(value)


def gated_act_backward(
    grad_nF: Tensor,
    gate_nF: Tensor,
    up_nF: Tensor | None,
    act: str,
    *,
    adapters: Adapters = (None, None),
    want_act: bool = False,
    reuse: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of gate and up in one pass: grad·up·act'(gate) and grad·act(gate).

    Args:
        grad_nF: (n, F) gradient of the result, same dtype as `gate_nF`, contiguous inside rows.
        gate_nF: (n, F), as in `gated_act`.
        up_nF: (n, F); None for a plain MLP.
        act: as in `gated_act`.
        adapters: as in `gated_act`.
        want_act: also return act(gate)·up, which the gradient of the next linear layer needs.
        reuse: write into the arguments: the gradient of gate into `gate_nF`, of up into `up_nF`, and the activation
            into `grad_nF`. Nothing is allocated then. Without it no argument changes.
        backend: as in `gated_act`.

    Returns:
        Gradient of gate, of up (None without `up_nF`), and the activation (None unless wanted); each (n, F).

    Raises:
        BackendError: `triton` was asked for and cannot run.
        ValueError: as `gated_act`.

    Cost:
        5·n·F elements moved, 6·n·F with the activation (3 and 4 without `up_nF`).

    Numerics:
        fp32 (fp64 for fp64), one rounding of each result. The slope of relu at 0 is 0.
    """
    _check(gate_nF, act, {"grad_nF": grad_nF, "up_nF": up_nF}, adapters)
    if settle_backend("gated_act_backward", backend, gate_nF, lambda: _why_not_triton(gate_nF)) == "triton":
        from lemo.ops.gated_act import kernel

        fresh = torch.contiguous_format
        d_gate = gate_nF if reuse else torch.empty_like(gate_nF, memory_format=fresh)
        d_up = up_nF if reuse or up_nF is None else torch.empty_like(gate_nF, memory_format=fresh)
        value = None
        if want_act:
            value = grad_nF if reuse else torch.empty_like(gate_nF, memory_format=fresh)
        kernel.backward(grad_nF, gate_nF, up_nF, act, adapters, (d_gate, d_up, value))
        return d_gate, d_up, value
    with torch.no_grad():
        d_gate, d_up, value = gated_act_backward_reference(grad_nF, gate_nF, up_nF, act, adapters)
        if reuse:
            d_gate = gate_nF.copy_(d_gate)
            d_up = None if up_nF is None or d_up is None else up_nF.copy_(d_up)
            value = grad_nF.copy_(value) if want_act else None
    return d_gate, d_up, value if want_act else None


def _check(gate: Tensor, act: str, others: dict[str, Tensor | None], adapters: Adapters) -> None:
    if act not in ACTS:
        raise ValueError(f"act must be one of {', '.join(ACTS)}, got {act!r}")
    if not gate.is_floating_point():
        raise ValueError(f"gate_nF must be floating, got {show(gate)}")
    for name, tensor in {"gate_nF": gate, **others}.items():
        if tensor is None:
            continue
        check_like(name, tensor, gate.shape, gate)
        if tensor.ndim != 2 or (tensor.stride(1) != 1 and tensor.shape[1] > 1):
            raise ValueError(f"{name} must be (n, F) and contiguous inside rows, got {show(tensor)}")
    if others["up_nF"] is None and adapters[1] is not None:
        raise ValueError("an adapter of up needs up_nF")
    for name, adapter in zip(("gate", "up"), adapters, strict=True):
        if adapter is not None:
            _check_adapter(name, gate, adapter)


def _check_adapter(name: str, gate: Tensor, adapter: LowRank) -> None:
    rank = adapter.low_nR.shape[-1]
    sizes = {"low_nR": (gate.shape[0], rank), "second_FR": (gate.shape[1], rank)}
    for part, shape in sizes.items():
        tensor = getattr(adapter, part)
        check_like(f"{part} of {name}", tensor, shape, gate)
        if tensor.stride(1) != 1 and rank > 1:
            raise ValueError(f"{part} of {name} must be contiguous inside rows, got {show(tensor)}")
    if rank > MOST_RANK:
        raise ValueError(f"adapters of rank {MOST_RANK} and less are added on the way, got {rank} for {name}")


def _why_not_triton(gate: Tensor) -> str | None:
    try:
        from lemo.ops.gated_act import kernel
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return kernel.why_not(gate)
