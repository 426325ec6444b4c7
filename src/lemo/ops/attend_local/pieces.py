"""Work of the kernels of attend_rows that makes the backward pass of local attention.

Near keys, those of a row's own chunk and of the one before, are no window of positions: how many a row sees depends on
its place in its chunk. But they are one of other places: a row's place is its position and a gap for every chunk before
it. With a gap so wide that a key two chunks back is farther than the farthest of the chunk before, one window says
which keys are near; so kernels that know documents, order and windows need to be told no more, whichever rows are
queries or keys, and no position has to be known to the host.

Where the host knows the queries' positions, a vendor's kernel may have them. Queries that lie side by side in a chunk
are a run: with the sink, the chunk before and their own chunk up to the last of them gathered in that order, they see
what causal attention sees whose corner is the last pair. The keys' gradients are added up where they came from. Where
queries lie so scattered that runs would gather the same keys again and again, the vendor's kernel gets what all queries
of a chunk see whole, the chunk before and the sink, and our kernel the rows' own chunks.

The first rows of a document, its sink, have few keys that many queries see. Each run of queries gets a copy of them, as
a document of its own, so that many programs share what would be one program's work.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lemo.ops.attend_rows.far import upload
from lemo.ops.attend_rows.far_stripes import GATHERED_KEYS
from lemo.ops.attend_rows.stripes import ordered
from lemo.ops.attend_rows.tiling import Work
from lemo.ops.attend_rows.vendor import Spans
from lemo.ops.backend import send

if TYPE_CHECKING:
    from lemo.ops.attend_local.plan import LocalRows

LAST = torch.iinfo(torch.int32).max
"""Behind every place; where `ordered` puts rows that are not valid."""
SINK_QUERIES = 1024
"""Queries that share a copy of their document's sink."""
MOST_COPIES = 4
"""Gathered keys for each key of a chunk that has queries, above which these are too scattered for runs."""


@dataclass(frozen=True)
class Near:
    """Near keys as a window.

    Attributes:
        work: places of the rows, with queries as rows.
        window: a query sees the keys of the last so many places.
    """

    work: Work
    window: int


@dataclass(frozen=True)
class Sinks:
    """Sinks that are seen from behind the second chunk.

    Attributes:
        work: runs of queries as documents, each with a copy of its sink; queries of the first two chunks see nothing.
        index_K: (copied keys,) int64 which keys the copies are of.
        copies: first key, rows of the sink and copies of each document, in the order of `index_K`.
    """

    work: Work
    index_K: Tensor
    copies: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Rectangle:
    """Queries, a chunk or a run at a time, and the gathered keys that they see.

    Attributes:
        rows: the queries.
        index_K: (gathered keys,) int64 which keys these are.
        spans: queries of a chunk or run and their keys, as sequences.
    """

    rows: slice
    index_K: Tensor
    spans: Spans


@dataclass(frozen=True)
class Runs:
    """All queries, run by run.

    Attributes:
        calls: the runs as sequences, with their gathered keys, as many at a time as a call takes.
        order_C: (gathered keys of all calls,) int64 which they are, in the order of the keys that they are copies of.
        first_K: (K + 1,) int64 the first copy of each key in this order, and the number of copies.
    """

    calls: tuple[Rectangle, ...]
    order_C: Tensor
    first_K: Tensor

    def covers(self, rows: int) -> bool:
        """Whether all of so many rows are in a run."""
        return sum(call.rows.stop - call.rows.start for call in self.calls) == rows


def near_keys(local: LocalRows, chunks: int) -> Near:
    """The keys of a row's own chunk and, if `chunks` is 2, of the one before, of which a window may leave some."""
    before = (chunks - 1) * local.chunk
    reach = local.chunk + before if local.window is None else min(local.window, local.chunk + before)
    # Of the farthest chunk that counts keys up to reach - 1 back are seen; the next one begins before + 1 back.
    gap = max(reach - before - 1, 0)
    query_N, key_K = _rising(local)
    places = [_placed(query_N, local.chunk, gap)]
    places.append(places[0] if key_K is query_N else _placed(key_K, local.chunk, gap))
    return Near(Work(places[0], places[1], _segments(local)), reach + (chunks - 1) * gap)


def far_sinks(local: LocalRows) -> Sinks | None:
    """None where no row is so far behind its document's sink, or sees so far."""
    if not local.sink or not local.reaches_far or (local.window is not None and local.window <= local.chunk + 1):
        return None
    query_N, key_K = _rising(local)
    segments, copies, first_keys, at = [], [], [], 0
    for q_start, q_length, k_start, k_length in zip(*_segments(local), strict=True):
        size = min(local.sink, k_length)
        begins = range(0, q_length, SINK_QUERIES)
        for begin in begins:
            segments.append((q_start + begin, min(SINK_QUERIES, q_length - begin), at, size))
            first_keys += range(k_start, k_start + size)
            at += size
        if begins:
            copies.append((k_start, size, len(begins)))
    if not segments:
        return None
    index_K = upload(first_keys, key_K.device)
    # Places of rows that see nothing are before all others, those of keys of no sink behind them.
    seeing_N = torch.where(query_N >= 2 * local.chunk, query_N.clamp(max=LAST - 1), -1)
    among_K = key_K[index_K]
    among_K = torch.where(among_K < local.sink, among_K, LAST)
    return Sinks(Work(seeing_N, among_K, tuple(zip(*segments, strict=True))), index_K, tuple(copies))


