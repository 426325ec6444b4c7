"""Kept queries and all keys, cut into rectangles without mask, for vendor kernels, and a diagonal, for our own.

A query sees the keys up to its own position: the border between what is seen and what is not is a staircase. Forward,
queries are cut into chunks; all queries of a chunk see the keys that its first one sees: a rectangle, from whose
output and log-sum-exp our kernel goes on with the rest. Backward, keys are cut into stripes; all queries behind a
stripe see all of it: a rectangle again, to whose gradients our kernel adds the rest. Both passes of a vendor's kernel
are exact when given the output and log-sum-exp of the whole row.

Where rectangles end depends on which rows were kept, and that only the device knows. `Marks` holds these ends on the
device, and copies them to the host without waiting; `read` waits for the copy. Kernels for varied lengths take them
from the device. Dense kernels are faster but need them on the host: whoever calls `plan_rows` right after the
selection and works on (projections, say) before attending gives the copy the time it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lemo.ops.attend_rows.reference import Rows, Segments
from lemo.ops.attend_rows.tiling import Work, like_rows
from lemo.ops.attend_rows.vendor import Dense, Spans, Triple, varlen_backward, varlen_forward


@dataclass(frozen=True)
class Cut:
    """How queries and keys are cut.

    Attributes:
        chunk: queries that share a rectangle forward.
        stripe: keys that share a rectangle backward.
        step: ends of rectangles are rounded to multiples of it, so that dense kernels meet few different shapes. A
            multiple of every tile's rows, as are chunk and stripe.
    """

    chunk: int = 2048
    stripe: int = 4096
    step: int = 512

    def __post_init__(self) -> None:
        """Raises ValueError when a tile could cross a border."""
        if any(size < 1 or size % 128 for size in (self.chunk, self.stripe, self.step)):
            raise ValueError(f"chunk, stripe and step must be multiples of 128, got {self}")


@dataclass
class Marks:
    """Where the rectangles of one selection end.

    Attributes:
        cut: how queries and keys are cut.
        ends_N: (N,) int32 first key that a query does not see.
        depth_C: int32, keys of the rectangle of each chunk, document by document.
        first_S: int32, place in its document of the first query of the rectangle of each stripe.
    """

    cut: Cut
    ends_N: Tensor
    depth_C: Tensor
    first_S: Tensor
    _copies: tuple[Tensor, Tensor] = field(repr=False)
    _copied: torch.cuda.Event | None = field(repr=False)
    _read: tuple[list[int], list[int]] | None = field(default=None, repr=False)

    def read(self) -> tuple[list[int], list[int]]:
        """`depth_C` and `first_S` on the host; waits until the device has come past `plan_rows`."""
        if self._read is None:
            if self._copied is not None:
                self._copied.synchronize()
            self._read = self._copies[0].tolist(), self._copies[1].tolist()
        return self._read


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

    Call it once the rows are chosen, and do other work before attending: sizes travel to the host meanwhile, and
    attention waits for them. It is good for every layer that attends with these rows, forward and backward.

    Args:
        queries: documents and positions of the query rows.
        keys: documents and positions of all key rows; all valid.
        cut: how queries and keys are cut; the measured default when None.

    *Cost*: a bisection per query, and a copy of one number per chunk of queries and stripe of keys. No waiting.
    """
    cut, rising = cut or Cut(), ordered(queries)
    work = Work.between(rising, keys)
    ends_N = torch.zeros(len(rising.position_N), dtype=torch.int32, device=rising.position_N.device)
    for q_start, q_length, k_start, k_length in zip(*work.segments, strict=True):
        positions = rising.position_N[q_start : q_start + q_length].contiguous()
        among = keys.position_N[k_start : k_start + k_length].contiguous()
        ends_N[q_start : q_start + q_length] = k_start + torch.searchsorted(among, positions, right=True)
    marks = _marks(work, cut, ends_N)
    return PlannedRows(queries.starts, queries.lengths, queries.position_N, queries.valid_N, marks)


