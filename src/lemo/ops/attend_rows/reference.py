"""Plain torch specification of attend_rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lemo.ops.attend_rows.far import FarKeys

# Queries whose scores or mask exist at a time.
QUERY_CHUNK = 1024


class Rows(Protocol):
    """Rows of a packed tensor, document by document; any object with these attributes will do.

    Attributes:
        starts: first entry of each document in the packed tensor (host).
        lengths: entries of each document (host).
        position_N: (N,) int64 place of each entry inside its document, on the device; ascending inside a document,
            unless `valid_N` is given.
        valid_N: (N,) bool, entries that may serve as keys of others; None when all may, and positions ascend.
    """

    @property
    def starts(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def lengths(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def position_N(self) -> Tensor: ...  # noqa: D102
    @property
    def valid_N(self) -> Tensor | None: ...  # noqa: D102


@dataclass(frozen=True)
class Segments:
    """The plainest `Rows`."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    position_N: Tensor
    valid_N: Tensor | None = None


def attend_rows_reference(
    query_HND: Tensor,
    key_GKD: Tensor,
    value_GKD: Tensor,
    queries: Rows,
    keys: Rows,
    *,
    scaling: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Differentiable output (H, N, D) and log-sum-exp (H, N); see `lemo.ops.attend_rows` for the contract."""
    wide = torch.promote_types(query_HND.dtype, torch.float32)
    groups = key_GKD.shape[0]
    output_HND = query_HND.new_zeros(query_HND.shape)
    lse_HN = query_HND.new_zeros(query_HND.shape[:2], dtype=wide)
    for rows, columns in chunks(queries, keys):
        query = query_HND[:, rows].to(wide).unflatten(0, (groups, -1))
        key, value = (t[:, None, columns].to(wide) for t in (key_GKD, value_GKD))
        scores = query @ key.mT * scaling
        scores = scores.masked_fill(~mask_of(queries, keys, rows, columns, window), -torch.inf)
        output_HND[:, rows] = (torch.softmax(scores, -1) @ value).flatten(0, 1).to(query_HND.dtype)
        lse_HN[:, rows] = torch.logsumexp(scores, -1).flatten(0, 1)
    return output_HND, lse_HN


def own_among_keys(
    own: tuple[Tensor, Tensor], constant: tuple[Tensor, Tensor], queries: Rows, keys: Rows
) -> tuple[Tensor, ...]:
    """Keys and values of all rows as constants, but with gradient where they are the queries' own."""
    columns_N = torch.zeros_like(queries.position_N)
    for q_start, q_length, k_start, k_length in documents(queries, keys):
        found = torch.searchsorted(
            keys.position_N[k_start : k_start + k_length].contiguous(),
            queries.position_N[q_start : q_start + q_length].contiguous(),
        )
        columns_N[q_start : q_start + q_length] = k_start + found
    rows = [torch.arange(start, start + length) for start, length in zip(queries.starts, queries.lengths, strict=True)]
    rows_N = torch.cat(rows).to(columns_N.device, non_blocking=True)
    columns_N = columns_N[rows_N]
    return tuple(c.detach().index_copy(1, columns_N, o[:, rows_N]) for c, o in zip(constant, own, strict=True))


def documents(queries: Rows, keys: Rows) -> Iterator[tuple[int, int, int, int]]:
    """First query, queries, first key and keys of every document."""
    return zip(queries.starts, queries.lengths, keys.starts, keys.lengths, strict=True)


def chunks(queries: Rows, keys: Rows) -> Iterator[tuple[slice, slice]]:
    """Runs of queries of one document, and the keys that they might see."""
    for q_start, q_length, k_start, k_length in documents(queries, keys):
        for begin in range(0, q_length, QUERY_CHUNK):
            end = min(begin + QUERY_CHUNK, q_length)
            # Every query's own row is a key and rows ascend, so as many last keys as queries follow lie ahead of all.
            ordered = queries.valid_N is None and keys.valid_N is None
            seen = k_length - (q_length - end) if ordered else k_length
            yield slice(q_start + begin, q_start + end), slice(k_start, k_start + seen)


def mask_of(queries: Rows, keys: Rows, rows: slice, columns: slice, window: int | None) -> Tensor:
    """(Q, K) bool: which keys a query sees."""
    distance_QK = queries.position_N[rows, None] - keys.position_N[None, columns]
    mask_QK = distance_QK >= 0
    if window is not None:
        mask_QK &= distance_QK < window
    if keys.valid_N is not None:
        mask_QK &= keys.valid_N[None, columns]
    # A row that was not chosen is computed to no effect; without its own key its softmax would be empty (NaN).
    return mask_QK | (distance_QK == 0)


def attend_backward_reference(
    operands: tuple[Tensor, ...],
    queries: Rows,
    keys: Rows,
    *,
    scaling: float,
    window: int | None = None,
    own: tuple[Tensor, Tensor] | None = None,
    far: FarKeys | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (H, N, D), (G, K, D), (G, K, D); see `lemo.ops.attend_backward` for the contract.

    Args:
        operands: gradient, query, key, value, output and log-sum-exp.
        queries: documents and positions of the query rows.
        keys: documents and positions of the key rows.
        scaling: factor of the scores.
        window: keys farther back than this are not seen.
        own: keys and values of the query rows; then their gradients (G, N, D) are returned.
        far: which far keys count, and how often; None for all. Pairs among the queries' own rows all count once.
    """
    grad_HND, query_HND, key_GKD, value_GKD, output_HND, lse_HN = operands
    if own is not None:
        among_own = (grad_HND, query_HND, *own, output_HND, lse_HN)
        d_query, _, _ = attend_backward_reference(operands, queries, keys, scaling=scaling, window=window, far=far)
        return d_query, *attend_backward_reference(among_own, queries, queries, scaling=scaling, window=window)[1:]
    wide = torch.promote_types(query_HND.dtype, torch.float32)
    groups = key_GKD.shape[0]
    d_query, d_key, d_value = (torch.zeros_like(t, dtype=wide) for t in (query_HND, key_GKD, value_GKD))
    for rows, columns in chunks(queries, keys):
        parts = (t[:, rows].to(wide).unflatten(0, (groups, -1)) for t in (grad_HND, query_HND, output_HND))
        grad, query, output = parts
        lse = lse_HN[:, rows, None].to(wide).unflatten(0, (groups, -1))
        key, value = (t[:, None, columns].to(wide) for t in (key_GKD, value_GKD))
        weight = torch.exp(query @ key.mT * scaling - lse)
        weight = weight.masked_fill(~mask_of(queries, keys, rows, columns, window), 0.0)
        if far is not None:
            weight *= far.weight_of(queries, keys, rows, columns).to(wide)
        d_value[:, columns] += (weight.mT @ grad).sum(1)
        d_score = weight * (grad @ value.mT - (grad * output).sum(-1, keepdim=True)) * scaling
        d_query[:, rows] = (d_score @ key).flatten(0, 1)
        d_key[:, columns] += (d_score.mT @ query).sum(1)
    return d_query.to(query_HND.dtype), d_key.to(query_HND.dtype), d_value.to(query_HND.dtype)
