"""Kept queries and all keys, cut into rectangles without mask, for vendor kernels, and a diagonal, for our own.

A query sees the keys up to its own position: the border between what is seen and what is not is a staircase. Forward,
queries are cut into chunks; all queries of a chunk see the keys that its first one sees: a rectangle, from whose
output and log-sum-exp our kernel goes on with the rest. Backward, keys are cut into stripes; all queries behind a
stripe see all of it: a rectangle again, to whose gradients our kernel adds the rest. Both passes of a vendor's kernel
are exact when given the output and log-sum-exp of the whole row.

Where rectangles end depends on which rows were kept. Rows whose positions lie on the host are planned there: nothing
waits. What queries see of which only the device knows the positions is found there, and copied to the host without
waiting: `Marks.staircase` waits for the copy. Whoever calls `plan_rows` right after the selection and works on
(projections, say) before attending gives the copy the time it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lemo.ops.attend_rows.cuts import Cut, Rectangles, cut_document
from lemo.ops.attend_rows.reference import Rows, Segments
from lemo.ops.attend_rows.tiling import Work, like_rows, tilings
from lemo.ops.attend_rows.vendor import Dense, Triple
from lemo.ops.backend import HostCopy, send_all
from lemo.ops.host import search


@dataclass
class Marks:
    """What the queries of one selection see, and the rectangles that follow from it.

    Attributes:
        cut: how queries and keys are cut.
        device: where attention runs.
        keys: rows of the keys' tensors.
        segments: starts and lengths of the documents of queries, then of keys.
    """

    cut: Cut
    device: torch.device
    keys: int
    segments: tuple[tuple[int, ...], ...]
    _ends: HostCopy = field(repr=False)  # (N,) int32 first key that a query does not see
    _made: dict[int, Staircase] = field(default_factory=dict, repr=False)

    def staircase(self, tile: int) -> Staircase:
        """Rectangles and what they leave; waits, the first time, until the device has come past `plan_rows`.

        Does not wait where positions were on the host.

        Args:
            tile: queries of a kernel's tile.
        """
        if tile not in self._made:
            self._made[tile] = _staircase(self, self._ends.read(), tile)
        return self._made[tile]

    @property
    def sent_parts(self) -> tuple[()]:
        """No tensor goes to the device before the rectangles are asked for."""
        return ()

    def sent(self, device: torch.device, move: Callable[[Any], Any]) -> Marks:
        """The same for rows that went to another device."""
        return Marks(self.cut, device, self.keys, self.segments, self._ends)


@dataclass(frozen=True)
class Staircase:
    """Rectangles of all documents, and what of each row and key they leave to our kernels.

    Attributes:
        documents: slices of queries and keys, and rectangles, of each document that has any.
        forward_2N: int32, first key that a query's rectangle does not hold, and its end.
        backward_2N: the same of the rectangles of stripes.
        seeing_2K: int32, first query that sees each key, and first query of the rectangle of its stripe.
    """

    documents: tuple[tuple[slice, slice, Rectangles], ...]
    forward_2N: Tensor
    backward_2N: Tensor
    seeing_2K: Tensor


def _staircase(marks: Marks, ends_N: Tensor, tile: int) -> Staircase:
    forward_N, backward_N = torch.zeros_like(ends_N), torch.zeros_like(ends_N)
    seeing_K, first_K = torch.zeros(2, marks.keys, dtype=torch.int32)
    documents = []
    for q_start, q_length, k_start, k_length in zip(*marks.segments, strict=True):
        seeing_K[k_start : k_start + k_length] = q_start
        if not q_length or not k_length:
            continue
        queries, keys = slice(q_start, q_start + q_length), slice(k_start, k_start + k_length)
        seen_N = ends_N[queries] - k_start
        found = cut_document(seen_N, k_length, marks.cut, tile)
        # Queries that see no farther than a key's place do not see it: they are those before the first that does.
        seeing_K[keys] += torch.bincount(seen_N, minlength=k_length)[:k_length].cumsum(0)
        for begin, end, depth in found.chunks:
            forward_N[q_start + begin : q_start + end] = k_start + depth
        backward_N[queries] = k_start
        for begin, end, first in found.stripes:
            backward_N[q_start + first : queries.stop] = k_start + end
            first_K[k_start + begin : k_start + end] = q_start + first
        documents.append((queries, keys, found))
    sides = (forward_N, ends_N), (backward_N, ends_N), (seeing_K, first_K)
    return Staircase(tuple(documents), *send_all([torch.stack(side) for side in sides], marks.device))


@dataclass(frozen=True)
class PlannedRows(Segments):
    """Query rows with the marks of their rectangles among all keys; see `plan_rows`."""

    marks: Marks | None = None


def ordered(rows: Rows) -> Rows:
    """The same rows with positions that ascend: rows that are not valid, at their document's end, come after all."""
    if rows.valid_N is None:
        return rows
    position_N = torch.where(rows.valid_N, rows.position_N, torch.iinfo(torch.int32).max)
    return Segments(rows.starts, rows.lengths, position_N)


