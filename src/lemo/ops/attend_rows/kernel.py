"""Triton kernels of attend_rows, after FlashAttention-2.

A program owns a tile of rows of one document: of queries in the forward and dQ kernels, of keys in the dK/dV kernel. It
walks the tiles on the other side that its rows see and never stores a score. Positions ascend, so what a row sees is a
range of rows of the other side; `_bounds_kernel` finds it by bisection on the device. Tiles that all rows see whole run
without a mask. Which rows a program owns comes from a table made on the host from the lengths of the documents.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.ops.attend_rows.tiling import Tiling, Work, like_rows, sizes, tile_table, tilings
from lemo.ops.backend import on_device_of

Pair = tuple[Tensor, Tensor]


def bounds(work: Work, window: int | None, owns_keys: bool, ordered: bool = True) -> Tensor:
    """(2, rows) int32: first and end of the rows on the other side that each row sees (keys), or is seen by (queries).

    Queries that are not `ordered` make no range: then a key's is its whole document.
    """
    table, tiles, rounds = tile_table(work.segments, 128, work.rows.device, not owns_keys)
    found = torch.empty(2, work.rows.shape[0], dtype=torch.int32, device=work.rows.device)
    if owns_keys:
        # Queries at or after the key's position, and before the window has left it.
        shifts = (-1 if ordered else None, window - 1 if ordered and window else None)
    else:
        shifts = (-window if window else None, 0)
    if tiles == 0:
        return found
    with on_device_of(work.rows):
        _bounds_kernel[(tiles,)](
            work.rows, work.others, found, table, work.rows.shape[0], rounds, shifts[0] or 0, shifts[1] or 0,
            HAS_FIRST=shifts[0] is not None, HAS_END=shifts[1] is not None, ROWS=128,
        )  # fmt: skip
    return found


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    work: Work,
    scaling: float,
    window: int | None,
    tiling: Tiling | None = None,
    seen: Tensor | None = None,
    start: Pair | None = None,
) -> Pair:
    """Output (H, N, D) over rows in memory, and natural log-sum-exp (H, N).

    `start`: output and log-sum-exp over other keys, to go on from, in place; `seen`: what `bounds` would find.
    """
    query, key, value = _near(query), _near(key), _near(value)
    heads, rows, head_dim = query.shape
    covered = work.covers_rows()
    lse = (query.new_empty if covered else query.new_zeros)(heads, rows, dtype=torch.float32)
    output, lse = start or (like_rows(query, covered), lse)
    tiling = tiling or tilings("forward", head_dim, query.dtype)[0]
    table, tiles, _ = tile_table(work.segments, tiling.rows, query.device, True)
    if tiles == 0:
        return output, lse
    with on_device_of(query):
        _forward_kernel[(tiles * heads,)](
            query, key, value, output, lse, bounds(work, window, False) if seen is None else seen, table,
            *query.stride(), *key.stride(), *value.stride(), *output.stride(), rows, tiles, float(scaling),
            START=start is not None, **sizes(query, key, tiling, window, tiles * heads),
        )  # fmt: skip
    return output, lse


def backward_query(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    saved: Pair,
    work: Work,
    scaling: float,
    window: int | None,
    tiling: Tiling | None = None,
    seen: Tensor | None = None,
    start: Tensor | None = None,
) -> Pair:
    """Gradient of the queries, and delta (H, N) fp32: the sum of grad · output that the key kernel needs.

    `start`: fp32 gradient through other keys, laid out like the result, that is added; `seen`: see `forward`.
    """
    lse = saved[1]
    grad, query, key, value, output = (_near(t) for t in (grad, query, key, value, saved[0]))
    heads, rows, head_dim = query.shape
    d_query = like_rows(query, work.covers_rows())
    delta = torch.empty_like(lse)
    tiling = tiling or tilings("query", head_dim, query.dtype)[0]
    table, tiles, _ = tile_table(work.segments, tiling.rows, query.device, True)
    if tiles == 0:
        return d_query, delta
    with on_device_of(query):
        _query_kernel[(tiles * heads,)](
            grad, query, key, value, output, lse, delta, d_query, d_query if start is None else start,
            bounds(work, window, False) if seen is None else seen, table,
            *grad.stride(), *query.stride(), *key.stride(), *value.stride(), *output.stride(), *d_query.stride(),
            rows, tiles, float(scaling),
            START=start is not None, **sizes(query, key, tiling, window, tiles * heads),
        )  # fmt: skip
    return d_query, delta


def backward_key(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sums: Pair,
    work: Work,
    scaling: float,
    window: int | None,
    ordered: bool,
    tiling: Tiling | None = None,
    seen: Tensor | None = None,
    start: Pair | None = None,
) -> Pair:
    """Gradients of keys and values; `sums` are lse and delta, `work` has the queries as its rows.

    `start`: gradients through other queries, to which these are added, in place; `seen`: see `forward`.
    """
    work = work.turned()
    grad, query, key, value = _near(grad), _near(query), _near(key), _near(value)
    groups, rows, head_dim = key.shape
    d_key, d_value = start or (like_rows(key, work.covers_rows()), like_rows(value, work.covers_rows()))
    tiling = tiling or tilings("key", head_dim, query.dtype)[0]
    table, tiles, _ = tile_table(work.segments, tiling.rows, query.device, False)
    if tiles == 0:
        return d_key, d_value
    with on_device_of(query):
        _key_kernel[(tiles * groups,)](
            grad, query, key, value, *sums, d_key, d_value, work.others, work.rows,
            bounds(work, window, True, ordered) if seen is None else seen, table,
            *grad.stride(), *query.stride(), *key.stride(), *value.stride(), *d_key.stride(),
            query.shape[1], rows, tiles, float(scaling), window or 0,
            ORDERED=ordered, START=start is not None, **sizes(query, key, tiling, window, tiles * groups),
        )  # fmt: skip
    return d_key, d_value


def _near(tensor: Tensor) -> Tensor:
    """The tensor, copied if a tile of it reaches farther than the 32 bits that offsets inside a tile have."""
    _, row, dim = tensor.stride()
    return tensor if 128 * row + tensor.shape[2] * dim < 2**31 else tensor.contiguous()


@triton.jit
def _upper_bound(position_ptr, low, high, target, rounds):
    """First index in [low, high) whose position is greater than the target; `high` if there is none."""
    for _ in range(rounds):
        middle = (low + high) // 2
        open_ = low < high
        below = open_ & (tl.load(position_ptr + middle, mask=open_, other=0) <= target)
        high = tl.where(open_ & (below == 0), middle, high)
        low = tl.where(below, middle + 1, low)
    return low


@triton.jit
def _bounds_kernel(
    row_ptr, other_ptr, bounds_ptr, table_ptr, rows, rounds, first_shift, end_shift,
    HAS_FIRST: tl.constexpr, HAS_END: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tile = table_ptr + tl.program_id(0) * 4
    row = tl.load(tile) + tl.arange(0, ROWS)
    inside = row < tl.load(tile + 1)
    position = tl.load(row_ptr + row, mask=inside, other=0)
    low = tl.zeros((ROWS,), dtype=tl.int32) + tl.load(tile + 2)
    high = tl.zeros((ROWS,), dtype=tl.int32) + tl.load(tile + 3)
    first = low
    end = high
    if HAS_FIRST:
        first = _upper_bound(other_ptr, low, high, position + first_shift, rounds)
    if HAS_END:
        end = _upper_bound(other_ptr, low, high, position + end_shift, rounds)
    tl.store(bounds_ptr + row, first, mask=inside)
    tl.store(bounds_ptr + tl.cast(rows, tl.int64) + row, end, mask=inside)


@triton.jit
def _tile_of(tiles, table_ptr, BY_HEAD: tl.constexpr):
    """Which heads a program is for, and its tile: first row, end of its document, other side's first row and end."""
    pid = tl.program_id(0)
    if BY_HEAD:
        tile, part = pid % tiles, pid // tiles
    else:
        parts = tl.num_programs(0) // tiles
        tile, part = pid // parts, pid % parts
    entry = table_ptr + tile * 4
    return tl.cast(part, tl.int64), tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def _pointers(ptr, first, stride_n, stride_d, SIZE: tl.constexpr, PADDED_DIM: tl.constexpr):
    """(SIZE, PADDED_DIM) pointers to rows from `first` on: a 64-bit address, and 32-bit offsets that leave loops."""
    offsets = tl.arange(0, SIZE)[:, None] * stride_n + tl.arange(0, PADDED_DIM)[None, :] * stride_d
    return (ptr + tl.cast(first, tl.int64) * stride_n) + offsets


