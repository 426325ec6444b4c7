"""Inputs of block_score for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lemo.ops.block_score.op import block_score
from lemo.ops.block_score.reference import block_score_reference
from lemo.testing import Case, Inputs, OpSpec, with_gaps


def layout(documents: tuple[int, ...], block: int, gap: int = 0) -> dict[str, torch.Tensor]:
    """Blocks of documents with the given rows, `gap` padding rows before each."""
    runs, at = [], 0
    for d, rows in enumerate(documents):
        at += gap
        runs += [(at + offset, min(block, rows - offset), d) for offset in range(0, rows, block)]
        at += rows
    start, length, document = torch.tensor(runs, dtype=torch.int64).reshape(-1, 3).unbind(1)
    return {"block_start_K": start, "block_length_K": length, "block_document_K": document}


@dataclass(frozen=True)
class Shape:
    """What a case draws.

    Attributes:
        documents: rows of each.
        block: rows of a block.
        gap: padding rows before each document.
        heads: H.
        groups: G.
        head_dim: D.
        order: order of the dimensions in memory.
        gaps: every second element of the storage is unused.
        softcap: of the logits.
    """

    documents: tuple[int, ...] = (70,)
    block: int = 16
    gap: int = 0
    heads: int = 2
    groups: int = 2
    head_dim: int = 16
    order: str = "HND"
    gaps: bool = False
    softcap: float | None = None

    def inputs(self, generator: torch.Generator) -> Inputs:
        """Arguments of block_score in fp64."""
        blocks = layout(self.documents, self.block, self.gap)
        query, key = self._draw(self.heads, generator), self._draw(self.groups, generator)
        options = {"scaling": self.head_dim**-0.5, "softcap": self.softcap}
        return {"query_HND": query, "key_GND": key, **blocks, **options}

    def _draw(self, heads: int, generator: torch.Generator) -> torch.Tensor:
        sizes = {"H": heads, "N": sum(self.documents) + self.gap * len(self.documents), "D": self.head_dim}
        t = torch.randn([sizes[axis] for axis in self.order], generator=generator, dtype=torch.float64)
        t = t.permute([self.order.index(axis) for axis in "HND"])
        return with_gaps(t) if self.gaps else t


def large(rows: int, heads: int = 32, groups: int = 32, head_dim: int = 128, block: int = 64) -> Case:
    """One document in the layout of a model's projections, (N, H, D) in memory; for the benchmark."""
    shape = Shape((rows,), block, heads=heads, groups=groups, head_dim=head_dim, order="NHD")
    return Case(f"{rows} rows, {heads}/{groups} heads x {head_dim}", shape.inputs)


def _flops(inputs: Inputs) -> int:
    """Products of the pairs of one document with j <= i."""
    document, length = inputs["block_document_K"], inputs["block_length_K"]
    rows_D = torch.zeros(int(document.max()) + 1, dtype=torch.int64).index_add_(0, document.cpu(), length.cpu())
    pairs = int((rows_D * (rows_D + 1) // 2).sum())
    return 2 * pairs * inputs["query_HND"].shape[0] * inputs["query_HND"].shape[2]


def _bytes_moved(inputs: Inputs) -> int:
    """Q and K once, and the map."""
    operands = inputs["query_HND"].numel() + inputs["key_GND"].numel()
    return operands * inputs["query_HND"].element_size() + 4 * len(inputs["block_start_K"]) ** 2


def _library_call(inputs: Inputs) -> tuple[Any, tuple]:
    tensors = ("query_HND", "key_GND", "block_start_K", "block_length_K", "block_document_K")
    arguments = [inputs[name].detach() for name in tensors]
    block_rows = int(inputs["block_length_K"].max())
    return torch.ops.lemo.block_score.default, (*arguments, inputs["scaling"], inputs.get("softcap"), block_rows, False)


def _case(name: str, ulps: float = 4.0, **options: Any) -> Case:
    return Case(name, Shape(**options).inputs, ulps=ulps)


SPEC = OpSpec(
    name="block_score",
    run=block_score,
    reference=block_score_reference,
    cases=(
        _case("one document, ragged end"),
        _case("one row", documents=(1,)),
        _case("grouped queries", heads=6, groups=2),
        _case("packed", documents=(37, 5, 64, 20)),
        _case("padding between", documents=(30, 41), gap=7),
        _case("odd head dimension", head_dim=20),
        _case("head dimension 80", head_dim=80, heads=1, groups=1),
        _case("softcap", softcap=0.7),
        _case("heads inside rows", order="NHD", heads=4, groups=1),
        _case("head dimension first", order="DNH"),
        _case("gaps", gaps=True),
        _case("block 24", documents=(100, 30), block=24),
        _case("block 64", documents=(200,), block=64),
    ),
    benchmark_shapes=(
        large(8192),
        large(16384),
        large(32768),
        large(32768, groups=8),
        large(32768, head_dim=64),
    ),
    flops=_flops,
    bytes_moved=_bytes_moved,
    library_call=_library_call,
)
