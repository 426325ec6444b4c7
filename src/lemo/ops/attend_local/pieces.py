"""Work of the kernels of attend_rows that makes the backward pass of local attention.

Near keys, those of a row's own chunk and of the one before, are no window of positions: how many a row sees depends on
its place in its chunk. But they are one of other places: a row's place is its position and a gap for every chunk before
it. With a gap so wide that a key two chunks back is farther than the farthest of the chunk before, one window says
which keys are near; so kernels that know documents, order and windows need to be told no more, whichever rows are
queries or keys, and no position has to be known to the host.

The first rows of a document, its sink, have few keys that many queries see. Each run of queries gets a copy of them, as
a document of its own, so that many programs share what would be one program's work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lemo.ops.attend_rows.far import upload
from lemo.ops.attend_rows.stripes import ordered
from lemo.ops.attend_rows.tiling import Work

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


def near_keys(local: LocalRows) -> Near:
    """The keys of a row's own chunk and of the one before, of which a window may leave some."""
    reach = 2 * local.chunk if local.window is None else min(local.window, 2 * local.chunk)
    # A key of the chunk before is seen up to reach - 1 back, one of the chunk before that is chunk + 1 back at least.
    gap = max(reach - local.chunk - 1, 0)
    query_N, key_K = _rising(local)
    places = [_placed(query_N, local.chunk, gap)]
    places.append(places[0] if key_K is query_N else _placed(key_K, local.chunk, gap))
    return Near(Work(places[0], places[1], _segments(local)), reach + gap)


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


def _rising(local: LocalRows) -> tuple[Tensor, Tensor]:
    query_N = ordered(local.queries).position_N
    return query_N, query_N if local.keys is local.queries else ordered(local.keys).position_N


def _segments(local: LocalRows) -> tuple[tuple[int, ...], ...]:
    sides = (local.queries.starts, local.queries.lengths, local.keys.starts, local.keys.lengths)
    return tuple(tuple(side) for side in sides)


def _placed(position_N: Tensor, chunk: int, gap: int) -> Tensor:
    return torch.where(position_N < LAST, position_N + position_N // chunk * gap, LAST)
