"""Inputs of attend_local for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lemo.ops.attend_local.op import attend_local
from lemo.ops.attend_local.plan import LocalRows, plan_local
from lemo.ops.attend_local.reference import attend_local_reference
from lemo.ops.attend_rows.cases import Shape, segments_of
from lemo.testing import Case, Inputs, OpSpec


def local_of(inputs: Inputs) -> LocalRows:
    """Rows and rule; takes what describes them out of `inputs`."""
    queries, keys = segments_of(inputs)
    keys = queries if inputs.pop("compact") else keys
    options = {name: inputs.pop(name) for name in ("chunk", "sink", "window", "whole")}
    return plan_local(queries, keys, **options)


def run(**inputs: Any) -> tuple[Tensor, Tensor]:
    """The op."""
    local = local_of(inputs)
    tensors = (inputs.pop(name) for name in ("query_HND", "key_GKD", "value_GKD"))
    return attend_local(*tensors, local, **inputs)


def reference(**inputs: Any) -> tuple[Tensor, Tensor]:
    """The same by the specification."""
    local = local_of(inputs)
    tensors = (inputs.pop(name) for name in ("query_HND", "key_GKD", "value_GKD"))
    return attend_local_reference(*tensors, local, **inputs)


def pairs(inputs: Inputs) -> int:
    """Pairs of a query and a key that it sees, of whole documents and without windows."""
    local = local_of(dict(inputs))
    total = 0
    for length in local.queries.lengths:
        position = torch.arange(length)
        before = (position // local.chunk - 1).clamp(min=0) * local.chunk
        total += int((position + 1 - before + before.clamp(max=local.sink)).sum())
    return total


def flops(inputs: Inputs, backward: bool = True) -> int:
    """Two products per pair; there is no backward pass."""
    heads, _, head_dim = inputs["query_HND"].shape
    return 4 * head_dim * heads * pairs(inputs)


def _bytes_moved(inputs: Inputs) -> int:
    """Operands and output once."""
    operands = sum(inputs[name].numel() for name in ("query_HND", "query_HND", "key_GKD", "value_GKD"))
    return operands * inputs["query_HND"].element_size()


def local_case(name: str, chunk: int, sink: int, compact: bool = False, **options: Any) -> Case:
    """A case of the rows that `Shape` draws; `compact` has them attend among themselves."""
    shape = Shape(**options)

    def build(generator: torch.Generator) -> Inputs:
        made = shape.inputs(generator)
        del made["lse"]
        made.pop("keys_valid", None)
        if compact:
            own = made["query_HND"].shape[1]
            made |= {n: made[n][:, :own] for n in ("key_GKD", "value_GKD")}
        whole = shape.share == 1.0 and not shape.shuffled
        return made | {"chunk": chunk, "sink": sink, "compact": compact, "whole": whole}

    return Case(name, build, gradcheck=False, ulps=8.0)


def large(rows: int, chunk: int, heads: int, groups: int, head_dim: int) -> Case:
    """All rows of one document, in the layout of a model's projections; for the benchmark."""
    name = f"{rows} rows, chunks of {chunk}, {heads}/{groups} heads x {head_dim}"
    shape = {"heads": heads, "groups": groups, "head_dim": head_dim, "order": "NHD", "share": 1.0, "block": 64}
    return local_case(name, chunk, 64, compact=True, documents=(rows,), **shape)


SPEC = OpSpec(
    name="attend_local",
    run=run,
    reference=reference,
    cases=(
        local_case("one document", 8, 4, share=1.0, compact=True),
        local_case("chunks of one row", 1, 1, share=1.0, compact=True, documents=(9, 1)),
        local_case("no sink", 16, 0, share=1.0, compact=True, documents=(60,)),
        local_case("a sink of a chunk", 16, 16, share=1.0, compact=True, documents=(75, 31)),
        local_case("chunks longer than documents", 100, 4, share=1.0, compact=True, documents=(37, 64)),
        local_case("ragged documents", 16, 4, share=1.0, compact=True, documents=(37, 5, 1, 64, 48), heads=1, groups=1),
        local_case("rows between documents", 16, 8, share=1.0, documents=(50, 41), gap=7, heads=1, groups=1),
        local_case("grouped queries", 16, 4, share=1.0, compact=True, heads=6, groups=2, order="NHD"),
        local_case("some rows among themselves", 16, 8, compact=True, documents=(90, 30)),
        local_case("some rows on all keys", 16, 8, documents=(90, 5, 30), block=4, heads=4, groups=2),
        local_case("rows without order on all keys", 16, 8, shuffled=True, documents=(70, 21)),
        local_case("window", 16, 8, share=1.0, compact=True, window=20, documents=(90, 30)),
        local_case("window that cuts the sink", 8, 8, window=60, documents=(90,), heads=1, groups=1),
        local_case("head dimension 80", 24, 8, share=1.0, head_dim=80, heads=1, groups=1),
        local_case("gaps", 16, 4, share=1.0, gaps=True, documents=(50,)),
    ),
    benchmark_shapes=tuple(
        large(rows, chunk, *sizes)
        for rows in (32768, 65536)
        for chunk in (1024, 2048)
        for sizes in ((9, 3, 64), (32, 8, 128))
    ),
    flops=flops,
    bytes_moved=_bytes_moved,
)
