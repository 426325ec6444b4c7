"""Inputs of gated_act and its gradient for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lemo.ops.gated_act.op import gated_act, gated_act_backward
from lemo.ops.gated_act.reference import Adapters, LowRank, gated_act_backward_reference, gated_act_reference
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
        ranks: of what adapters add to gate and up; 0 for one without, None for no adapters at all.
    """

    shape: tuple[int, int] = (9, 40)
    act: str = "silu"
    gated: bool = True
    fused: bool = False
    want_act: bool = True
    reuse: bool = False
    scale: float = 1.5
    ranks: tuple[int, int] | None = None

    def forward(self, generator: torch.Generator) -> Inputs:
        """Arguments of gated_act."""
        rows, width = self.shape
        if self.fused:
            gate, up = draw_normal(rows, 2 * width, generator=generator).chunk(2, dim=1)
        else:
            gate, up = (draw_normal(rows, width, generator=generator) for _ in range(2))
            gate = self.scale * gate
        made = {"gate_nF": gate, "up_nF": up if self.gated else None, "act": self.act}
        return made if self.ranks is None else {**made, "adapters": self._adapters(generator, self.ranks)}

    def _adapters(self, generator: torch.Generator, ranks: tuple[int, int]) -> Adapters:
        """Their first products are halves of one tensor, as a layer makes them."""
        rows, width = self.shape
        lows = draw_normal(rows, sum(ranks), generator=generator).split(ranks, dim=1)
        seconds = [0.2 * draw_normal(width, rank, generator=generator) for rank in ranks]
        gate, up = (LowRank(low, second) if low.shape[1] else None for low, second in zip(lows, seconds, strict=True))
        return gate, up

    def backward(self, generator: torch.Generator) -> Inputs:
        """Arguments of gated_act_backward."""
        made = self.forward(generator)
        grad = draw_normal(*self.shape, generator=generator)
        return {"grad_nF": grad, **made, "want_act": self.want_act, "reuse": self.reuse}


def _backward_reference(**inputs: Any) -> tuple:
    names = ("grad_nF", "gate_nF", "up_nF", "act")
    d_gate, d_up, value = gated_act_backward_reference(
        *(inputs[name] for name in names), inputs.get("adapters", (None, None))
    )
    return d_gate, d_up, value if inputs["want_act"] else None


def _naive_forward(gate_nF: Tensor, up_nF: Tensor, act: str, adapters: Adapters = (None, None)) -> Tensor:
    gate, up = (_added(x, adapter) for x, adapter in zip((gate_nF, up_nF), adapters, strict=True))
    return F.silu(gate) * up


def _added(x: Tensor, adapter: LowRank | None) -> Tensor:
    return x if adapter is None else x.addmm(adapter.low_nR, adapter.second_FR.T)


def _naive_backward(**inputs: Any) -> tuple:
    """What autograd of silu and a product launches, and the activation again."""
    grad, gate, up = (inputs[name] for name in ("grad_nF", "gate_nF", "up_nF"))
    gate, up = (_added(x, a) for x, a in zip((gate, up), inputs.get("adapters", (None, None)), strict=True))
    value = F.silu(gate)
    return torch.ops.aten.silu_backward(grad * up, gate), grad * value, value * up


def _moved(inputs: Inputs, gated: int, plain: int) -> int:
    gate = inputs["gate_nF"]
    factors = [t.numel() for adapter in inputs.get("adapters", ()) if adapter for t in adapter]
    return ((plain if inputs["up_nF"] is None else gated) * gate.numel() + sum(factors)) * gate.element_size()


def _forward_bytes(inputs: Inputs) -> int:
    return _moved(inputs, 3, 2)


def _backward_bytes(inputs: Inputs) -> int:
    extra = int(inputs["want_act"])
    return _moved(inputs, 5 + extra, 3 + extra)


def _flops(inputs: Inputs, each: int = 6) -> int:
    """Nominal: so many operations for each element, and the adapters' products."""
    adapted = sum(2 * a.low_nR.shape[1] for a in inputs.get("adapters", ()) if a is not None)
    return (each + adapted) * inputs["gate_nF"].numel()


def _flops_backward(inputs: Inputs) -> int:
    return _flops(inputs, 16)


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
    "adapters": {"ranks": (8, 8), "shape": (37, 72)},
    "adapters of different ranks, odd width": {"ranks": (3, 20), "shape": (5, 77)},
    "adapter of up alone, tanh form": {"ranks": (0, 16), "act": "gelu_tanh"},
    "plain relu, adapter": {"ranks": (4, 0), "act": "relu", "gated": False},
    "halves of one tensor, adapters": {"ranks": (8, 8), "fused": True},
    "no rows, adapters": {"shape": (0, 16), "ranks": (8, 8)},
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
        benchmark_shapes=(
            Case("silu, 16384x11008", Shape(**LARGE).forward),
            Case("silu, 16384x11008, adapters of rank 8", Shape(**LARGE, ranks=(8, 8)).forward),
        ),
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
        benchmark_shapes=(
            Case("silu, 16384x11008", Shape(**LARGE).backward),
            Case("silu, 16384x11008, adapters of rank 8", Shape(**LARGE, ranks=(8, 8)).backward),
        ),
        flops=_flops_backward,
        bytes_moved=_backward_bytes,
        naive=_naive_backward,
        ceiling="copy",
    ),
)
