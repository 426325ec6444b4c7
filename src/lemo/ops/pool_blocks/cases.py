"""Inputs of pool_blocks for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lemo.ops.pool_blocks.op import pool_blocks
from lemo.ops.pool_blocks.reference import POOLS, Blocks, pool_blocks_reference
from lemo.testing import Case, Inputs, OpSpec, with_gaps

# The matrix units sum products of 16-bit numbers with fewer guard bits than ordinary fp32 addition.
ULPS = 32.0


def _blocks(inputs: Inputs) -> Inputs:
    start, length, rows = (inputs.pop(f"block_{part}") for part in ("start_K", "length_K", "rows"))
    return {**inputs, "blocks": Blocks(start, length, rows)}


def _run(**inputs: Any) -> Tensor:
    return pool_blocks(**_blocks(inputs))


def _run_reference(**inputs: Any) -> Tensor:
    return pool_blocks_reference(**_blocks(inputs))


@dataclass(frozen=True)
class Shape:
    """What a case draws.

    Attributes:
        documents: rows of each.
        block: rows of a block.
        gap: rows before each document that belong to no block and are not numbers.
        width: M.
        features: F.
        pools: as the op takes them.
        extras: E.
        gaps: every second element of the storage is unused.
        scale: of the rows.
    """

    documents: tuple[int, ...] = (50,)
    block: int = 16
    gap: int = 0
    width: int = 40
    features: int = 24
    pools: tuple[str, ...] = POOLS
    extras: int = 0
    gaps: bool = False
    scale: float = 1.0

    def inputs(self, generator: torch.Generator) -> Inputs:
        """Arguments of `run` in fp64."""
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        start, length, at = [], [], 0
        rows = sum(self.documents) + self.gap * len(self.documents)
        x = torch.full((rows, self.width), torch.nan, dtype=torch.float64)
        for count in self.documents:
            at += self.gap
            x[at : at + count] = draw(count, self.width) * self.scale
            for offset in range(0, count, self.block):
                start.append(at + offset)
                length.append(min(self.block, count - offset))
            at += count
        projection = draw(self.width, self.features)
        return {
            "x_NM": with_gaps(x) if self.gaps else x,
            "projection_MF": with_gaps(projection) if self.gaps else projection,
            "block_start_K": torch.tensor(start),
            "block_length_K": torch.tensor(length),
            "block_rows": self.block,
            "pools": self.pools,
            "extra_KE": draw(len(start), self.extras) if self.extras else None,
        }


def _flops(inputs: Inputs) -> int:
    return 2 * inputs["x_NM"].shape[0] * inputs["projection_MF"].numel()


def _bytes_moved(inputs: Inputs) -> int:
    """Rows and projection read."""
    return (inputs["x_NM"].numel() + inputs["projection_MF"].numel()) * inputs["x_NM"].element_size()


def _case(name: str, **options: Any) -> Case:
    return Case(name, Shape(**options).inputs, gradcheck=False, ulps=ULPS)


SPEC = OpSpec(
    name="pool_blocks",
    run=_run,
    reference=_run_reference,
    cases=(
        _case("one document"),
        _case("packed, ragged", documents=(50, 3, 24, 8, 61)),
        _case("rows of no block", documents=(33, 20), gap=5),
        _case("blocks of 8", block=8, documents=(61,)),
        _case("blocks of 48", block=48, documents=(150,)),
        _case("blocks of 128", block=128, documents=(300,)),
        _case("one row each", block=1, documents=(9,)),
        _case("odd sizes", width=37, features=5, documents=(41,)),
        _case("many features", features=150, width=20),
        _case("mean only", pools=("mean",)),
        _case("lse, mean", pools=("lse", "mean")),
        _case("extra", extras=3),
        _case("extra, many features", extras=3, features=70, pools=("max",)),
        _case("gaps", gaps=True, extras=2),
        _case("large", scale=300.0),
        _case("tiny", scale=1e-4),
    ),
    benchmark_shapes=(
        _case("8192x4096, 128 features", documents=(8192,), block=64, width=4096, features=128, extras=3),
        _case("65536x4096, 128 features", documents=(65536,), block=64, width=4096, features=128, extras=3),
    ),
    flops=_flops,
    bytes_moved=_bytes_moved,
)