@triton.jit
def _mask(first, end, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    mask = (first + tl.arange(0, SIZE) < end)[:, None]
    if PADDED_DIM != HEAD_DIM:
        mask = mask & (tl.arange(0, PADDED_DIM)[None, :] < HEAD_DIM)
    return mask


@triton.jit
def _load(
    ptr, first, end, stride_n, stride_d, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Rows from `first` to `end`, zeros beyond; WHOLE promises that there is no beyond."""
    pointers = _pointers(ptr, first, stride_n, stride_d, SIZE, PADDED_DIM)
    if WHOLE and PADDED_DIM == HEAD_DIM:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=_mask(first, end, SIZE, HEAD_DIM, PADDED_DIM), other=0.0)


@triton.jit
def _store(
    ptr, tile, first, end, stride_n, stride_d, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr
):
    pointers = _pointers(ptr, first, stride_n, stride_d, SIZE, PADDED_DIM)
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=_mask(first, end, SIZE, HEAD_DIM, PADDED_DIM))


@triton.jit
def _seen(bounds_ptr, first, end, rows, SIZE: tl.constexpr):
    """First and end of what each row sees. Rows beyond the document repeat its last one, so that no extreme moves."""
    row = tl.minimum(first + tl.arange(0, SIZE), end - 1)
    return tl.load(bounds_ptr + row), tl.load(bounds_ptr + tl.cast(rows, tl.int64) + row)


@triton.jit
def _parts(seen_first, seen_end, OTHERS: tl.constexpr, CUT_FIRST: tl.constexpr, CUT_END: tl.constexpr):
    """Marks l <= a <= b, h: a tile from a to b is seen whole by all rows, tiles in [l, min(a, h)) and [b, h) are not.

    CUT_FIRST and CUT_END say whether what is seen may begin or end at different places for the rows of the tile.
    """
    low, high = tl.min(seen_first), tl.max(seen_end)
    a, b = low, high
    if CUT_FIRST:
        a = low + (tl.max(seen_first) - low + OTHERS - 1) // OTHERS * OTHERS
    if CUT_END:
        b = a + tl.maximum(tl.min(seen_end) - a, 0) // OTHERS * OTHERS
    return low, a, b, high


@triton.jit
def _span(low, a, b, high, phase: tl.constexpr):
    """Where a phase starts and stops: 0 the tiles before those seen whole, 1 these, 2 the tiles behind them."""
    if phase == 0:
        return low, tl.minimum(a, high)
    elif phase == 1:
        return a, b
    else:
        return b, high


@triton.jit
def _forward_tiles(
    state, query, key_ptr, value_ptr, low, high, key_end, seen_first, seen_end, scale,
    key_stride_n, key_stride_d, value_stride_n, value_stride_d,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, OTHERS: tl.constexpr, WINDOW: tl.constexpr,
    STAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys from `low` to `high`; state = (sum of p·v, maximum, sum of p), base 2."""
    total, top, weight = state
    for at in tl.range(low, high, OTHERS, num_stages=STAGES):
        key = _load(key_ptr, at, key_end, key_stride_n, key_stride_d, OTHERS, HEAD_DIM, PADDED_DIM, not MASKED)
        score = tl.dot(query, tl.trans(key), input_precision="ieee")
        if MASKED:
            column = at + tl.arange(0, OTHERS)[None, :]
            seen = column < seen_end[:, None]
            if WINDOW:
                seen = seen & (column >= seen_first[:, None])
            score = tl.where(seen, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1) * scale)
        base = new_top
        if MASKED:
            # A row that has seen nothing yet: -inf minus -inf would be NaN.
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(score * scale - base[:, None])
        decay = tl.exp2(top - base)
        weight = weight * decay + tl.sum(p, 1)
        value = _load(value_ptr, at, key_end, value_stride_n, value_stride_d, OTHERS, HEAD_DIM, PADDED_DIM, not MASKED)
        total = tl.dot(p.to(value.dtype), value, total * decay[:, None], input_precision="ieee")
        top = new_top
    return total, top, weight


@triton.jit
def _forward_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, lse_ptr, bounds_ptr, table_ptr,
    query_stride_h, query_stride_n, query_stride_d, key_stride_g, key_stride_n, key_stride_d,
    value_stride_g, value_stride_n, value_stride_d, output_stride_h, output_stride_n, output_stride_d,
    rows, tiles, scaling, START: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr,
    OTHERS: tl.constexpr, WINDOW: tl.constexpr, BY_HEAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head, first, end, _, key_end = _tile_of(tiles, table_ptr, BY_HEAD)
    key_ptr += head // HEADS_PER_GROUP * key_stride_g
    value_ptr += head // HEADS_PER_GROUP * value_stride_g
    seen_first, seen_end = _seen(bounds_ptr, first, end, rows, ROWS)
    low, a, b, high = _parts(seen_first, seen_end, OTHERS, WINDOW, True)
    query_ptr += head * query_stride_h
    query = _load(query_ptr, first, end, query_stride_n, query_stride_d, ROWS, HEAD_DIM, PADDED_DIM, False)
    output_ptr += head * output_stride_h
    row = first + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, PADDED_DIM), dtype=tl.float32)
    top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((ROWS,), dtype=tl.float32)
    if START:  # what other keys brought, as if it were one
        total += _load(output_ptr, first, end, output_stride_n, output_stride_d, ROWS, HEAD_DIM, PADDED_DIM, False)
        top = tl.load(lse_ptr + head * rows + row, mask=row < end, other=0.0) * 1.4426950408889634
        weight += 1.0
    state = total, top, weight
    scale = scaling * 1.4426950408889634
    for phase in tl.static_range(0 if WINDOW else 1, 3):
        start, stop = _span(low, a, b, high, phase)
        state = _forward_tiles(
            state, query, key_ptr, value_ptr, start, stop, key_end, seen_first, seen_end, scale,
            key_stride_n, key_stride_d, value_stride_n, value_stride_d,
            HEAD_DIM, PADDED_DIM, OTHERS, WINDOW, STAGES, phase != 1,
        )  # fmt: skip
    total, top, weight = state
    total = total / weight[:, None]
    _store(output_ptr, total, first, end, output_stride_n, output_stride_d, ROWS, HEAD_DIM, PADDED_DIM)
    tl.store(lse_ptr + head * rows + row, (top + tl.log2(weight)) * 0.6931471805599453, mask=row < end)


