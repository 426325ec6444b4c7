"""Which keys a row sees when it attends locally, and where they lie among the keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lemo.ops.attend_local.pieces import Near, Rectangle, Runs, Sinks, far_sinks, find_runs, near_keys, rectangles
from lemo.ops.attend_rows.reference import Rows, documents
from lemo.ops.attend_rows.stripes import ordered
from lemo.ops.backend import send


@dataclass(frozen=True)
class LocalRows:
    """Queries, keys and the rule by which they meet; see `plan_local`.

    Attributes:
        queries: documents and positions of the query rows.
        keys: those of the key rows; the same object as `queries` when the rows attend among themselves.
        chunk: rows of a chunk, counted from the first row of a document.
        sink: first rows of a document, which all its rows see.
        window: keys farther back than this are not seen; None for no window.
        whole: every row of every document is a query and a key.
        position_on_host_N: (N,) int64 positions of the queries on the CPU, where every row of every document is a key.
        planned: the same rows on the host, where these were sent from; None where only the device knows them.
    """

    queries: Rows
    keys: Rows
    chunk: int
    sink: int
    window: int | None = None
    whole: bool = False
    position_on_host_N: Tensor | None = field(default=None, repr=False, compare=False)
    planned: LocalRows | None = field(default=None, repr=False, compare=False)
    _made: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def seen_4N(self) -> Tensor:
        """(4, N) int32 among the keys: first and end of the near ones, first and end of the sink's. Made once.

        The sink is empty where the near keys hold it. Ends are right for kernels, where rows that are not valid come
        after all others.
        """
        return self._once("seen", self._find_seen)

    def _find_seen(self) -> Tensor:
        if self.planned is None:
            return _bounds(self)
        return send(self.planned.seen_4N, self.queries.position_N.device)

    @property
    def sent_parts(self) -> tuple[Rows, Rows]:
        """What goes to the device with these rows; positions on the host stay there."""
        return self.queries, self.keys

    def sent(self, device: torch.device, move: Callable[[Any], Any]) -> LocalRows:
        """The same rows where `move` puts their queries and keys."""
        return replace(self, queries=move(self.queries), keys=move(self.keys), planned=self, _made={})

    def near(self, chunks: int) -> Near:
        """Keys of the own chunk and, if `chunks` is 2, of the one before, as kernels take them. Made once."""
        return self._once(("near", chunks), lambda: near_keys(self, chunks))

    @property
    def sinks(self) -> Sinks | None:
        """Sinks that are not among near keys, for the kernels of the backward pass; None without any. Made once."""
        return self._once("sinks", lambda: far_sinks(self))

    @property
    def reaches_back(self) -> bool:
        """Whether a query is behind the first chunk of its document, where positions are on the host. Found once."""
        assert self.position_on_host_N is not None
        position_N = self.position_on_host_N
        return self._once("reaches back", lambda: bool((position_N >= self.chunk).any()))

    @property
    def rectangles(self) -> tuple[Rectangle, ...]:
        """What a vendor's kernel may have of the backward pass, where positions are on the host. Made once."""
        return self._once("rectangles", lambda: rectangles(self))

    @property
    def runs(self) -> Runs | None:
        """The same with the rows' own chunks; None where queries lie too scattered for it. Made once."""
        return self._once("runs", lambda: find_runs(self))

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def windowed(self, window: int | None) -> LocalRows:
        """The same rows under a sliding window, made once."""
        if window == self.window:
            return self
        if window not in self._made:
            planned = None if self.planned is None else self.planned.windowed(window)
            self._made[window] = replace(self, window=window, planned=planned, _made={})
        return self._made[window]

    @property
    def reaches_far(self) -> bool:
        """Whether a row may be in the third chunk of its document or behind it."""
        return not self.whole or any(length > 2 * self.chunk for length in self.keys.lengths)


def plan_local(
    queries: Rows,
    keys: Rows,
    *,
    chunk: int,
    sink: int,
    window: int | None = None,
    whole: bool = False,
    position_on_host_N: Tensor | None = None,
) -> LocalRows:
    """The rule of `attend_local` for some rows: good for every layer that attends with them.

    A query in chunk c of its document (c = position // chunk) sees, of the keys at or before its own position, those
    of chunks c and c - 1 and the document's first `sink` rows; of these, those that a window leaves.

    Args:
        queries: documents and positions of the query rows.
        keys: documents and positions of the key rows, among them every query's own; all valid, unless it is `queries`.
        chunk: rows of a chunk.
        sink: first rows of a document that all its rows see; at most a chunk.
        window: keys farther back than this are not seen.
        whole: promises that every row of every document is a query and a key. Vendor kernels of the forward pass need
            it.
        position_on_host_N: (N,) int64 positions of the queries on the CPU, all valid; promises that every row of every
            document is a key. Vendor kernels of the backward pass need it.

    Raises:
        ValueError: sizes that are not positive, a sink longer than a chunk, documents or positions that do not fit.
    """
    if chunk < 1 or not 0 <= sink <= chunk or (window is not None and window < 1):
        raise ValueError(f"chunk {chunk} and window {window} must be positive, and sink {sink} in [0, chunk]")
    if len({len(part) for part in (queries.starts, queries.lengths, keys.starts, keys.lengths)}) != 1:
        raise ValueError("queries and keys must have the same documents, each with a start and a length")
    if whole and tuple(queries.lengths) != tuple(keys.lengths):
        raise ValueError("documents that are whole have as many queries as keys")
    on_host = position_on_host_N
    if on_host is not None and (on_host.is_cuda or on_host.shape != queries.position_N.shape):
        raise ValueError(f"positions on the host must be {tuple(queries.position_N.shape)} on the CPU")
    return LocalRows(queries, keys, chunk, sink, window, whole, on_host)


def _bounds(local: LocalRows) -> Tensor:
    rising = ordered(local.queries)
    among = rising if local.keys is local.queries else ordered(local.keys)
    # Then the place of a key in its document is its position.
    complete = local.whole or local.position_on_host_N is not None
    seen = torch.zeros(4, len(rising.position_N), dtype=torch.int32, device=rising.position_N.device)
    for q_start, q_length, k_start, k_length in documents(rising, among):
        position = rising.position_N[q_start : q_start + q_length]
        keys = among.position_N[k_start : k_start + k_length].contiguous()
        if q_length and k_length:
            # Rows that are not valid come after all keys: they get what the last key sees, not nothing (NaN).
            position = position.clamp(max=k_length - 1) if complete else torch.minimum(position, keys[-1])
        chunk = position // local.chunk
        oldest = torch.zeros_like(position) if local.window is None else (position - local.window + 1).clamp_(min=0)
        near = torch.maximum((chunk - 1).clamp_(min=0) * local.chunk, oldest)
        sink_end = ((chunk >= 2) * local.sink).clamp_(min=oldest)
        # The first key that is not before a position: also the end of those before it.
        places = torch.stack([near, position + 1, oldest, sink_end])
        places = places.clamp_(max=k_length) if complete else torch.searchsorted(keys, places, out_int32=True)
        seen[:, q_start : q_start + q_length] = places + k_start
    return seen
