"""Inputs of scatter_rows for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lemo.ops.scatter_rows.op import scatter_rows
from lemo.ops.scatter_rows.reference import scatter_rows_reference
from lemo.testing import Case, Inputs, OpSpec, with_gaps


@dataclass(frozen=True)
class Sets:
    """What a case draws: a stream, and disjoint random sets of its rows.

    Attributes:
        shape: of the stream.
        rank: of the bypass.
        rows: size of `rows_N`.
        constants: constant rows that are not in `rows_N`.
        overlap: constant rows that are.
        skipped: skipped rows.
        bypass: there is one.
        valid: some entries of `rows_N` were not chosen.
        gaps: every second element of the stream's storage is unused.
    """

    shape: tuple[int, ...] = (23, 12)
    rank: int = 3
    rows: int = 7
    constants: int = 0
    overlap: int = 0
    skipped: int = 0
    bypass: bool = False
    valid: bool = False
    gaps: bool = False

    def inputs(self, generator: torch.Generator) -> Inputs:
        """Arguments of scatter_rows."""
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        width, stream = self.shape[-1], draw(self.shape)
        order = torch.randperm(stream.numel() // width, generator=generator)
        rows, others = order[: self.rows].sort().values, order[self.rows :]
        made: dict[str, Any] = {
            "stream_NM": with_gaps(stream) if self.gaps else stream,
            "rows_N": rows,
            "values_NM": draw(self.rows, width),
        }
        if self.constants or self.overlap:
            made["constant_rows"] = torch.cat([others[: self.constants], rows[: self.overlap]])
            made["constant_values"] = draw(self.constants + self.overlap, width)
        if self.skipped:
            made["skipped_rows"] = others[self.constants : self.constants + self.skipped]
        if self.bypass:
            made["down_MR"], made["up_RM"] = draw(width, self.rank) / width**0.5, draw(self.rank, width)
        if self.valid:
            made["valid_N"] = torch.rand(self.rows, generator=generator) < 0.5
        return made


def _flops(inputs: Inputs) -> int:
    if inputs.get("down_MR") is None or inputs.get("skipped_rows") is None:
        return 0
    return 4 * len(inputs["skipped_rows"]) * inputs["down_MR"].numel()


def _bytes_moved(inputs: Inputs) -> int:
    """Values and skipped rows are read, and all are written."""
    touched = sum(len(inputs[name]) for name in ("rows_N", "constant_rows", "skipped_rows") if name in inputs)
    return 2 * touched * inputs["values_NM"].shape[-1] * inputs["values_NM"].element_size()


_BOTH = ("stream_NM", "values_NM")


def _case(name: str, *, gradcheck: bool = True, ulps: float = 4.0, **options: Any) -> Case:
    return Case(name, Sets(**options).inputs, _BOTH, gradcheck, ulps)


SPEC = OpSpec(
    name="scatter_rows",
    run=partial(scatter_rows, inplace=False),
    reference=scatter_rows_reference,
    cases=(
        _case("rows"),
        _case("batch", shape=(2, 9, 5)),
        _case("no rows", rows=0),
        _case("all rows", rows=23),
        _case("skipped without bypass", skipped=9),
        _case("valid without bypass", valid=True),
        _case("gaps", gaps=True),
        # Gradients are stopped from here on: the value's derivative is not the gradient.
        _case("constants", gradcheck=False, constants=6),
        _case("valid and skipped without bypass", valid=True, skipped=4),
        _case("constants that are rows", gradcheck=False, constants=4, overlap=5, valid=True),
        _case("bypass", gradcheck=False, skipped=9, bypass=True),
        _case("bypass, none skipped", gradcheck=False, rows=23, valid=True, bypass=True),
        _case("everything", gradcheck=False, constants=4, overlap=3, skipped=6, valid=True, bypass=True),
        _case("everything, odd width", gradcheck=False, shape=(31, 7), constants=4, skipped=6, valid=True, bypass=True),
    ),
    benchmark_shapes=(
        _case("32768x4096, half, rank 64", shape=(32768, 4096), rank=64, rows=16384, skipped=16384, bypass=True),
    ),
    flops=_flops,
    bytes_moved=_bytes_moved,
)
