"""Where queries and keys are cut into rectangles, found on the host from what every query sees."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """How queries and keys are cut.

    Attributes:
        chunk: most queries that share a rectangle forward.
        stripe: most keys that share a rectangle backward; between long runs of queries, twice as many.
        step: ends of rectangles are rounded to multiples of it, so that dense kernels meet few different shapes. A
            multiple of every tile's rows, as are chunk and stripe.
        run: queries in runs at least this long, in the mean, are cut where a run begins that lies more than a step
            behind the one before.
    """

    chunk: int = 2048
    stripe: int = 4096
    step: int = 512
    run: int = 512

    def __post_init__(self) -> None:
        """Raises ValueError when a tile could cross a border."""
        if any(size < 1 or size % 128 for size in (self.chunk, self.stripe, self.step)):
            raise ValueError(f"chunk, stripe and step must be multiples of 128, got {self}")


@dataclass(frozen=True)
class Rectangles:
    """Rectangles of one document; places count from its first query and its first key.

    Attributes:
        chunks: (begin, end, depth): queries [begin, end) see all keys [0, depth). They are all queries, in order.
        stripes: (begin, end, first): keys [begin, end) are seen by all queries from `first` on. They are all keys, in
            order; no query is behind the last stripe.
    """

    chunks: tuple[tuple[int, int, int], ...]
    stripes: tuple[tuple[int, int, int], ...]


def cut_document(seen_N: Tensor, keys: int, cut: Cut, tile: int) -> Rectangles:
    """Rectangles of one document's queries and keys.

    Queries in long runs, far from each other, are cut where a run begins: what is left is the triangle of each run
    with itself. Others are cut evenly.

    Args:
        seen_N: (N,) ascending keys that each query sees, on the host.
        keys: of the document.
        cut: sizes.
        tile: queries of a kernel's tile, which no border may cut.
    """
    queries = len(seen_N)
    if not queries:
        return Rectangles((), tuple((begin, end, 0) for begin, end in _pieces([0, keys], cut.stripe)))
    begins = _run_begins(seen_N, cut, tile)
    pieces = _pieces([*(begins or [0]), queries], cut.chunk)
    chunks = [(begin, end, int(seen_N[begin]) // cut.step * cut.step) for begin, end in pieces]
    if begins is None:
        borders, most, rounding = {0, keys}, cut.stripe, cut.step
    else:
        # The first query of a chunk sees all keys before it.
        before = {int(seen_N[at] - 1) // cut.step * cut.step for at, *_ in chunks}
        borders, most, rounding = {0, keys} | before, 2 * cut.stripe, tile
    stripes = list(_pieces(sorted(borders), most))
    ends = torch.tensor([end for _, end in stripes], dtype=seen_N.dtype)
    first = [min(-(-at // rounding) * rounding, queries) for at in torch.searchsorted(seen_N, ends).tolist()]
    first[-1] = queries
    return Rectangles(tuple(chunks), tuple((a, b, at) for (a, b), at in zip(stripes, first, strict=True)))


def _run_begins(seen_N: Tensor, cut: Cut, tile: int) -> list[int] | None:
    """Where runs of queries that lie apart begin, in whole tiles; None where there are none, or runs are short."""
    gaps_N = seen_N.diff(prepend=seen_N.new_zeros(1))
    apart = torch.nonzero(gaps_N > cut.step).flatten().tolist()
    if not apart or len(seen_N) < cut.run * (int((gaps_N[1:] > 1).sum()) + 1):
        return None
    rounded = {-(-at // tile) * tile for at in apart}
    return sorted(at for at in rounded | {0} if at < len(seen_N))


def _pieces(borders: list[int], most: int) -> Iterator[tuple[int, int]]:
    """What lies between borders, in pieces of `most`."""
    for begin, end in itertools.pairwise(borders):
        for at in range(begin, end, most):
            yield at, min(at + most, end)