def rectangles(local: LocalRows) -> tuple[Rectangle, ...]:
    """The chunk before and the sink, for rows behind the first chunk, where the host knows which rows these are."""
    assert local.position_on_host_N is not None
    made = []
    for q_start, q_length, k_start, _ in zip(*_segments(local), strict=True):
        chunk_n = local.position_on_host_N[q_start : q_start + q_length] // local.chunk
        found = (t.tolist() for t in torch.unique_consecutive(chunk_n, return_counts=True))
        at, call = q_start, _Call(q_start)
        for chunk, count in zip(*found, strict=True):
            at += count
            if chunk == 0:
                call = _Call(at)
                continue
            if call.keys and call.key_ends[-1] + local.chunk + local.sink > GATHERED_KEYS:
                made.append(call)
                call = _Call(at - count)
            before = k_start + (chunk - 1) * local.chunk
            # The second chunk has the sink in the chunk before.
            sink = local.sink if chunk >= 2 else 0
            keys = [torch.arange(k_start, k_start + sink), torch.arange(before, before + local.chunk)]
            call.add(keys, count, sink + local.chunk)
        if call.keys:
            made.append(call)
    return tuple(call.upload(local.keys.position_N.device) for call in made)


def find_runs(local: LocalRows) -> Runs | None:
    """Runs of queries, where the host knows which rows these are; None where they are too many."""
    assert local.position_on_host_N is not None
    chunk, calls, touched = local.chunk, [], 0
    for q_start, q_length, k_start, _ in zip(*_segments(local), strict=True):
        position_n = local.position_on_host_N[q_start : q_start + q_length]
        chunk_n = position_n // chunk
        touched += len(torch.unique_consecutive(chunk_n))
        alone_n = (position_n.diff() != 1) | (chunk_n.diff() != 0)
        borders = [0, *(alone_n.nonzero().flatten() + 1).tolist(), q_length] if q_length else []
        for begin, end in itertools.pairwise(borders):
            own, last = int(chunk_n[begin]) * chunk, int(position_n[end - 1])
            # The second chunk has the sink in the chunk before.
            sink = local.sink if own >= 2 * chunk else 0
            keys = [torch.arange(k_start, k_start + sink), torch.arange(max(own - chunk, 0), last + 1) + k_start]
            count = sink + len(keys[1])
            call = calls[-1] if calls else None
            if call is None or call.stop != q_start + begin or call.key_ends[-1] + count > GATHERED_KEYS:
                call = _Call(q_start + begin)
                calls.append(call)
            call.add(keys, end - begin, count)
    copies_C = torch.cat([part for call in calls for part in call.keys]) if calls else torch.arange(0)
    if len(copies_C) > MOST_COPIES * touched * chunk:
        return None
    counts_K = torch.bincount(copies_C, minlength=len(local.keys.position_N))
    device = local.keys.position_N.device
    firsts_K = torch.cat([counts_K.new_zeros(1), counts_K.cumsum(0)])
    order_C, first_K = (send(t, device) for t in (torch.argsort(copies_C, stable=True), firsts_K))
    return Runs(tuple(call.upload(device, causal=True) for call in calls), order_C, first_K)


@dataclass
class _Call:
    """Sequences in the making: first query, gathered keys, and ends of the sequences."""

    first: int
    keys: list[Tensor] = field(default_factory=list)
    query_ends: list[int] = field(default_factory=lambda: [0])
    key_ends: list[int] = field(default_factory=lambda: [0])

    @property
    def stop(self) -> int:
        """Behind the last query."""
        return self.first + self.query_ends[-1]

    def add(self, keys: list[Tensor], queries: int, count: int) -> None:
        """One more sequence of so many queries, with `count` keys."""
        self.keys += keys
        self.query_ends.append(self.query_ends[-1] + queries)
        self.key_ends.append(self.key_ends[-1] + count)

    def upload(self, device: torch.device, causal: bool = False) -> Rectangle:
        ends = self.query_ends, self.key_ends
        most = [max(b - a for a, b in itertools.pairwise(side)) for side in ends]
        query_S, key_S = (upload(side, device, torch.int32) for side in ends)
        spans = Spans(query_S, key_S, (most[0], most[1]), causal)
        return Rectangle(slice(self.first, self.stop), send(torch.cat(self.keys), device), spans)


def _rising(local: LocalRows) -> tuple[Tensor, Tensor]:
    query_N = ordered(local.queries).position_N
    return query_N, query_N if local.keys is local.queries else ordered(local.keys).position_N


def _segments(local: LocalRows) -> tuple[tuple[int, ...], ...]:
    sides = (local.queries.starts, local.queries.lengths, local.keys.starts, local.keys.lengths)
    return tuple(tuple(side) for side in sides)


def _placed(position_N: Tensor, chunk: int, gap: int) -> Tensor:
    return torch.where(position_N < LAST, position_N + position_N // chunk * gap, LAST)
