"""Inputs of norm_rows and its gradient for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lemo.ops.norm_rows.op import norm_rows, norm_rows_backward
from lemo.ops.norm_rows.reference import norm_rows_backward_reference, norm_rows_reference
from lemo.testing import Case, Inputs, OpSpec, draw_normal


@dataclass(frozen=True)
class Shape:
    """What a case draws.

    Attributes:
        shape: of the tensor that rows are taken from.
        rows: how many are gathered; None for all, without gathering.
        kind: `rms` or `layer`.
        bias: there is one.
        keep_rows: the rows are returned, too.
        residual: of the gradient.
        scattered: the gradient is written to rows of a larger tensor.
        wide: weight and bias stay in fp32 (fp64 for fp64).
    """

    shape: tuple[int, ...] = (23, 40)
    rows: int | None = 9
    kind: str = "rms"
    bias: bool = False
    keep_rows: bool = False
    residual: bool = False
    scattered: bool = False
    wide: bool = False

    def forward(self, generator: torch.Generator) -> Inputs:
        """Arguments of norm_rows, and `wide`."""
        width = self.shape[-1]
        x = draw_normal(*self.shape, generator=generator) + 0.5
        made: dict[str, Any] = {"x_NM": x, "weight_M": self._weight(generator), "eps": 1e-5, "kind": self.kind}
        if self.rows is not None:
            made["rows_n"] = torch.randperm(x.numel() // width, generator=generator)[: self.rows].sort().values
        if self.bias:
            made["bias_M"] = torch.randn(width, generator=generator, dtype=torch.float64)
        return made | {"keep_rows": self.keep_rows, "wide": self.wide}

    def backward(self, generator: torch.Generator) -> Inputs:
        """Arguments of `_backward`: the statistics follow from x there."""
        total, width = self.shape
        rows = total if self.rows is None else self.rows
        names = ["grad_nM", "x_nM", *(["residual_nM"] if self.residual else [])]
        made: dict[str, Any] = {name: draw_normal(rows, width, generator=generator) for name in names}
        made |= {"weight_M": self._weight(generator), "kind": self.kind, "weight_grad": self.bias, "wide": self.wide}
        if self.scattered:
            made["out_NM"] = draw_normal(total, width, generator=generator)
            if self.rows is not None:
                made["out_rows_n"] = torch.randperm(total, generator=generator)[:rows]
        return made

    def _weight(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.shape[-1], generator=generator, dtype=torch.float64) + 1.0


def _widened(inputs: Inputs) -> Inputs:
    """Inputs with weight and bias in fp32 at least, where the case asks for it."""
    wide = inputs.pop("wide", False)
    for name in ("weight_M", "bias_M") if wide else ():
        if name in inputs:
            inputs[name] = inputs[name].to(torch.promote_types(inputs[name].dtype, torch.float32))
    return inputs


def _forward(**inputs: Any) -> tuple:
    return norm_rows(**_widened(inputs))


def _forward_reference(**inputs: Any) -> tuple:
    return norm_rows_reference(**_widened(inputs))


def _prepare_backward(inputs: Inputs) -> Inputs:
    """Inputs with the statistics of x in place of `kind`."""
    inputs = _widened(dict(inputs))
    if "kind" in inputs:
        ones = inputs["x_nM"].new_ones(inputs["x_nM"].shape[1])
        _, _, rstd_n, mean_n = norm_rows_reference(inputs["x_nM"], ones, eps=1e-5, kind=inputs.pop("kind"))
        inputs |= {"rstd_n": rstd_n, "mean_n": mean_n}
    return inputs


def _backward(**inputs: Any) -> tuple:
    """norm_rows_backward with the statistics of x; what it wrote, and the sums it was asked for."""
    inputs = _prepare_backward(inputs)
    dx, d_weight, d_bias = norm_rows_backward(**inputs, bias_grad=inputs["weight_grad"])
    return inputs["out_NM"] if dx is None else dx, d_weight, d_bias


def _backward_reference(**inputs: Any) -> tuple:
    inputs = _prepare_backward(inputs)
    out, out_rows = inputs.pop("out_NM", None), inputs.pop("out_rows_n", None)
    wanted = inputs.pop("weight_grad")
    dx, *sums = norm_rows_backward_reference(**inputs)
    if out_rows is not None:
        dx = out.index_copy(0, out_rows, dx)
    return dx, *(sums if wanted else ())


def _naive_forward(**inputs: Any) -> Tensor:
    x = inputs["x_NM"].flatten(0, -2)[inputs["rows_n"]]
    if inputs["kind"] == "layer":
        return F.layer_norm(x, x.shape[1:], inputs["weight_M"], inputs.get("bias_M"), inputs["eps"])
    return F.rms_norm(x, x.shape[1:], inputs["weight_M"], inputs["eps"])


def _naive_backward(**inputs: Any) -> Tensor:
    """Zeros and scatter of the gradient as a whole, then an add: the out-of-place way."""
    dx, *_ = _backward_reference(**{k: v for k, v in inputs.items() if k not in ("out_NM", "out_rows_n")})
    spread = torch.zeros_like(inputs["out_NM"])
    spread[inputs["out_rows_n"]] = dx
    return inputs["out_NM"] + spread


def _size(inputs: Inputs, name: str) -> int:
    tensor = inputs.get(name)
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _count(inputs: Inputs) -> int:
    """How many rows are normed."""
    x, rows = inputs["x_NM"], inputs.get("rows_n")
    return x.numel() // x.shape[-1] if rows is None else len(rows)


def _forward_bytes(inputs: Inputs) -> int:
    x, rows, count = inputs["x_NM"], inputs.get("rows_n"), _count(inputs)
    copies = 3 if inputs["keep_rows"] and rows is not None else 2
    return count * (copies * x.shape[-1] * x.element_size() + 4)


def _backward_bytes(inputs: Inputs) -> int:
    return 3 * _size(inputs, "grad_nM") + _size(inputs, "residual_nM")


def _forward_case(name: str, **options: Any) -> Case:
    return Case(name, Shape(**options).forward, ulps=6.0)


def _backward_case(name: str, **options: Any) -> Case:
    return Case(name, Shape(**options).backward, ulps=6.0)


def _flops(inputs: Inputs) -> int:
    """Nominal: square and sum, scale and weigh."""
    return 4 * _count(inputs) * inputs["x_NM"].shape[-1]


def _flops_backward(inputs: Inputs) -> int:
    """Nominal: the norm again, a dot product of each row, and the gradient."""
    return 9 * inputs["grad_nM"].numel()


LARGE = (65536, 4096)

SPECS = (
    OpSpec(
        name="norm_rows",
        run=_forward,
        reference=_forward_reference,
        cases=(
            _forward_case("rows"),
            _forward_case("all rows", rows=None),
            _forward_case("all rows, kept", rows=None, keep_rows=True),
            _forward_case("rows kept", keep_rows=True),
            _forward_case("layer norm", kind="layer", bias=True),
            _forward_case("layer norm without bias, rows kept", kind="layer", keep_rows=True),
            _forward_case("bias", bias=True),
            _forward_case("batch", shape=(2, 9, 24), rows=7),
            _forward_case("heads", shape=(5, 3, 16), rows=None),
            _forward_case("no rows", rows=0, keep_rows=True),
            _forward_case("width 1", shape=(5, 1), rows=3),
            _forward_case("odd width", shape=(19, 77), rows=11, keep_rows=True),
            _forward_case("weight in fp32", wide=True, bias=True),
            _forward_case("wide", shape=(7, 1030), rows=3),
        ),
        benchmark_shapes=(_forward_case("32768 of 65536 x 4096", shape=LARGE, rows=32768),),
        flops=_flops,
        bytes_moved=_forward_bytes,
        naive=_naive_forward,
        prepare=_widened,
        ceiling="copy",
    ),
    OpSpec(
        name="norm_rows_backward",
        run=_backward,
        reference=_backward_reference,
        cases=(
            _backward_case("in place"),
            _backward_case("residual", residual=True),
            _backward_case("written to rows", scattered=True, residual=True),
            _backward_case("written row by row", scattered=True, rows=None),
            _backward_case("layer norm", kind="layer", residual=True),
            _backward_case("weight", bias=True),
            _backward_case("layer norm, weight and bias, written to rows", kind="layer", bias=True, scattered=True),
            _backward_case("weight, many rows", shape=(300, 20), rows=None, bias=True),
            _backward_case("no rows", rows=0, bias=True),
            _backward_case("odd width", shape=(19, 77), rows=11, bias=True),
            _backward_case("weight in fp32", wide=True, bias=True, residual=True),
        ),
        benchmark_shapes=(
            _backward_case("32768 of 65536 x 4096", shape=LARGE, rows=32768, residual=True, scattered=True),
        ),
        flops=_flops_backward,
        bytes_moved=_backward_bytes,
        naive=_naive_backward,
        prepare=_prepare_backward,
        ceiling="copy",
    ),
)
