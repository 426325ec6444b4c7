"""Inputs of rope_rows_ for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lemo.ops.rope_rows.op import rope_rows_
from lemo.ops.rope_rows.reference import rope_rows_reference
from lemo.testing import Case, Inputs, OpSpec, draw_normal


@dataclass(frozen=True)
class Shape:
    """What a case draws.

    Attributes:
        rows: N.
        heads: H of each state.
        head_dim: D.
        rotated: R; None for D.
        table: P.
        gathered: rows have original positions.
        fused: the states are slices of one wider tensor, so rows lie apart.
        inverse: transpose.
        interleaved: pairs are neighbours.
        wide: tables in fp32 (fp64 for fp64).
    """

    rows: int = 7
    heads: tuple[int, ...] = (4, 2)
    head_dim: int = 16
    rotated: int | None = None
    table: int = 20
    gathered: bool = True
    fused: bool = False
    inverse: bool = False
    interleaved: bool = False
    wide: bool = False

    def inputs(self, generator: torch.Generator) -> Inputs:
        """Arguments of `_run`: `state_0`, `state_1`, ... become one argument there."""
        width = self.rotated or self.head_dim
        extra = 3 if self.fused else 0
        states = [draw_normal(self.rows, count + extra, self.head_dim, generator=generator) for count in self.heads]
        made: dict[str, Any] = {f"state_{i}": s[:, : s.shape[1] - extra] for i, s in enumerate(states)}
        # Halves of the tables differ: that of a real model could not tell which one a kernel reads.
        angle = torch.rand(self.table, width, generator=generator, dtype=torch.float64) * 6
        made |= {"cos_PR": angle.cos(), "sin_PR": angle.sin(), "inverse": self.inverse}
        if self.gathered:
            made["rows_N"] = torch.randint(3 * self.table, (self.rows,), generator=generator).sort().values
        return made | {"interleaved": self.interleaved, "wide": self.wide}


def _prepare(inputs: Inputs) -> Inputs:
    """Inputs with the tables in fp32 at least, where the case asks for it."""
    inputs = dict(inputs)
    for name in ("cos_PR", "sin_PR") if inputs.pop("wide", False) else ():
        inputs[name] = inputs[name].to(torch.promote_types(inputs[name].dtype, torch.float32))
    return inputs


def _split(inputs: Inputs) -> tuple[list[Tensor], Inputs]:
    """The states, and the remaining arguments."""
    inputs = _prepare(inputs)
    rest = {name: value for name, value in inputs.items() if not name.startswith("state_")}
    return [value for name, value in inputs.items() if name.startswith("state_")], rest


def _run(**inputs: Any) -> list[Tensor]:
    states, rest = _split(inputs)
    rope_rows_(states, **rest)
    return states


def _reference(**inputs: Any) -> list[Tensor]:
    states, rest = _split({name: value for name, value in inputs.items() if name != "backend"})
    return [rope_rows_reference(state, **rest) for state in states]


def _naive(**inputs: Any) -> list[Tensor]:
    """As models do it: tables gathered and cast, four intermediate tensors."""
    states, rest = _split(inputs)
    cos, sin = (rest[n][rest["rows_N"] % len(rest[n])][:, None].to(states[0].dtype) for n in ("cos_PR", "sin_PR"))
    half = cos.shape[-1] // 2
    return [x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin for x in states]


def _bytes_moved(inputs: Inputs) -> int:
    states, rest = _split(inputs)
    rotated = sum(s[..., : rest["cos_PR"].shape[1]].numel() * s.element_size() for s in states)
    return 2 * rotated + 2 * len(states[0]) * rest["cos_PR"].shape[1] * rest["cos_PR"].element_size()


def _flops(inputs: Inputs) -> int:
    """Two products and a sum for each rotated element."""
    states, rest = _split(inputs)
    return 3 * sum(s[..., : rest["cos_PR"].shape[1]].numel() for s in states)


def _case(name: str, **options: Any) -> Case:
    return Case(name, Shape(**options).inputs)


SPECS = (
    OpSpec(
        name="rope_rows_",
        run=_run,
        reference=_reference,
        cases=(
            _case("queries and keys"),
            _case("one state", heads=(3,)),
            _case("three states", heads=(3, 1, 2)),
            _case("in order", gathered=False, rows=25),
            _case("transpose", inverse=True),
            _case("part of the dimensions", head_dim=24, rotated=16),
            _case("odd half", head_dim=20, rotated=10, inverse=True),
            _case("slices of a fused projection", fused=True),
            _case("interleaved", interleaved=True),
            _case("interleaved, part, transpose", interleaved=True, head_dim=24, rotated=16, inverse=True, fused=True),
            _case("tables in fp32", wide=True, heads=(5, 1)),
            _case("no rows", rows=0),
        ),
        benchmark_shapes=(
            _case("32768 rows, 32 + 32 heads x 128", rows=32768, heads=(32, 32), head_dim=128, table=65536, wide=True),
            _case("32768 rows, 32 + 8 heads x 128", rows=32768, heads=(32, 8), head_dim=128, table=65536, wide=True),
        ),
        flops=_flops,
        bytes_moved=_bytes_moved,
        naive=_naive,
        prepare=_prepare,
        ceiling="copy",
    ),
)
