"""Inputs of attend_local for tests and benchmarks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lemo.ops.attend_local.backward import attend_local_backward
from lemo.ops.attend_local.op import attend_local
from lemo.ops.attend_local.plan import LocalRows, plan_local
from lemo.ops.attend_local.reference import attend_local_backward_reference, attend_local_reference
from lemo.ops.attend_rows.cases import Shape, segments_of
from lemo.ops.attend_rows.reference import attend_rows_reference
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


def run_backward(**inputs: Any) -> tuple[Tensor, ...]:
    """attend_local_backward of what the specification's forward pass gives."""
    backend = inputs.pop("backend", "auto")
    operands, local = operands_of(inputs)
    return attend_local_backward(*operands, local, backend=backend, **inputs)


def reference_backward(**inputs: Any) -> tuple[Tensor, ...]:
    """The same by the specification."""
    operands, local = operands_of(inputs)
    return attend_local_backward_reference(operands, local, **inputs)


def operands_of(inputs: Inputs) -> tuple[tuple[Tensor, ...], LocalRows]:
    """Gradient, query, key, value, output and log-sum-exp, and the rows; takes all but options out of `inputs`."""
    saw_all, local, grad = inputs.pop("saw_all"), local_of(inputs), inputs.pop("grad_HND")
    if local.whole or local.keys is not local.queries:
        local = replace(local, position_on_host_N=local.queries.position_N.cpu())
    tensors = tuple(inputs.pop(name) for name in ("query_HND", "key_GKD", "value_GKD"))
    scaling = inputs["scaling"]
    if saw_all:
        rows = (local.queries, local.keys)
        return (grad, *tensors, *attend_rows_reference(*tensors, *rows, scaling=scaling, window=local.window)), local
    return (grad, *tensors, *attend_local_reference(*tensors, local, scaling=scaling)), local


def pairs(inputs: Inputs) -> int:
    """Pairs of a query and a key that it sees, of whole documents and without windows."""
    local = local_of(dict(inputs))
    total = 0
    for start, length in zip(local.queries.starts, local.queries.lengths, strict=True):
        position = local.queries.position_N[start : start + length]
        before = (position // local.chunk - 1).clamp(min=0) * local.chunk
        total += int((position + 1 - before + before.clamp(max=local.sink)).sum())
    return total


def flops(inputs: Inputs, backward: bool = True) -> int:
    """Two products per pair; there is no backward pass."""
    heads, _, head_dim = inputs["query_HND"].shape
    return 4 * head_dim * heads * pairs(inputs)


def flops_backward(inputs: Inputs) -> int:
    """Five products per pair."""
    return flops(inputs) // 2 * 5


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


def backward_case(name: str, chunk: int, sink: int, saw_all: bool = False, **options: Any) -> Case:
    """A case of rows among all keys, or among themselves, with a gradient of their output: local, or of all keys."""
    case = local_case(name, chunk, sink, **options)

    def build(generator: torch.Generator) -> Inputs:
        made = case.build(generator)
        query = made["query_HND"]
        grad = torch.randn(query.transpose(0, 1).shape, generator=generator, dtype=torch.float64).transpose(0, 1)
        return made | {"grad_HND": grad, "saw_all": saw_all}

    return Case(name, build, gradcheck=False, ulps=8.0)


def large(rows: int, chunk: int, heads: int, groups: int, head_dim: int) -> Case:
    """All rows of one document, in the layout of a model's projections; for the benchmark."""
    name = f"{rows} rows, chunks of {chunk}, {heads}/{groups} heads x {head_dim}"
    shape = {"heads": heads, "groups": groups, "head_dim": head_dim, "order": "NHD", "share": 1.0, "block": 64}
    return local_case(name, chunk, 64, compact=True, documents=(rows,), **shape)


def large_backward(rows: int, share: float, heads: int, groups: int, head_dim: int) -> Case:
    """Some blocks of 64 of one document on all keys, in the layout of a model's projections; for the benchmark."""
    name = f"{share:.0%} of {rows} rows, chunks of 1024, {heads}/{groups} heads x {head_dim}"
    shape = {"heads": heads, "groups": groups, "head_dim": head_dim, "order": "NHD", "share": share, "block": 64}
    return backward_case(name, 1024, 64, documents=(rows,), **shape)


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

BACKWARD = OpSpec(
    name="attend_local_backward",
    run=run_backward,
    reference=reference_backward,
    cases=(
        backward_case("some rows on all keys", 8, 4, heads=4, groups=2),
        backward_case("all rows", 16, 8, share=1.0, compact=True, documents=(75,)),
        backward_case("chunks of one row", 1, 1, share=1.0, compact=True, documents=(9, 1)),
        backward_case("no sink", 16, 0, documents=(90,)),
        backward_case("a sink of a chunk", 16, 16, documents=(75, 31)),
        backward_case("documents of two chunks at most", 20, 4, documents=(37, 40, 1)),
        backward_case("ragged documents", 16, 4, share=0.2, documents=(37, 5, 1, 64, 48), heads=1, groups=1),
        backward_case("rows between documents", 16, 8, documents=(50, 41), gap=7, heads=1, groups=1),
        backward_case("some rows among themselves", 16, 8, compact=True, documents=(90, 30)),
        backward_case("window shorter than a chunk", 16, 8, window=9, documents=(60,), heads=1, groups=1),
        backward_case("window between one chunk and two", 16, 8, window=25, documents=(90, 30)),
        backward_case("window that cuts the sink", 8, 8, window=60, documents=(90,), heads=1, groups=1),
        backward_case("head dimension 80", 24, 8, head_dim=80, heads=1, groups=1),
        backward_case("output of all keys", 16, 8, saw_all=True, documents=(90, 30), heads=4, groups=2),
        backward_case("output of all keys in a window", 8, 4, saw_all=True, window=25, documents=(60,)),
        backward_case("heads inside rows", 16, 4, order="NHD", heads=6, groups=2, block=8, documents=(80,)),
    ),
    benchmark_shapes=tuple(
        large_backward(rows, share, *sizes)
        for rows in (16384, 65536)
        for share in (0.25, 0.85)
        for sizes in ((9, 3, 64), (32, 8, 128))
    ),
    flops=flops_backward,
    bytes_moved=_bytes_moved,
)
SPECS = (SPEC, BACKWARD)
