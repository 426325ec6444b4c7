"""The backward pass on near keys and a sample of the far ones, cut into kernels' work.

A query of stripe a sees keys of its own stripe up to its position: a diagonal, for our own kernel, with a stripe in
the place of a document. It sees all of stripe a - 1, and all of each far stripe that was drawn: rectangles. Their keys
are gathered, one run after another for every stripe of queries, so that a kernel for sequences of varied length does
many of them at once, and their gradients are added where they came from. A weight w of a far key is part of the
log-sum-exp: w exp(s - lse) = exp(s - (lse - log w)), so that no gradient is rounded once more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lemo.ops.attend_rows import vendor
from lemo.ops.attend_rows.checks import why_not_triton
from lemo.ops.attend_rows.far import FarKeys, upload
from lemo.ops.attend_rows.reference import Rows, documents
from lemo.ops.attend_rows.stripes import ordered
from lemo.ops.attend_rows.tiling import Work, like_rows
from lemo.ops.attend_rows.vendor import Spans, Triple, varlen_backward, varlen_runs
from lemo.ops.backend import choose_with_vendor, send

Pair = tuple[Tensor, Tensor]
GATHERED_KEYS = 65536  # of one call: their copies and gradients are a few times the keys' own size
_OP = "attend_rows with drawn far keys"


def choose(backend: str, query: Tensor, keys: Rows, far: FarKeys) -> str:
    """`vendor` for rectangles by the vendor's kernel, `triton`, or `reference`.

    Raises:
        BackendError: the backend asked for cannot run; the message says why.
    """

    def why_not_vendor() -> str | None:
        reason = vendor.why_not(query, None)
        if reason is None and not varlen_runs(query.dtype, query.shape[2], query.device):
            reason = "the kernel for varied lengths failed its probe"
        return reason or _why_not_kernel(query, keys, far)

    return choose_with_vendor(_OP, backend, why_not_vendor, lambda: _why_not_kernel(query, keys, far))


def _why_not_kernel(query: Tensor, keys: Rows, far: FarKeys) -> str | None:
    if far.first_S is None:
        return "not every row of every document is a key, or rows lie between documents"
    if far.stripe % 128:
        return f"stripes of {far.stripe} keys are not made of whole tiles"
    return why_not_triton(query, keys)


@dataclass(frozen=True)
class _Sequence:
    """Queries of one stripe of one document, and the whole stripes of keys that they read."""

    queries: tuple[int, int]
    starts: tuple[int, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class _Cut:
    """The work of one backward pass.

    Attributes:
        segments: first query, queries, first key and keys of each diagonal.
        near: rectangles of the stripes before the queries' own, document by document.
        far: rectangles of drawn stripes.
    """

    segments: tuple[tuple[int, ...], ...]
    near: list[list[_Sequence]]
    far: list[list[_Sequence]]


def _cut(queries: Rows, keys: Rows, far: FarKeys, near_inside: bool) -> _Cut:
    """`near_inside`: the diagonals hold the stripes before the queries' own, too."""
    first, stripe = far.read(), far.stripe
    segments, near, distant, at = [], [], [], 0
    for drawn, (q_start, q_length, k_start, k_length) in zip(far.drawn, documents(queries, keys), strict=True):
        marks = first[at : at + len(drawn) + 1]
        at += len(drawn)
        if len(drawn) < 3:
            segments.append((q_start, q_length, k_start, k_length))
            continue
        live = [a for a in range(len(drawn)) if marks[a + 1] > marks[a]]
        own = [(a * stripe, min((a + 1) * stripe, k_length)) for a in live]
        if near_inside:
            own = [(max(begin - stripe, 0), end) for begin, end in own]
        segments += [
            (marks[a], marks[a + 1] - marks[a], k_start + b, e - b) for a, (b, e) in zip(live, own, strict=True)
        ]
        rows = {a: (marks[a], marks[a + 1]) for a in live}
        near.append([_Sequence(rows[a], (k_start + (a - 1) * stripe,)) for a in live if a > 0])
        distant.append([])
        for a in (a for a in live if a > 1):
            chosen = drawn[a].nonzero().flatten().tolist()
            distant[-1].append(_Sequence(rows[a], tuple(k_start + b * stripe for b in chosen), (a - 1) / len(chosen)))
    return _Cut(tuple(zip(*segments, strict=True)), [] if near_inside else near, distant)