def _marks(work: Work, cut: Cut, ends_N: Tensor) -> Marks:
    depths, firsts = [], []
    for q_start, q_length, k_start, k_length in zip(*work.segments, strict=True):
        ends = ends_N[q_start : q_start + q_length]
        depths.append((ends[:: cut.chunk] - k_start) // cut.step * cut.step)
        borders = torch.arange(1, -(-k_length // cut.stripe), device=ends.device, dtype=torch.int32)
        found = torch.searchsorted(ends, borders * cut.stripe + k_start, right=True, out_int32=True)
        # Rounded up: the diagonal takes what the rectangle leaves. No query sees past the last stripe.
        found = ((found + cut.step - 1) // cut.step * cut.step).clamp_(max=q_length)
        firsts.append(torch.cat([found, found.new_full((min(k_length, 1),), q_length)]))
    empty = ends_N.new_empty(0)
    marks = torch.cat(depths or [empty]), torch.cat(firsts or [empty])
    if ends_N.device.type != "cuda":
        return Marks(cut, ends_N, *marks, marks, None)
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in marks]
    copied = torch.cuda.Event()
    copied.record()
    return Marks(cut, ends_N, *marks, (copies[0], copies[1]), copied)


@dataclass(frozen=True)
class _Document:
    """One document: its slices, and where its marks lie among all."""

    queries: slice
    keys: slice
    chunks: slice
    stripes: slice


def _documents(work: Work, cut: Cut) -> Iterator[_Document]:
    chunk = stripe = 0
    for q_start, q_length, k_start, k_length in zip(*work.segments, strict=True):
        chunks, stripes = -(-q_length // cut.chunk), -(-k_length // cut.stripe)
        yield _Document(
            slice(q_start, q_start + q_length),
            slice(k_start, k_start + k_length),
            slice(chunk, chunk + chunks),
            slice(stripe, stripe + stripes),
        )
        chunk, stripe = chunk + chunks, stripe + stripes


def forward(
    query: Tensor, pair: tuple[Tensor, Tensor], work: Work, marks: Marks, scaling: float, dense: Dense | None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp as `kernel.forward` gives them.

    Args:
        query: (H, N, D).
        pair: keys and values (G, K, D).
        work: documents and positions, with queries as rows.
        marks: of this work.
        scaling: factor of the scores.
        dense: kernel of the rectangles, whose ends are then read on the host; None for the one for varied lengths.
    """
    from lemo.ops.attend_rows import kernel

    output = like_rows(query, False)
    lse = torch.full(query.shape[:2], -torch.inf, dtype=torch.float32, device=query.device)
    floor_N = torch.zeros_like(marks.ends_N)
    for document in _documents(work, marks.cut):
        depth = marks.depth_C[document.chunks]
        rows = document.queries.stop - document.queries.start
        floor_N[document.queries] = document.keys.start + depth.repeat_interleave(marks.cut.chunk)[:rows]
        for at, part in enumerate(_parts(document.queries, marks.cut.chunk), document.chunks.start):
            found = _forward_rectangle(query[:, part], pair, document, at, (marks, scaling, dense))
            if found is not None:
                output[:, part], lse[:, part] = found
    if not work.covers_rows():
        lse = torch.where(_inside(work, lse), lse, 0.0)
    seen = torch.stack([floor_N, marks.ends_N])
    return kernel.forward(query, *pair, work, scaling, None, seen=seen, start=(output, lse))


def _parts(rows: slice, size: int) -> Iterator[slice]:
    for begin in range(rows.start, rows.stop, size):
        yield slice(begin, min(begin + size, rows.stop))


def _inside(work: Work, lse: Tensor) -> Tensor:
    inside = torch.zeros(lse.shape[1], dtype=torch.bool, device=lse.device)
    for start, length in zip(*work.segments[:2], strict=True):
        inside[start : start + length] = True
    return inside


def _forward_rectangle(
    query: Tensor, pair: tuple[Tensor, Tensor], document: _Document, at: int, how: tuple
) -> tuple[Tensor, Tensor] | None:
    marks, scaling, dense = how
    if dense is not None:
        depth = marks.read()[0][at]
        keys = slice(document.keys.start, document.keys.start + depth)
        return dense.forward(query, *(t[:, keys] for t in pair), False, scaling) if depth else None
    rows = query.shape[1]
    most = document.keys.stop - document.keys.start
    ends = torch.zeros(2, 2, dtype=torch.int32, device=query.device)
    ends[0, 1].fill_(rows)
    ends[1, 1] = marks.depth_C[at]
    spans = Spans(ends[0], ends[1], (rows, most), False)
    output, lse = varlen_forward(query, tuple(t[:, document.keys] for t in pair), spans, scaling)
    # A rectangle of no keys: whatever the vendor makes of it, our kernel starts from nothing.
    empty = marks.depth_C[at] == 0
    return output.masked_fill_(empty, 0.0), lse.masked_fill_(empty, -torch.inf)


def backward(
    tensors: tuple[Tensor, ...],
    work: Work,
    marks: Marks,
    scaling: float,
    dense: Dense | None,
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
    floor_N = torch.zeros_like(marks.ends_N)
    end_K = torch.zeros(key.shape[1], dtype=torch.int32, device=key.device)
    for document in _documents(work, marks.cut):
        rows, columns = (s.stop - s.start for s in (document.queries, document.keys))
        first = marks.first_S[document.stripes]
        end_K[document.keys] = document.queries.start + first.repeat_interleave(marks.cut.stripe)[:columns]
        place = torch.arange(rows, dtype=torch.int32, device=key.device)
        behind = torch.searchsorted(first[:-1].contiguous(), place, right=True, out_int32=True)
        floor_N[document.queries] = document.keys.start + behind * marks.cut.stripe
        # The last stripe has no query behind it.
        for at, part in enumerate(list(_parts(document.keys, marks.cut.stripe))[:-1], document.stripes.start):
            sums = sum_of_query, d_key, d_value
            _backward_rectangle(tensors, sums, (document, part, at), marks, (scaling, dense, start is not None))
    seen = torch.stack([floor_N, marks.ends_N])
    d_query, delta = kernel.backward_query(
        grad, query, key, value, (output, lse), work, scaling, None, seen=seen, start=sum_of_query
    )
    seen = torch.stack([kernel.bounds(work.turned(), None, True)[0], end_K])
    pair = kernel.backward_key(
        grad, query, key, value, (lse, delta), work, scaling, None, True, seen=seen, start=(d_key, d_value)
    )
    return d_query, *pair


def _backward_rectangle(
    tensors: tuple[Tensor, ...], sums: tuple[Tensor, ...], where: tuple, marks: Marks, how: tuple
) -> None:
    """Adds the gradients of one stripe's rectangle to the sum of the queries', and writes or adds those of its keys."""
    document, keys, at = where
    scaling, dense, adds = how
    sum_of_query, d_key, d_value = sums
    rows = document.queries.stop - document.queries.start
    first = marks.read()[1][at] if dense is not None else 0
    if first >= rows:
        return
    queries = slice(document.queries.start + first, document.queries.stop)
    grad, query, key, value, output, lse = tensors
    cut = [t[:, queries] for t in (grad, query)] + [t[:, keys] for t in (key, value)]
    cut += [t[:, queries] for t in (output, lse)]
    if dense is not None:
        d_query, *pair = dense.backward(*cut, False, scaling)
        sum_of_query[:, queries] += d_query
        _give((d_key, d_value), pair, keys, adds)
        return
    begin = marks.first_S[at]
    ends = torch.zeros(2, 2, dtype=torch.int32, device=query.device)
    ends[0, 0] = begin
    ends[0, 1].fill_(rows)
    ends[1, 1].fill_(keys.stop - keys.start)
    spans = Spans(ends[0], ends[1], (rows, keys.stop - keys.start), False)
    d_query, *pair = varlen_backward(tuple(cut), spans, scaling)
    # What no pair reaches, the kernel leaves as it was.
    before = torch.arange(rows, device=query.device) < begin
    sum_of_query[:, queries] += d_query.masked_fill_(before[None, :, None], 0.0)
    _give((d_key, d_value), [found.masked_fill_(begin >= rows, 0.0) for found in pair], keys, adds)


def _give(targets: tuple[Tensor, Tensor], pair: Sequence[Tensor], keys: slice, adds: bool) -> None:
    """Gradients of some keys and values, written where those of all are, or added to them."""
    for target, found in zip(targets, pair, strict=True):
        if adds:
            target[:, keys].add_(found)
        else:
            target[:, keys].copy_(found)