@triton.jit
def _query_tiles(
    d_query, query, grad, lse, delta, key_ptr, value_ptr, low, high, key_end, seen_first, seen_end, scale,
    key_stride_n, key_stride_d, value_stride_n, value_stride_d,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, OTHERS: tl.constexpr, WINDOW: tl.constexpr,
    STAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the share of the keys from `low` to `high` to the gradient of the queries; `lse` in base 2."""
    for at in tl.range(low, high, OTHERS, num_stages=STAGES):
        key = _load(key_ptr, at, key_end, key_stride_n, key_stride_d, OTHERS, HEAD_DIM, PADDED_DIM, not MASKED)
        value = _load(value_ptr, at, key_end, value_stride_n, value_stride_d, OTHERS, HEAD_DIM, PADDED_DIM, not MASKED)
        score = tl.dot(query, tl.trans(key), input_precision="ieee")
        p = tl.exp2(score * scale - lse[:, None])
        if MASKED:
            column = at + tl.arange(0, OTHERS)[None, :]
            seen = column < seen_end[:, None]
            if WINDOW:
                seen = seen & (column >= seen_first[:, None])
            p = tl.where(seen, p, 0.0)
        d_p = tl.dot(grad, tl.trans(value), input_precision="ieee")
        d_score = p * (d_p - delta[:, None])
        d_query = tl.dot(d_score.to(key.dtype), key, d_query, input_precision="ieee")
    return d_query


@triton.jit
def _query_kernel(
    grad_ptr, query_ptr, key_ptr, value_ptr, output_ptr, lse_ptr, delta_ptr, d_query_ptr, start_ptr, bounds_ptr,
    table_ptr,
    grad_stride_h, grad_stride_n, grad_stride_d, query_stride_h, query_stride_n, query_stride_d,
    key_stride_g, key_stride_n, key_stride_d, value_stride_g, value_stride_n, value_stride_d,
    output_stride_h, output_stride_n, output_stride_d, d_query_stride_h, d_query_stride_n, d_query_stride_d,
    rows, tiles, scaling, START: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr,
    OTHERS: tl.constexpr, WINDOW: tl.constexpr, BY_HEAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head, first, end, _, key_end = _tile_of(tiles, table_ptr, BY_HEAD)
    key_ptr += head // HEADS_PER_GROUP * key_stride_g
    value_ptr += head // HEADS_PER_GROUP * value_stride_g
    seen_first, seen_end = _seen(bounds_ptr, first, end, rows, ROWS)
    low, a, b, high = _parts(seen_first, seen_end, OTHERS, WINDOW, True)
    query_ptr += head * query_stride_h
    query = _load(query_ptr, first, end, query_stride_n, query_stride_d, ROWS, HEAD_DIM, PADDED_DIM, False)
    grad_ptr += head * grad_stride_h
    grad = _load(grad_ptr, first, end, grad_stride_n, grad_stride_d, ROWS, HEAD_DIM, PADDED_DIM, False)
    output_ptr += head * output_stride_h
    output = _load(output_ptr, first, end, output_stride_n, output_stride_d, ROWS, HEAD_DIM, PADDED_DIM, False)
    delta = tl.sum(grad.to(tl.float32) * output.to(tl.float32), 1)
    row = first + tl.arange(0, ROWS)
    tl.store(delta_ptr + head * rows + row, delta, mask=row < end)
    lse = tl.load(lse_ptr + head * rows + row, mask=row < end, other=float("inf")) * 1.4426950408889634
    scale = scaling * 1.4426950408889634
    d_query = tl.zeros((ROWS, PADDED_DIM), dtype=tl.float32)
    if START:
        start_ptr += head * d_query_stride_h
        started = _load(start_ptr, first, end, d_query_stride_n, d_query_stride_d, ROWS, HEAD_DIM, PADDED_DIM, False)
        d_query += started / scaling
    for phase in tl.static_range(0 if WINDOW else 1, 3):
        start, stop = _span(low, a, b, high, phase)
        d_query = _query_tiles(
            d_query, query, grad, lse, delta, key_ptr, value_ptr, start, stop, key_end,
            seen_first, seen_end, scale, key_stride_n, key_stride_d, value_stride_n, value_stride_d,
            HEAD_DIM, PADDED_DIM, OTHERS, WINDOW, STAGES, phase != 1,
        )  # fmt: skip
    d_query_ptr += head * d_query_stride_h
    _store(d_query_ptr, d_query * scaling, first, end, d_query_stride_n, d_query_stride_d, ROWS, HEAD_DIM, PADDED_DIM)


@triton.jit
def _key_tiles(
    d_key, d_value, key, value, key_position, query_ptr, grad_ptr, lse_ptr, delta_ptr, position_ptr,
    low, high, query_end, scale, window, query_stride_n, query_stride_d, grad_stride_n, grad_stride_d,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, OTHERS: tl.constexpr, WINDOW: tl.constexpr,
    STAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the share of the queries from `low` to `high` to the gradients of the keys; scores are transposed."""
    for at in tl.range(low, high, OTHERS, num_stages=STAGES):
        row = at + tl.arange(0, OTHERS)
        inside = row < query_end
        query = _load(query_ptr, at, query_end, query_stride_n, query_stride_d, OTHERS, HEAD_DIM, PADDED_DIM, False)
        # Queries beyond the document: exp2(-inf) = 0, no other mask is needed.
        lse = tl.load(lse_ptr + row, mask=inside, other=float("inf")) * 1.4426950408889634
        score = tl.dot(key, tl.trans(query), input_precision="ieee")
        p = tl.exp2(score * scale - lse[None, :])
        if MASKED:
            position = tl.load(position_ptr + row, mask=inside, other=0).to(tl.int32)
            distance = position[None, :] - key_position[:, None]
            seen = distance >= 0
            if WINDOW:
                seen = seen & (distance < window)
            p = tl.where(seen, p, 0.0)
        # Loaded where it is needed and not before: registers are short here.
        grad = _load(grad_ptr, at, query_end, grad_stride_n, grad_stride_d, OTHERS, HEAD_DIM, PADDED_DIM, False)
        d_value = tl.dot(p.to(grad.dtype), grad, d_value, input_precision="ieee")
        d_p = tl.dot(value, tl.trans(grad), input_precision="ieee")
        delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
        d_score = p * (d_p - delta[None, :])
        d_key = tl.dot(d_score.to(query.dtype), query, d_key, input_precision="ieee")
    return d_key, d_value


@triton.jit
def _key_kernel(
    grad_ptr, query_ptr, key_ptr, value_ptr, lse_ptr, delta_ptr, d_key_ptr, d_value_ptr,
    query_position_ptr, key_position_ptr, bounds_ptr, table_ptr,
    grad_stride_h, grad_stride_n, grad_stride_d, query_stride_h, query_stride_n, query_stride_d,
    key_stride_g, key_stride_n, key_stride_d, value_stride_g, value_stride_n, value_stride_d,
    d_stride_g, d_stride_n, d_stride_d, queries, rows, tiles, scaling, window,
    HEADS_PER_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr,
    OTHERS: tl.constexpr, WINDOW: tl.constexpr, BY_HEAD: tl.constexpr, STAGES: tl.constexpr, ORDERED: tl.constexpr,
    START: tl.constexpr,
):  # fmt: skip
    group, first, end, _, query_end = _tile_of(tiles, table_ptr, BY_HEAD)
    seen_first, seen_end = _seen(bounds_ptr, first, end, rows, ROWS)
    low, a, b, high = _parts(seen_first, seen_end, OTHERS, True, WINDOW)
    query_end = tl.minimum(query_end, high)
    if START and low >= high:  # nothing to add
        return
    if not ORDERED:
        a = high
        b = high
    key_ptr += group * key_stride_g
    key = _load(key_ptr, first, end, key_stride_n, key_stride_d, ROWS, HEAD_DIM, PADDED_DIM, False)
    value_ptr += group * value_stride_g
    value = _load(value_ptr, first, end, value_stride_n, value_stride_d, ROWS, HEAD_DIM, PADDED_DIM, False)
    row = first + tl.arange(0, ROWS)
    key_position = tl.load(key_position_ptr + row, mask=row < end, other=0).to(tl.int32)
    scale = scaling * 1.4426950408889634
    d_key = tl.zeros((ROWS, PADDED_DIM), dtype=tl.float32)
    d_value = tl.zeros((ROWS, PADDED_DIM), dtype=tl.float32)
    d_key_ptr += group * d_stride_g
    d_value_ptr += group * d_stride_g
    if START:
        d_key += _load(d_key_ptr, first, end, d_stride_n, d_stride_d, ROWS, HEAD_DIM, PADDED_DIM, False) / scaling
        d_value += _load(d_value_ptr, first, end, d_stride_n, d_stride_d, ROWS, HEAD_DIM, PADDED_DIM, False)
    for part in range(HEADS_PER_GROUP):
        head = group * HEADS_PER_GROUP + part
        query_of_head, grad_of_head = query_ptr + head * query_stride_h, grad_ptr + head * grad_stride_h
        lse_of_head, delta_of_head = lse_ptr + head * queries, delta_ptr + head * queries
        for phase in tl.static_range(0, 3 if WINDOW else 2):
            start, stop = _span(low, a, b, high, phase)
            d_key, d_value = _key_tiles(
                d_key, d_value, key, value, key_position, query_of_head, grad_of_head, lse_of_head, delta_of_head,
                query_position_ptr, start, stop, query_end, scale, window,
                query_stride_n, query_stride_d, grad_stride_n, grad_stride_d,
                HEAD_DIM, PADDED_DIM, OTHERS, WINDOW, STAGES, phase != 1,
            )  # fmt: skip
    _store(d_key_ptr, d_key * scaling, first, end, d_stride_n, d_stride_d, ROWS, HEAD_DIM, PADDED_DIM)
    _store(d_value_ptr, d_value, first, end, d_stride_n, d_stride_d, ROWS, HEAD_DIM, PADDED_DIM)