def _calls(parts: list[list[_Sequence]], stripe: int) -> Iterator[list[_Sequence]]:
    """Sequences that one call does: of one document, so that their queries lie end to end, and not too many keys."""
    for sequences in parts:
        call, gathered = [], 0
        for sequence in sequences:
            size = len(sequence.starts) * stripe
            if call and gathered + size > GATHERED_KEYS:
                yield call
                call, gathered = [], 0
            call.append(sequence)
            gathered += size
        if call:
            yield call


def backward(
    tensors: tuple[Tensor, ...], queries: Rows, keys: Rows, far: FarKeys, scaling: float, by_vendor: bool
) -> Triple:
    """Gradients of query, key and value, given gradient, query, key, value, output and log-sum-exp of the rows."""
    from lemo.ops.attend_rows import kernel

    grad, query, key, value, output, lse = tensors
    lse, cut = lse.contiguous(), _cut(queries, keys, far, near_inside=False)
    sums = tuple(like_rows(t, False, torch.float32) for t in (query, key, value))
    rectangle = _vendor_rectangle if by_vendor else _triton_rectangle
    for call in (*_calls(cut.near, far.stripe), *_calls(cut.far, far.stripe)):
        rows = slice(call[0].queries[0], call[-1].queries[1])
        index = _gathered(call, far.stripe, query.device)
        d_query, *pair = rectangle(_operands(tensors, call, rows, index), call, far.stripe, scaling)
        sums[0][:, rows] += d_query
        for target, found in zip(sums[1:], pair, strict=True):
            target.transpose(0, 1).index_add_(0, index, found.transpose(0, 1).float())
    work = _diagonals(queries, keys, cut)
    d_query, delta = kernel.backward_query(grad, query, key, value, (output, lse), work, scaling, None, start=sums[0])
    pair = kernel.backward_key(
        grad, query, key, value, (lse, delta), work, scaling, None, True, start=(sums[1], sums[2])
    )
    return d_query, pair[0].to(key.dtype), pair[1].to(value.dtype)


def backward_query(tensors: tuple[Tensor, ...], queries: Rows, keys: Rows, far: FarKeys, scaling: float) -> Pair:
    """Gradient of the query, where all keys are constants, and Δ (H, N) of the rows."""
    from lemo.ops.attend_rows import kernel

    grad, query, key, value, output, lse = tensors
    lse, cut = lse.contiguous(), _cut(queries, keys, far, near_inside=True)
    sum_of_query = like_rows(query, False, torch.float32)
    for call in _calls(cut.far, far.stripe):
        rows = slice(call[0].queries[0], call[-1].queries[1])
        index = _gathered(call, far.stripe, query.device)
        operands = _operands(tensors, call, rows, index)
        sum_of_query[:, rows] += _triton_query(operands, *_segments(call, far.stripe, query.device), scaling)[0]
    work = _diagonals(queries, keys, cut)
    return kernel.backward_query(grad, query, key, value, (output, lse), work, scaling, None, start=sum_of_query)


def _diagonals(queries: Rows, keys: Rows, cut: _Cut) -> Work:
    return Work(ordered(queries).position_N, keys.position_N, cut.segments or ((),) * 4)


def _gathered(call: list[_Sequence], stripe: int, device: torch.device) -> Tensor:
    """(K,) int64 keys of a call, sequence by sequence."""
    starts = upload([start for sequence in call for start in sequence.starts], device)
    return (starts[:, None] + torch.arange(stripe, device=device)).flatten()


