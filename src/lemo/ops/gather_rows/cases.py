"""Inputs of gather_rows for tests and benchmarks."""

from __future__ import annotations

import torch

from lemo.ops.gather_rows.op import gather_rows
from lemo.ops.gather_rows.reference import gather_rows_reference
from lemo.testing import Case, Inputs, OpSpec, with_gaps


def _inputs(generator: torch.Generator, shape: tuple[int, ...], rows: list[int], gaps: bool = False) -> Inputs:
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return {"x_NM": with_gaps(x) if gaps else x, "rows": torch.tensor(rows, dtype=torch.int64)}


def _large(generator: torch.Generator, tokens: int) -> Inputs:
    rows = torch.randperm(tokens, generator=generator)[: tokens // 2].sort().values
    return {"x_NM": torch.randn(tokens, 4096, generator=generator), "rows": rows}


def _flops(inputs: Inputs) -> int:
    return 0


def _bytes_moved(inputs: Inputs) -> int:
    return 2 * len(inputs["rows"]) * inputs["x_NM"].shape[-1] * inputs["x_NM"].element_size()


SPEC = OpSpec(
    name="gather_rows",
    run=gather_rows,
    reference=gather_rows_reference,
    cases=(
        Case("ascending", lambda g: _inputs(g, (11, 5), [0, 3, 4, 10]), ("x_NM",)),
        Case("batch", lambda g: _inputs(g, (2, 7, 3), [1, 6, 7, 13]), ("x_NM",)),
        Case("repeated, unordered", lambda g: _inputs(g, (9, 4), [5, 2, 5]), ("x_NM",)),
        Case("none", lambda g: _inputs(g, (4, 4), []), ("x_NM",)),
        Case("gaps", lambda g: _inputs(g, (6, 5), [1, 2], gaps=True), ("x_NM",)),
    ),
    benchmark_shapes=(Case("32768x4096, half", lambda g: _large(g, 32768), ("x_NM",)),),
    flops=_flops,
    bytes_moved=_bytes_moved,
)
