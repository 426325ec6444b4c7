"""Inputs of gated_act and its gradient for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lemo.ops.gated_act.op import gated_act, gated_act_backward
from lemo.ops.gated_act.reference import gated_act_backward_reference, gated_act_reference
from lemo.testing import Case, Inputs, OpSpec, draw_normal


@dataclass(frozen=True)
class Shape:
    """What a case draws.

    Attributes:
        shape: (n, F).
        act: the activation.
        gated: there is an `up`.
        fused: gate and up are the halves of one tensor.
        want_act: the gradient also returns the activation.
        reuse: the gradient writes into its arguments.
        scale: of the gate; large values reach the ends of exp.
    """

    shape: tuple[int, int] = (9, 40)
    act: str = "silu"
    gated: bool = True
    fused: bool = False
    want_act: bool = True
    reuse: bool = False
    scale: float = 1.5

    def forward(self, generator: torch.Generator) -> Inputs:
        """Arguments of gated_act."""
        rows, width = self.shape
        if self.fused:
            gate, up = draw_normal(rows, 2 * width, generator=generator).chunk(2, dim=1)
        else:
            gate, up = (draw_normal(rows, width, generator=generator) for _ in range(2))
            gate = self.scale * gate
        return {"gate_nF": gate, "up_nF": up if self.gated else None, "act": self.act}

    def backward(self, generator: torch.Generator) -> Inputs:
        """Arguments of gated_act_backward."""
        made = self.forward(generator)
        grad = draw_normal(*self.shape, generator=generator)
        return {"grad_nF": grad, **made, "want_act": self.want_act, "reuse": self.reuse}


def _backward_reference(**inputs: Any) -> tuple:
    names = ("grad_nF", "gate_nF", "up_nF", "act")
    d_gate, d_up, value = gated_act_backward_reference(*(inputs[name] for name in names))
    return d_gate, d_up, value if inputs["want_act"] else None


def _naive_forward(gate_nF: Tensor, up_nF: Tensor, act: str) -> Tensor:
    return F.silu(gate_nF) * up_nF


def _naive_backward(**inputs: Any) -> tuple:
    """What autograd of silu and a product launches, and the activation again."""
    grad, gate, up = (inputs[name] for name in ("grad_nF", "gate_nF", "up_nF"))
    value = F.silu(gate)
    return torch.ops.aten.silu_backward(grad * up, gate), grad * value, value * up


def _moved(inputs: Inputs, gated: int, plain: int) -> int:
    gate = inputs["gate_nF"]
    return (plain if inputs["up_nF"] is None else gated) * gate.numel() * gate.element_size()


def _forward_bytes(inputs: Inputs) -> int:
    return _moved(inputs, 3, 2)


def _backward_bytes(inputs: Inputs) -> int:
    extra = int(inputs["want_act"])
    return _moved(inputs, 5 + extra, 3 + extra)


def _flops(inputs: Inputs) -> int:
    return 0


_SETTINGS: dict[str, dict[str, Any]] = {
    "silu": {},
    "gelu": {"act": "gelu"},
    "gelu, tanh form": {"act": "gelu_tanh"},
    "relu": {"act": "relu"},
    "plain relu": {"act": "relu", "gated": False},
    "plain gelu": {"act": "gelu", "gated": False, "want_act": False},
    "halves of one tensor": {"fused": True},
    "large numbers": {"scale": 60.0},
    "large numbers, tanh form": {"scale": 60.0, "act": "gelu_tanh"},
    "odd width": {"shape": (5, 77)},
    "no rows": {"shape": (0, 16)},
}


def _cases(kind: str) -> tuple[Case, ...]:
    """The settings for `forward` or `backward`; the gradient with its own and with reused memory."""
    if kind == "forward":
        return tuple(Case(name, Shape(**options).forward) for name, options in _SETTINGS.items())
    return tuple(
        Case(f"{name}{', reused memory' * reuse}", Shape(**options, reuse=reuse).backward)
        for name, options in _SETTINGS.items()
        for reuse in (False, True)
    )


LARGE: dict[str, Any] = {"shape": (16384, 11008)}

SPECS = (
    OpSpec(
        name="gated_act",
        run=gated_act,
        reference=gated_act_reference,
        cases=_cases("forward"),
        benchmark_shapes=(Case("silu, 16384x11008", Shape(**LARGE).forward),),
        flops=_flops,
        bytes_moved=_forward_bytes,
        naive=_naive_forward,
        ceiling="copy",
    ),
    OpSpec(
        name="gated_act_backward",
        run=gated_act_backward,
        reference=_backward_reference,
        cases=_cases("backward"),
        benchmark_shapes=(Case("silu, 16384x11008", Shape(**LARGE).backward),),
        flops=_flops,
        bytes_moved=_backward_bytes,
        naive=_naive_backward,
        ceiling="copy",
    ),
)