def _operands(tensors: tuple[Tensor, ...], call: list[_Sequence], rows: slice, index: Tensor) -> tuple[Tensor, ...]:
    """What a kernel is given: rows of the queries, gathered keys, and log-sum-exps that hold the weights."""
    grad, query, key, value, output, lse = tensors
    key, value = (t.transpose(0, 1).index_select(0, index).transpose(0, 1) for t in (key, value))
    lse = lse[:, rows]
    if any(sequence.weight != 1.0 for sequence in call):
        counts = torch.tensor([end - begin for begin, end in (sequence.queries for sequence in call)])
        logs = torch.tensor([math.log(sequence.weight) for sequence in call], dtype=lse.dtype)
        spread = logs.repeat_interleave(counts)
        lse = lse - send(spread, lse.device)
    return grad[:, rows], query[:, rows], key, value, output[:, rows], lse.contiguous()


def _ends(call: list[_Sequence], stripe: int) -> tuple[list[int], list[int]]:
    """Ends of the sequences' queries and keys, with a 0 before them."""
    first = call[0].queries[0]
    query_ends, key_ends = [0], [0]
    for sequence in call:
        query_ends.append(sequence.queries[1] - first)
        key_ends.append(key_ends[-1] + len(sequence.starts) * stripe)
    return query_ends, key_ends


def _vendor_rectangle(operands: tuple[Tensor, ...], call: list[_Sequence], stripe: int, scaling: float) -> Triple:
    ends = _ends(call, stripe)
    most = tuple(max(b - a for a, b in itertools.pairwise(side)) for side in ends)
    query_S, key_S = (upload(side, operands[0].device, torch.int32) for side in ends)
    return varlen_backward(operands, Spans(query_S, key_S, (most[0], most[1]), False), scaling)


def _triton_rectangle(operands: tuple[Tensor, ...], call: list[_Sequence], stripe: int, scaling: float) -> Triple:
    from lemo.ops.attend_rows import kernel

    work, seen = _segments(call, stripe, operands[0].device)
    d_query, delta = _triton_query(operands, work, seen, scaling)
    grad, query, key, value, _, lse = operands
    query_ends, key_ends = _ends(call, stripe)
    seen = torch.stack([_spread(side, key_ends, query.device) for side in (query_ends[:-1], query_ends[1:])])
    return d_query, *kernel.backward_key(grad, query, key, value, (lse, delta), work, scaling, None, True, seen=seen)


def _triton_query(operands: tuple[Tensor, ...], work: Work, seen: Tensor, scaling: float) -> Pair:
    from lemo.ops.attend_rows import kernel

    grad, query, key, value, output, lse = operands
    return kernel.backward_query(grad, query, key, value, (output, lse), work, scaling, None, seen=seen)


def _segments(call: list[_Sequence], stripe: int, device: torch.device) -> tuple[Work, Tensor]:
    """The sequences as documents for our kernels, and the keys that each query sees: all of its sequence."""
    query_ends, key_ends = _ends(call, stripe)
    sides = []
    for ends in (query_ends, key_ends):
        sides += [tuple(ends[:-1]), tuple(b - a for a, b in itertools.pairwise(ends))]
    # No position is looked at: every tile is seen whole.
    rows, columns = (torch.zeros(ends[-1], dtype=torch.int64, device=device) for ends in (query_ends, key_ends))
    seen = torch.stack([_spread(side, query_ends, device) for side in (key_ends[:-1], key_ends[1:])])
    return Work(rows, columns, tuple(sides)), seen


def _spread(numbers: list[int], ends: list[int], device: torch.device) -> Tensor:
    """(last end,) int32: each number for the entries of its sequence."""
    counts = torch.tensor(ends).diff()
    spread = torch.tensor(numbers, dtype=torch.int32).repeat_interleave(counts)
    return send(spread, device)
