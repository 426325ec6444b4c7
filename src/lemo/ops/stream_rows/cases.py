"""Inputs of the ops that write the residual stream, for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lemo.ops.stream_rows.op import bypass_rows_, bypass_rows_backward_, write_rows_
from lemo.ops.stream_rows.reference import (
    bypass_rows_backward_reference,
    bypass_rows_reference,
    write_rows_reference,
)
from lemo.testing import Case, Inputs, OpSpec, draw_normal


@dataclass(frozen=True)
class Shape:
    """What a case draws.

    Attributes:
        shape: of the stream.
        rows: how many are written.
        rank: of the bypass.
        residual: one is added.
        flags: some rows are left alone.
        add: values are added to what the rows hold.
        scale: of the bypass; small where a benchmark adds it again and again.
    """

    shape: tuple[int, ...] = (41, 40)
    rows: int = 17
    rank: int = 5
    residual: bool = False
    flags: bool = False
    add: bool = False
    scale: float = 1.0

    def write(self, generator: torch.Generator) -> Inputs:
        """Arguments of write_rows_."""
        stream, rows = self._stream(generator)
        draw = partial(draw_normal, self.rows, self.shape[-1], generator=generator)
        made: dict[str, Any] = {"stream_NM": stream, "rows_n": rows, "values_nM": draw()}
        if self.residual:
            made["residual_nM"] = draw()
        if self.flags:
            made["valid_n"] = torch.rand(self.rows, generator=generator) < 0.5
        return made | {"add": True} if self.add else made

    def bypass(self, generator: torch.Generator) -> Inputs:
        """Arguments of bypass_rows_."""
        stream, rows = self._stream(generator)
        made: dict[str, Any] = {"stream_NM": stream, "rows_s": rows, **self._maps(generator)}
        if self.flags:
            made["apply_s"] = torch.rand(self.rows, generator=generator) < 0.5
        return made

    def bypass_backward(self, generator: torch.Generator) -> Inputs:
        """Arguments of bypass_rows_backward_; rstd stays in fp32 at least, and is 0 for some rows."""
        grad, rows = self._stream(generator)
        rstd = torch.rand(self.rows, generator=generator, dtype=torch.float64) + 0.5
        if self.flags:
            rstd *= torch.rand(self.rows, generator=generator) < 0.5
        return {"grad_NM": grad, "rows_s": rows, "rstd_s": rstd, **self._maps(generator)}

    def _stream(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        stream = draw_normal(*self.shape, generator=generator)
        order = torch.randperm(stream.numel() // self.shape[-1], generator=generator)
        return stream, order[: self.rows].sort().values

    def _maps(self, generator: torch.Generator) -> dict[str, Tensor]:
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        width = self.shape[-1]
        down, up = draw(width, self.rank) / width**0.5, draw(self.rank, width) / max(self.rank, 1) ** 0.5
        return {"down_MR": down, "up_RM": self.scale * up}


@dataclass(frozen=True)
class Layer:
    """A whole layer's output: some rows are written with their residual, all others get the bypass; for the benchmark.

    Attributes:
        shape: of the stream.
        keep: share of rows that ran.
        rank: of the bypass.
    """

    shape: tuple[int, int] = (32768, 4096)
    keep: float = 0.5
    rank: int = 64

    def inputs(self, generator: torch.Generator) -> Inputs:
        """Arguments of `write_layer`."""
        kept = round(self.shape[0] * self.keep)
        order = torch.randperm(self.shape[0], generator=generator)
        made = Shape(self.shape, kept, self.rank, residual=True, scale=1e-3).bypass(generator)
        values, residual = (draw_normal(kept, self.shape[1], generator=generator) for _ in range(2))
        made |= {"rows_n": order[:kept].sort().values, "rows_s": order[kept:].sort().values}
        return made | {"values_nM": values, "residual_nM": residual}


def write_layer(**inputs: Any) -> None:
    """Output, residual add and bypass in place."""
    stream, backend = inputs["stream_NM"], inputs.get("backend", "auto")
    write_rows_(stream, inputs["rows_n"], inputs["values_nM"], residual_nM=inputs["residual_nM"], backend=backend)
    bypass_rows_(stream, inputs["rows_s"], inputs["down_MR"], inputs["up_RM"], backend=backend)


def naive_layer(**inputs: Any) -> Tensor:
    """The same work by whole tensors: index, compute, zeros and scatter, add.

    The residual stands for a first summand of the layer's update here, which spares this side a gather.
    """
    stream, skipped = inputs["stream_NM"], inputs["rows_s"]
    x = stream[skipped]
    update = torch.zeros_like(stream)
    update[skipped] = F.rms_norm(x, x.shape[1:], eps=1e-6) @ inputs["down_MR"] @ inputs["up_RM"]
    rows = inputs["rows_n"]
    update[rows] = inputs["values_nM"] + inputs["residual_nM"]
    return stream + update


def layer_bytes(inputs: Inputs) -> int:
    """Values and residual read, stream rows written; skipped rows read and written."""
    width = inputs["stream_NM"].shape[1] * inputs["stream_NM"].element_size()
    return (3 * len(inputs["rows_n"]) + 2 * len(inputs["rows_s"])) * width


LAYERS = {"keep-0.5": Layer(keep=0.5), "keep-0.3": Layer(keep=0.3)}


def _write(**inputs: Any) -> Tensor:
    write_rows_(**inputs)
    return inputs["stream_NM"]


def _write_reference(**inputs: Any) -> Tensor:
    stream, rows = inputs.pop("stream_NM"), inputs.pop("rows_n")
    flat = stream.flatten(0, -2)
    return flat.index_copy(0, rows, write_rows_reference(flat[rows], **inputs)).view(stream.shape)


def _naive_write(**inputs: Any) -> Tensor:
    stream, rows = inputs["stream_NM"], inputs["rows_n"]
    update = torch.zeros_like(stream)
    update[rows] = inputs["values_nM"] + inputs["residual_nM"]
    return stream + update


def _bypass(**inputs: Any) -> tuple[Tensor, Tensor]:
    rstd_s = bypass_rows_(**inputs)
    return inputs["stream_NM"], rstd_s


def _bypass_reference(**inputs: Any) -> tuple[Tensor, Tensor]:
    stream, rows = inputs.pop("stream_NM"), inputs.pop("rows_s")
    flat = stream.flatten(0, -2)
    y, rstd_s = bypass_rows_reference(flat[rows], inputs.pop("down_MR"), inputs.pop("up_RM"), eps=1e-6, **inputs)
    return flat.index_copy(0, rows, y).view(stream.shape), rstd_s


def _naive_bypass(**inputs: Any) -> Tensor:
    stream, rows = inputs["stream_NM"], inputs["rows_s"]
    x = stream[rows]
    update = torch.zeros_like(stream)
    update[rows] = F.rms_norm(x, x.shape[1:], eps=1e-6) @ inputs["down_MR"] @ inputs["up_RM"]
    return stream + update


def _with_wide_rstd(inputs: Inputs) -> Inputs:
    rstd = inputs["rstd_s"]
    return {**inputs, "rstd_s": rstd.to(torch.promote_types(rstd.dtype, torch.float32))}


def _bypass_backward(**inputs: Any) -> Tensor:
    bypass_rows_backward_(**_with_wide_rstd(inputs))
    return inputs["grad_NM"]


def _bypass_backward_reference(**inputs: Any) -> Tensor:
    inputs = _with_wide_rstd(inputs)
    grad, rows = inputs["grad_NM"], inputs["rows_s"]
    flat = grad.flatten(0, -2)
    maps = inputs["down_MR"], inputs["up_RM"]
    new = bypass_rows_backward_reference(flat[rows], inputs["rstd_s"], *maps)
    return flat.index_copy(0, rows, new).view(grad.shape)


def _naive_bypass_backward(**inputs: Any) -> Tensor:
    inputs = _with_wide_rstd(inputs)
    grad, rows = inputs["grad_NM"], inputs["rows_s"]
    update = torch.zeros_like(grad)
    through = grad[rows] @ inputs["up_RM"].mT @ inputs["down_MR"].mT
    update[rows] = (through * inputs["rstd_s"][:, None]).to(grad.dtype)
    return grad + update


def _write_bytes(inputs: Inputs) -> int:
    values = inputs["values_nM"]
    return (2 + ("residual_nM" in inputs) + inputs.get("add", False)) * values.numel() * values.element_size()


def _bypass_bytes(inputs: Inputs) -> int:
    down = inputs["down_MR"]
    return 2 * len(inputs["rows_s"]) * down.shape[0] * down.element_size()


def _bypass_flops(inputs: Inputs) -> int:
    return 4 * len(inputs["rows_s"]) * inputs["down_MR"].numel()


def _write_flops(inputs: Inputs) -> int:
    """One sum for each element and for each thing that is added."""
    return (int("residual_nM" in inputs) + int(inputs.get("add", False))) * inputs["values_nM"].numel()


_BYPASSES: dict[str, dict[str, Any]] = {
    "rows": {},
    "some left alone": {"flags": True},
    "batch": {"shape": (2, 13, 24)},
    "no rows": {"rows": 0},
    "one row": {"rows": 1},
    "all rows": {"rows": 41},
    "rank 1": {"rank": 1},
    "rank 16": {"rank": 16, "flags": True},
    "rank 40, odd width": {"rank": 40, "shape": (37, 77)},
    "several tiles": {"shape": (90, 150), "rows": 70, "rank": 20},
}


def _bypass_cases(kind: str) -> tuple[Case, ...]:
    # The matrix units sum products of 16-bit numbers with fewer guard bits than ordinary fp32 addition.
    return tuple(Case(name, getattr(Shape(**options), kind), ulps=4.0) for name, options in _BYPASSES.items())


def _large(rank: int) -> Shape:
    return Shape((32768, 4096), 16384, rank, scale=1e-3)


SPECS = (
    OpSpec(
        name="write_rows_",
        run=_write,
        reference=_write_reference,
        cases=(
            Case("rows", Shape().write),
            Case("residual", Shape(residual=True).write),
            Case("some not valid", Shape(flags=True).write),
            Case("some not valid, residual", Shape(flags=True, residual=True).write),
            Case("batch", Shape((2, 13, 24), residual=True).write),
            Case("no rows", Shape(rows=0).write),
            Case("odd width", Shape((41, 77), residual=True).write),
            Case("wide", Shape((6, 5000), 3, residual=True, flags=True).write),
            Case("added", Shape(add=True).write),
            Case("added, residual, some not valid", Shape(add=True, residual=True, flags=True).write),
            Case("added, odd width", Shape((41, 77), add=True, flags=True).write),
        ),
        benchmark_shapes=(Case("16384 of 32768 x 4096, residual", Shape((32768, 4096), 16384, residual=True).write),),
        flops=_write_flops,
        bytes_moved=_write_bytes,
        naive=_naive_write,
        ceiling="copy",
    ),
    OpSpec(
        name="bypass_rows_",
        run=_bypass,
        reference=_bypass_reference,
        cases=_bypass_cases("bypass"),
        benchmark_shapes=tuple(
            Case(f"16384 of 32768 x 4096, rank {rank}", _large(rank).bypass) for rank in (64, 16, 128)
        ),
        flops=_bypass_flops,
        bytes_moved=_bypass_bytes,
        naive=_naive_bypass,
        ceiling="copy",
    ),
    OpSpec(
        name="bypass_rows_backward_",
        run=_bypass_backward,
        reference=_bypass_backward_reference,
        cases=_bypass_cases("bypass_backward"),
        benchmark_shapes=tuple(Case(f"16384 of 32768 x 4096, rank {r}", _large(r).bypass_backward) for r in (64, 128)),
        flops=_bypass_flops,
        bytes_moved=_bypass_bytes,
        naive=_naive_bypass_backward,
        prepare=_with_wide_rstd,
        ceiling="copy",
    ),
)
