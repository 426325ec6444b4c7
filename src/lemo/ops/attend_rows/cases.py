"""Inputs of attend_rows for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lemo.ops.attend_rows.op import attend_rows, attend_rows_constant, attend_rows_with_lse
from lemo.ops.attend_rows.reference import Segments, attend_rows_reference, own_among_keys
from lemo.testing import Case, Inputs, OpSpec, with_gaps

ROWS = ("queries", "keys")


@dataclass(frozen=True)
class Shape:
    """What a case draws.

    Attributes:
        documents: keys of each.
        share: of the rows that are queries; at least one of each document.
        block: queries come in runs of so many rows.
        gap: rows that belong to no document, before each.
        heads: H.
        groups: G.
        head_dim: D.
        order: order of the dimensions in memory.
        gaps: every second element of the storage is unused.
        window: of the attention.
        invalid: share of the keys that only their own query sees.
        shuffled: the queries of a document do not ascend.
        constant: keys are constants but for the queries' own.
        lse: the log-sum-exp is an output too.
    """

    documents: tuple[int, ...] = (70,)
    share: float = 0.5
    block: int = 1
    gap: int = 0
    heads: int = 2
    groups: int = 2
    head_dim: int = 16
    order: str = "HND"
    gaps: bool = False
    window: int | None = None
    invalid: float = 0.0
    shuffled: bool = False
    constant: bool = False
    lse: bool = False

    def inputs(self, generator: torch.Generator) -> Inputs:
        """Arguments of `run` in fp64."""
        chosen = [self._chosen(length, generator) for length in self.documents]
        made: Inputs = {"scaling": self.head_dim**-0.5, "window": self.window, "lse": self.lse}
        for name, positions in zip(ROWS, (chosen, [torch.arange(n) for n in self.documents]), strict=True):
            made |= self._rows(name, positions)
        rows, columns = (len(made[f"{name}_position"]) for name in ROWS)
        made["query_HND"] = self._draw(self.heads, rows, generator)
        made |= {name: self._draw(self.groups, columns, generator) for name in ("key_GKD", "value_GKD")}
        if self.invalid:
            made["keys_valid"] = torch.rand(columns, generator=generator) >= self.invalid
        if self.shuffled:
            made["queries_valid"] = torch.ones(rows, dtype=torch.bool)
        if self.constant:
            own = _own_columns(made)
            made |= {"own_key_GND": made["key_GKD"][:, own], "own_value_GND": made["value_GKD"][:, own]}
        return made

    def _chosen(self, length: int, generator: torch.Generator) -> Tensor:
        """Positions of the queries of one document."""
        blocks = -(-length // self.block)
        count = min(max(round(blocks * self.share), 1), blocks)
        order = torch.randperm(blocks, generator=generator)[:count]
        kept = order if self.shuffled else order.sort().values
        positions = (kept[:, None] * self.block + torch.arange(self.block)).flatten()
        return positions[positions < length]

    def _rows(self, name: str, positions: list[Tensor]) -> Inputs:
        """Documents one after another, `gap` rows before each."""
        starts, packed, at = [], [], 0
        for position in positions:
            packed += [torch.full((self.gap,), -1), position]
            starts.append(at + self.gap)
            at += self.gap + len(position)
        lengths = tuple(len(position) for position in positions)
        return {f"{name}_position": torch.cat(packed), f"{name}_starts": tuple(starts), f"{name}_lengths": lengths}

    def _draw(self, heads: int, rows: int, generator: torch.Generator) -> Tensor:
        sizes = {"H": heads, "N": rows, "D": self.head_dim}
        t = torch.randn([sizes[axis] for axis in self.order], generator=generator, dtype=torch.float64)
        t = t.permute([self.order.index(axis) for axis in "HND"])
        return with_gaps(t) if self.gaps else t


def segments_of(inputs: Inputs) -> tuple[Segments, Segments]:
    """Queries and keys; takes what describes them out of `inputs`."""
    parts = ("starts", "lengths", "position", "valid")
    queries, keys = (Segments(*(inputs.pop(f"{name}_{part}", None) for part in parts)) for name in ROWS)
    return queries, keys


def _own_columns(inputs: Inputs) -> Tensor:
    """Place of every query among the keys; 0 for queries outside all documents."""
    queries, keys = segments_of(dict(inputs))
    own = torch.zeros_like(queries.position_N)
    for q, n, k in zip(queries.starts, queries.lengths, keys.starts, strict=True):
        own[q : q + n] = k + queries.position_N[q : q + n]
    return own


def run(**inputs: Any) -> Tensor | tuple[Tensor, Tensor]:
    """The form of the op that the arguments call for."""
    queries, keys = segments_of(inputs)
    pair, lse = (inputs.pop("key_GKD"), inputs.pop("value_GKD")), inputs.pop("lse")
    query = inputs.pop("query_HND")
    if "own_key_GND" in inputs:
        own = inputs.pop("own_key_GND"), inputs.pop("own_value_GND")
        return attend_rows_constant(query, own, pair, queries, keys, **inputs)
    return (attend_rows_with_lse if lse else attend_rows)(query, *pair, queries, keys, **inputs)


def reference(**inputs: Any) -> Tensor | tuple[Tensor, Tensor]:
    """The same by the specification."""
    queries, keys = segments_of(inputs)
    pair, lse = (inputs.pop("key_GKD"), inputs.pop("value_GKD")), inputs.pop("lse")
    query = inputs.pop("query_HND")
    if "own_key_GND" in inputs:
        own = inputs.pop("own_key_GND"), inputs.pop("own_value_GND")
        pair = own_among_keys(own, pair, queries, keys)
    found = attend_rows_reference(query, *pair, queries, keys, **inputs)
    return found if lse else found[0]


def pairs(inputs: Inputs) -> int:
    """Pairs of a query and a key that it sees, without windows and invalid keys."""
    queries, _ = segments_of(dict(inputs))
    spans = (slice(s, s + n) for s, n in zip(queries.starts, queries.lengths, strict=True))
    return sum(int((queries.position_N[span] + 1).sum()) for span in spans)


def flops(inputs: Inputs, backward: bool = True) -> int:
    """Two products per pair forward, five backward; with constant keys three, and two more for the queries' own."""
    heads, _, head_dim = inputs["query_HND"].shape
    products = (7 if backward else 2) * pairs(inputs)
    if backward and "own_key_GND" in inputs:
        own = sum(n * (n + 1) // 2 for n in inputs["queries_lengths"])
        products = 5 * pairs(inputs) + 2 * own
    return 2 * head_dim * heads * products


def _bytes_moved(inputs: Inputs) -> int:
    """Operands, output and their gradients once."""
    operands = sum(inputs[name].numel() for name in ("query_HND", "query_HND", "key_GKD", "value_GKD"))
    return 2 * operands * inputs["query_HND"].element_size()


# The gradient of a score is a difference of two sums of products; its sum over keys cancels once more.
ULPS = 8.0


def _kernel_call(inputs: Inputs) -> tuple[Any, tuple]:
    queries, keys = segments_of(dict(inputs))
    segments = [*queries.starts, *queries.lengths, *keys.starts, *keys.lengths]
    tensors = (inputs["query_HND"], inputs["key_GKD"], inputs["value_GKD"], None, None)
    options = (queries.position_N, keys.position_N, segments, inputs["scaling"], inputs["window"], True)
    return torch.ops.lemo.attend_rows.default, (*tensors, *options)


def _case(name: str, *gradients: str, **options: Any) -> Case:
    gradients = gradients or ("query_HND", "key_GKD", "value_GKD")
    shape = Shape(**options)
    # Finite differences are slow; the reference is torch's own operations, a few small cases will do.
    small = sum(shape.documents) * shape.heads * shape.head_dim < 250
    return Case(
        name, shape.inputs, () if shape.lse else gradients, gradcheck=small, ulps=ULPS, kernel=not shape.invalid
    )


OWN = ("query_HND", "own_key_GND", "own_value_GND")


def large(rows: int, heads: int, groups: int, head_dim: int, constant: bool = False) -> Case:
    """Half of the blocks of 64 of one document, in the layout of a model's projections; for the benchmark."""
    name = f"{rows} keys, {heads}/{groups} heads x {head_dim}{', constant keys' * constant}"
    shape = {"heads": heads, "groups": groups, "head_dim": head_dim, "order": "NHD", "constant": constant}
    return _case(name, *(OWN if constant else ()), documents=(rows,), block=64, **shape)


SPEC = OpSpec(
    name="attend_rows",
    run=run,
    reference=reference,
    cases=(
        _case("few rows", documents=(9, 4), head_dim=5, heads=2, groups=1),
        _case("few rows, constant keys", *OWN, documents=(9, 4), head_dim=5, heads=2, groups=1, constant=True),
        _case("one document"),
        _case("all rows", share=1.0, documents=(37,)),
        _case("one row", "value_GKD", documents=(1,)),
        _case("grouped queries", heads=6, groups=2),
        _case("ragged documents", documents=(37, 5, 1, 64, 20), share=0.6),
        _case("rows between documents", documents=(30, 41), gap=7, heads=1, groups=1),
        _case("blocks", documents=(75, 40), block=16, heads=1, groups=1),
        _case("head dimension 64", head_dim=64, heads=2, groups=1, documents=(40,)),
        _case("head dimension 80", head_dim=80, heads=1, groups=1, documents=(40,)),
        _case("head dimension 128", head_dim=128, heads=1, groups=1, documents=(40,)),
        _case("window", window=20, documents=(90, 30), heads=1, groups=1),
        _case("window 1", "value_GKD", window=1, documents=(30,)),
        _case("queries without order", shuffled=True, documents=(50, 21)),
        _case("window, queries without order", shuffled=True, window=17, documents=(50,), heads=1, groups=1),
        _case("invalid keys", invalid=0.4, documents=(50, 21)),
        _case("constant keys", *OWN, constant=True, documents=(60, 21), heads=4, groups=2),
        _case("constant keys, window", *OWN, constant=True, window=9, documents=(60,), heads=1, groups=1),
        _case("constant keys, no order", *OWN, constant=True, shuffled=True, documents=(45,), heads=1, groups=1),
        _case("keys without gradient", "query_HND"),
        _case("log-sum-exp", lse=True, documents=(50, 21), gap=3, heads=4, groups=2),
        _case("heads inside rows", order="NHD", heads=4, groups=1),
        _case("head dimension first", order="DNH", documents=(30,)),
        _case("gaps", gaps=True, documents=(30,)),
    ),
    benchmark_shapes=tuple(
        large(rows, *sizes, constant)
        for rows in (16384, 32768)
        for sizes in ((9, 3, 64), (32, 8, 128))
        for constant in (False, True)
    ),
    flops=flops,
    bytes_moved=_bytes_moved,
    kernel_call=_kernel_call,
)
