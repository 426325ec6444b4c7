"""Inputs of select_rows for tests and benchmarks: scores come in, rows come out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lemo.ops.backend import Backend
from lemo.ops.select_rows.op import rank_blocks, select_rows
from lemo.ops.select_rows.reference import (
    BlockTable,
    SelectedRows,
    rank_blocks_reference,
    select_rows_reference,
)
from lemo.testing import Case, Inputs, OpSpec


def _run(
    scores_K: Tensor, budget_D: Tensor, threshold: float | None, backend: Backend = "auto", **layout: Tensor
) -> SelectedRows:
    """rank_blocks and select_rows, with blocks below `threshold` dropped."""
    table = table_of(layout)
    rank_K = rank_blocks(scores_K, table, backend=backend)
    return select_rows(
        rank_K, budget_D.cpu(), table, keep_K=_keep(scores_K, threshold, table.forced_K), backend=backend
    )


def _run_reference(scores_K: Tensor, budget_D: Tensor, threshold: float | None, **layout: Tensor) -> SelectedRows:
    table = table_of(layout)
    rank_K = rank_blocks_reference(scores_K, table)
    return select_rows_reference(rank_K, budget_D, table, keep_K=_keep(scores_K, threshold, table.forced_K))


def table_of(layout: Inputs) -> BlockTable:
    """The table of blocks of a case's layout."""
    parts = ("block_start_K", "block_length_K", "block_document_K", "forced_K")
    return BlockTable(*(layout[part].cpu() for part in parts))


def _keep(scores_K: Tensor, threshold: float | None, forced_K: Tensor) -> Tensor | None:
    return None if threshold is None else (scores_K >= threshold) | forced_K.to(scores_K.device)


def _inputs(
    generator: torch.Generator,
    *,
    documents: tuple[int, ...] = (50,),
    block: int = 8,
    ratio: float = 0.5,
    forced: float = 0.1,
    ties: bool = False,
    gap: int = 0,
    threshold: float | None = None,
) -> Inputs:
    """Documents of the given rows, `gap` padding rows before each; first and last block of each forced."""
    start, length, document, at = [], [], [], 0
    for d, rows in enumerate(documents):
        at += gap
        for offset in range(0, rows, block):
            start.append(at + offset)
            length.append(min(block, rows - offset))
            document.append(d)
        at += rows
    document_K = torch.tensor(document)
    edge = document_K.diff(prepend=torch.tensor([-1])).ne(0) | document_K.diff(append=torch.tensor([-1])).ne(0)
    forced_K = edge | (torch.rand(len(start), generator=generator) < forced)
    scores = torch.randn(len(start), generator=generator, dtype=torch.float64)
    wanted = (torch.bincount(document_K) * ratio).ceil().long()
    return {
        "scores_K": scores.round() if ties else scores,
        "budget_D": torch.maximum(wanted, torch.bincount(document_K[forced_K])),
        "block_start_K": torch.tensor(start),
        "block_length_K": torch.tensor(length),
        "block_document_K": document_K,
        "forced_K": forced_K,
        "threshold": threshold,
    }


def _flops(inputs: Inputs) -> int:
    return 0


def _bytes_moved(inputs: Inputs) -> int:
    """Eight bytes for the index of each row."""
    return 8 * int(inputs["block_length_K"].sum())


def _case(name: str, **options: Any) -> Case:
    return Case(name, lambda g: _inputs(g, **options), gradcheck=False)


SPEC = OpSpec(
    name="select_rows",
    run=_run,
    reference=_run_reference,
    cases=(
        _case("one document"),
        _case("packed, ragged", documents=(50, 3, 24, 8, 61)),
        _case("padding between", documents=(33, 20), gap=5),
        _case("ties", documents=(80, 80), ties=True),
        _case("threshold", documents=(50, 70), threshold=0.3),
        _case("everything", ratio=1.0),
        _case("everything, threshold", ratio=1.0, threshold=0.0),
        _case("all forced", forced=1.0),
        _case("many blocks", documents=(1100, 300), block=4, ratio=0.3),
        _case("many blocks, ties, threshold", documents=(900, 450, 7), block=4, ties=True, threshold=0.5),
        _case("one row each", documents=(40,), block=1),
    ),
    benchmark_shapes=(_case("131072 rows", documents=(131072,), block=64),),
    flops=_flops,
    bytes_moved=_bytes_moved,
)