def plan_rows(queries: Rows, keys: Rows, cut: Cut | None = None) -> PlannedRows:
    """The queries with what `attend_forward` and `attend_backward` need to use dense vendor kernels on all keys.

    Call it once the rows are chosen, and do other work before attending: what they see travels to the host meanwhile,
    and attention waits for it. It is good for every layer that attends with these rows, forward and backward.

    Args:
        queries: documents and positions of the query rows.
        keys: documents and positions of all key rows; all valid.
        cut: how queries and keys are cut; the measured default when None.

    *Cost*: a bisection per query, and where they lie on a device a copy of one number per query. No waiting.
    """
    rising = ordered(queries)
    work = Work.between(rising, keys)
    ends_N = torch.zeros(len(rising.position_N), dtype=torch.int32, device=rising.position_N.device)
    for q_start, q_length, k_start, k_length in zip(*work.segments, strict=True):
        positions = rising.position_N[q_start : q_start + q_length].contiguous()
        among = keys.position_N[k_start : k_start + k_length].contiguous()
        find = search if among.device.type == "cpu" else torch.searchsorted
        ends_N[q_start : q_start + q_length] = k_start + find(among, positions, right=True)
    marks = Marks(cut or Cut(), ends_N.device, len(keys.position_N), work.segments, HostCopy(ends_N))
    return PlannedRows(queries.starts, queries.lengths, queries.position_N, queries.valid_N, marks)


def _steps(query: Tensor, marks: Marks) -> Staircase:
    return marks.staircase(max(tilings(kind, query.shape[2], query.dtype)[0].rows for kind in ("forward", "query")))


def forward(
    query: Tensor, pair: tuple[Tensor, Tensor], work: Work, marks: Marks, scaling: float, dense: Dense
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp as `kernel.forward` gives them.

    Args:
        query: (H, N, D).
        pair: keys and values (G, K, D).
        work: documents and positions, with queries as rows.
        marks: of this work.
        scaling: factor of the scores.
        dense: kernel of the rectangles.
    """
    from lemo.ops.attend_rows import kernel

    output = like_rows(query, False)
    lse = torch.full(query.shape[:2], -torch.inf, dtype=torch.float32, device=query.device)
    steps = _steps(query, marks)
    for queries, keys, found in steps.documents:
        for begin, end, depth in found.chunks:
            if depth:
                rows = slice(queries.start + begin, queries.start + end)
                seen = (t[:, keys.start : keys.start + depth] for t in pair)
                output[:, rows], lse[:, rows] = dense.forward(query[:, rows], *seen, False, scaling)
    if not work.covers_rows():
        lse = torch.where(_inside(work, lse), lse, 0.0)
    return kernel.forward(query, *pair, work, scaling, None, seen=steps.forward_2N, start=(output, lse))


def _inside(work: Work, lse: Tensor) -> Tensor:
    inside = torch.zeros(lse.shape[1], dtype=torch.bool, device=lse.device)
    for start, length in zip(*work.segments[:2], strict=True):
        inside[start : start + length] = True
    return inside


def backward(
    tensors: tuple[Tensor, ...],
    work: Work,
    marks: Marks,
    scaling: float,
    dense: Dense,
    start: tuple[Tensor, Tensor] | None = None,
) -> Triple:
    """Gradients of query, key and value, given gradient, query, key, value, output and log-sum-exp of the rows.

    Those of key and value are added to `start`, in place.
    """
    from lemo.ops.attend_rows import kernel

    grad, query, key, value, output, lse = tensors
    lse = lse.contiguous()
    sum_of_query = like_rows(query, False, torch.float32)
    d_key, d_value = start or (like_rows(key, False), like_rows(value, False))
    steps = _steps(query, marks)
    for queries, keys, found in steps.documents:
        for begin, end, first in found.stripes:
            rows = slice(queries.start + first, queries.stop)
            if rows.start == rows.stop:
                continue
            part = slice(keys.start + begin, keys.start + end)
            cut = [t[:, rows] for t in (grad, query)] + [t[:, part] for t in (key, value)]
            cut += [t[:, rows] for t in (output, lse)]
            d_query, *pair = dense.backward(*cut, False, scaling)
            sum_of_query[:, rows] += d_query
            _give((d_key, d_value), pair, part, start is not None)
            del d_query, pair, cut  # before the next rectangle's
    d_query, delta = kernel.backward_query(
        grad, query, key, value, (output, lse), work, scaling, None, seen=steps.backward_2N, start=sum_of_query
    )
    pair = kernel.backward_key(
        grad, query, key, value, (lse, delta), work, scaling, None, True, seen=steps.seeing_2K, start=(d_key, d_value)
    )
    return d_query, *pair


def _give(targets: tuple[Tensor, Tensor], pair: Sequence[Tensor], keys: slice, adds: bool) -> None:
    """Gradients of some keys and values, written where those of all are, or added to them."""
    for target, found in zip(targets, pair, strict=True):
        if adds:
            target[:, keys].add_(found)
        else:
            target[:, keys].copy_(found)
