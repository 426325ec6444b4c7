"""Work of the kernels of attend_rows that makes the backward pass of local attention.

Near keys, those of a row's own chunk and of the one before, are no window of positions: how many a row sees depends on
its place in its chunk. But they are one of other places: a row's place is its position and a gap for every chunk before
it. With a gap so wide that a key two chunks back is farther than the farthest of the chunk before, one window says
which keys are near; so kernels that know documents, order and windows need to be told no more, whichever rows are
queries or keys, and no position has to be known to the host.

Where the host knows the queries' positions, a vendor's kernel may have what all queries of a chunk see whole: the chunk
before, and the sink. Their keys are gathered, one run after another for every chunk that has queries, and their
gradients are added where they came from.

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

if TYPE_CHECKING:
    from lemo.ops.attend_local.plan import LocalRows

LAST = torch.iinfo(torch.int32).max
"""Behind every place; where `ordered` puts rows that are not valid."""
SINK_QUERIES = 1024
"""Queries that share a copy of their document's sink."""


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
    """Queries of one document, chunk by chunk, and the gathered keys that all queries of a chunk see.

    Attributes:
        rows: the queries.
        index_K: (gathered keys,) int64 which keys these are.
        spans: queries of a chunk and its keys, as sequences.
    """

    rows: slice
    index_K: Tensor
    spans: Spans


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
            call.keys += [torch.arange(k_start, k_start + sink), torch.arange(before, before + local.chunk)]
            call.query_ends.append(call.query_ends[-1] + count)
            call.key_ends.append(call.key_ends[-1] + sink + local.chunk)
        if call.keys:
            made.append(call)
    return tuple(call.upload(local.keys.position_N.device) for call in made)


@dataclass
class _Call:
    """A rectangle in the making: first query, gathered keys, and ends of its sequences."""

    first: int
    keys: list[Tensor] = field(default_factory=list)
    query_ends: list[int] = field(default_factory=lambda: [0])
    key_ends: list[int] = field(default_factory=lambda: [0])

    def upload(self, device: torch.device) -> Rectangle:
        ends = self.query_ends, self.key_ends
        most = [max(b - a for a, b in itertools.pairwise(side)) for side in ends]
        query_S, key_S = (upload(side, device, torch.int32) for side in ends)
        spans = Spans(query_S, key_S, (most[0], most[1]), False)
        index_K = torch.cat(self.keys)
        if device.type == "cuda":
            index_K = index_K.pin_memory().to(device, non_blocking=True)
        return Rectangle(slice(self.first, self.first + self.query_ends[-1]), index_K, spans)


def _rising(local: LocalRows) -> tuple[Tensor, Tensor]:
    query_N = ordered(local.queries).position_N
    return query_N, query_N if local.keys is local.queries else ordered(local.keys).position_N


def _segments(local: LocalRows) -> tuple[tuple[int, ...], ...]:
    sides = (local.queries.starts, local.queries.lengths, local.keys.starts, local.keys.lengths)
    return tuple(tuple(side) for side in sides)


def _placed(position_N: Tensor, chunk: int, gap: int) -> Tensor:
    return torch.where(position_N < LAST, position_N + position_N // chunk * gap, LAST)
