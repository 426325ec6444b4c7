"""Plain torch specification of gated_act and its gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ACTS = ("silu", "gelu", "gelu_tanh", "relu")


class LowRank(NamedTuple):
    """What an adapter adds to a linear map's output, as two factors: low·secondᵀ.

    Attributes:
        low_nR: (n, R) rows behind the first factor, contiguous inside rows.
        second_FR: (F, R) second factor with its scale, contiguous inside rows.
    """

    low_nR: Tensor
    second_FR: Tensor


Adapters = tuple[LowRank | None, LowRank | None]


def with_adapter(x_nF: Tensor, adapter: LowRank | None) -> Tensor:
    """x, or x + low·secondᵀ, in at least fp32."""
    wide = x_nF.to(torch.promote_types(x_nF.dtype, torch.float32))
    return wide if adapter is None else torch.addmm(wide, adapter.low_nR.to(wide), adapter.second_FR.to(wide).T)


def gated_act_reference(gate_nF: Tensor, up_nF: Tensor | None, act: str, adapters: Adapters = (None, None)) -> Tensor:
    """Differentiable gated_act; see `lemo.ops.gated_act` for the contract."""
    gate = with_adapter(gate_nF, adapters[0])
    value = {
        "silu": lambda: F.silu(gate),
        "gelu": lambda: F.gelu(gate),
        "gelu_tanh": lambda: F.gelu(gate, approximate="tanh"),
        "relu": lambda: F.relu(gate),
    }[act]()
    return (value if up_nF is None else value * with_adapter(up_nF, adapters[1])).to(gate_nF.dtype)


def gated_act_backward_reference(
    grad_nF: Tensor, gate_nF: Tensor, up_nF: Tensor | None, act: str, adapters: Adapters = (None, None)
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of gate and up, and the activation again; see `gated_act_backward`."""
    gate = with_adapter(gate_nF, adapters[0])
    grad = grad_nF.to(gate.dtype)
    value, slope = _value_and_slope(gate, act)
    if up_nF is None:
        return (grad * slope).to(gate_nF.dtype), None, value.to(gate_nF.dtype)
    up = with_adapter(up_nF, adapters[1])
    d_gate, d_up, out = grad * up * slope, grad * value, value * up
    return d_gate.to(gate_nF.dtype), d_up.to(gate_nF.dtype), out.to(gate_nF.dtype)


def _value_and_slope(x: Tensor, act: str) -> tuple[Tensor, Tensor]:
    if act == "relu":
        return F.relu(x), (x > 0).to(x.dtype)
    if act == "gelu":
        share = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return x * share, share + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    # silu is x·sigmoid(x), and the tanh form of gelu is x·sigmoid(2u) because 1 + tanh(u) = 2·sigmoid(2u).
    inner, inner_slope = x, 1.0
    if act == "gelu_tanh":
        scale = 2 * math.sqrt(2 / math.pi)
        inner, inner_slope = scale * (x + 0.044715 * x**3), scale * (1 + 3 * 0.044715 * x * x)
    share = torch.sigmoid(inner)
    return x * share, share + x * share * (1 - share) * inner_slope
