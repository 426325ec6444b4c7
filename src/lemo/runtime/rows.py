"""Rows on their way through one layer call: what is gathered for them, and what their attention must know."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lemo.core.layout import Layout
from lemo.core.selection import RowSet
from lemo.ops.attend_local.plan import LocalRows
from lemo.ops.attend_rows.far import FarKeys
from lemo.ops.attend_rows.reference import Rows

if TYPE_CHECKING:
    from lemo.runtime.fused.call import FusedCall


CALL = "lemo_call"  # keyword of a layer's forward that carries the LayerCall


@dataclass(frozen=True)
class RowRange:
    """Rows of a packed tensor, document by document, as attention sees them.

    Attributes:
        starts: first entry of each document in the packed tensor (host).
        lengths: entries of each document (host).
        position_N: (N,) int64 place of each entry's row inside its document.
        valid_N: (N,) bool, entries that may serve as keys; None when all may.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    position_N: Tensor
    valid_N: Tensor | None = None

    @classmethod
    def of_rows(cls, layout: Layout, rows: RowSet) -> RowRange:
        """Range of a packed tensor that holds just `rows`."""
        starts, total = [], 0
        for length in rows.segment_lengths:
            starts.append(total)
            total += length
        return cls(tuple(starts), rows.segment_lengths, layout.position_of_row_N[rows.rows_N], rows.valid_N)

    @classmethod
    def of_batch(cls, layout: Layout) -> RowRange:
        """Range of a tensor that holds all B·T rows of the batch."""
        starts, lengths = layout.document_start_D, layout.document_length_D
        return layout.once(
            "range of the batch",
            lambda: cls(tuple(starts.tolist()), tuple(lengths.tolist()), layout.position_of_row_N),
        )


@dataclass(frozen=True)
class Keys:
    """Keys and values that queries attend to beyond their own.

    Attributes:
        range: documents and positions of the key rows.
        own_N: (N,) place of every query row among the key rows.
        constant: keys and values (G, K, D) of all key rows, without gradient; None when they are computed from
            `offered`.
        offered: hidden states (1, S, M) and layer keywords of the rows that only offer keys and values.
        offered_S: (S,) place of every offered row among the key rows.
    """

    range: RowRange
    own_N: Tensor
    constant: tuple[Tensor, Tensor] | None = None
    offered: tuple[Tensor, Mapping[str, Any]] | None = None
    offered_S: Tensor | None = None


@dataclass(frozen=True)
class WideRows:
    """Rows that attend to all keys in an exact pass whose other rows attend locally.

    Attributes:
        queries: their documents and positions; those that are not valid pass no gradient, and attend locally.
        places_n: (n,) their places among all that run.
    """

    queries: Rows
    places_n: Tensor


@dataclass(frozen=True)
class ContextRows:
    """Rows of exact forward of which only wide rows attend to all keys.

    Attributes:
        local: all rows that run, and the keys that those see which are not wide rows.
        wide: far rows, those with gradient that are not local; and, if these attend to all keys, the local loss rows.
    """

    local: LocalRows
    wide: tuple[WideRows, ...]


@dataclass(frozen=True)
class PartedRows:
    """Rows that pass gradient, parted by the keys that they attend to.

    Attributes:
        far: documents and positions of those that attend to all keys; there may be none.
        far_n: (f,) their places among the rows that pass gradient.
        local: the local loss rows, at least one, and the keys that they see, in backward at least.
        near_n: (l,) their places.
        near_all: documents and positions of the local loss rows when they attend to all keys in forward; else None.
    """

    far: Rows
    far_n: Tensor
    local: LocalRows
    near_n: Tensor
    near_all: Rows | None = None

    def wide(self, places_n: Tensor) -> tuple[WideRows, ...]:
        """The rows that attend to all keys in forward, given the places of `far_first` among all that run."""
        far, near = self.cut(places_n, 0)
        found = [WideRows(self.far, far)] if len(far) else []
        if self.near_all is not None:
            found.append(WideRows(self.near_all, near))
        return tuple(found)

    def far_first(self, rows: RowSet) -> RowSet:
        """The rows that pass gradient, far ones before local ones, as the fused engine takes them."""
        order_n = torch.cat([self.far_n, self.near_n])
        valid_N = None if rows.valid_N is None else rows.valid_N[order_n]
        return replace(rows, rows_N=rows.rows_N[order_n], valid_N=valid_N, twin=None)

    def cut(self, tensor: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Far and local ones of rows in the order of `far_first`: views."""
        far, near = tensor.split([len(self.far_n), len(self.near_n)], dim)
        return far, near


@dataclass(frozen=True)
class MlpRows:
    """Rows of the compact batch that run the MLP, and the low-rank update of those that do not.

    Attributes:
        rows_n: (n,) ascending entries of the compact batch that run the MLP.
        skipped_s: the other entries.
        down_MR: first factor of the bypass, applied to the RMS-normalised input of the MLP; None for no update.
        up_RM: second factor.
    """

    rows_n: Tensor
    skipped_s: Tensor
    down_MR: Tensor | None
    up_RM: Tensor | None


class Recorder:
    """Catches what the attention of a pass without gradient produced: keys, values, and, if asked, output and lse."""

    def __init__(self, want_lse: bool = False, want_query: bool = False) -> None:
        """Args: want_lse: also compute the log-sum-exp of every row; want_query: also keep the queries."""
        self.want_lse, self.want_query = want_lse, want_query
        self.query_HND: Tensor | None = None
        self.key_GND: Tensor | None = None
        self.value_GND: Tensor | None = None
        self.output_HND: Tensor | None = None
        self.lse_HN: Tensor | None = None
        self.scaling: float | None = None


@dataclass(frozen=True)
class LayerCall:
    """Travels as one keyword of a layer's forward, so that a checkpoint replays the call with the same rows.

    Attributes:
        queries: the rows that run the layer; None when all rows of the batch run in their usual shape.
        keys: further keys; None when the queries attend to each other only.
        dense: attention output (H, N, D) and log-sum-exp (H, N) of the queries from the exact pass, for the `pairs`
            gradient.
        context: the queries that attend locally, in the exact pass; None when all attend to all keys.
        parted: of the queries with gradient, those that attend locally and the others; None when none does.
        far: the far keys that backward reads; None for all.
        record: catches keys and values of this call.
        mlp: rows of the MLP when it has its own.
        exact: the pass without gradient that has to come first.
        fused: what the fused engine does; the other fields are then unused.
    """

    queries: RowRange | None = None
    keys: Keys | None = None
    dense: tuple[Tensor, Tensor] | None = None
    context: ContextRows | None = None
    parted: PartedRows | None = None
    far: FarKeys | None = None
    record: Recorder | None = None
    mlp: MlpRows | None = None
    exact: ExactPass | None = None
    fused: FusedCall | None = None


class ExactPass:
    """The pass without gradient of exact forward. It runs inside the layer call whose rows pass gradient.

    One call of the layer does both passes: a sharded layer gathers its weights once, and as often as on a rank that
    runs the layer densely. A checkpoint replays the call, but not this pass.
    """

    def __init__(
        self, hidden: Tensor, kwargs: Mapping[str, Any], call: LayerCall, complete: Callable[[], dict[str, Any]]
    ) -> None:
        """Rows of the pass, and what they leave behind.

        Args:
            hidden: hidden states (B, N, M) of the rows, without gradient.
            kwargs: the layer's keywords for them.
            call: their LayerCall, with a recorder.
            complete: fields of the second pass's LayerCall, once this pass is recorded.
        """
        self._todo: tuple | None = (hidden, kwargs, call, complete)
        self._fields: dict[str, Any] = {}
        self._output_NM: Tensor | None = None

    def first(self, second: LayerCall, run: Callable[[Tensor, Mapping[str, Any], LayerCall], Tensor]) -> LayerCall:
        """Runs the pass unless it has run; returns the LayerCall of the second pass."""
        if self._todo is not None:
            hidden, kwargs, call, complete = self._todo
            with torch.no_grad():
                self._output_NM = run(hidden, kwargs, call).flatten(0, 1)
                self._fields = complete()
            self._todo = None  # a checkpoint keeps this object until backward
        return replace(second, exact=None, **self._fields)

    def take_output(self) -> Tensor:
        """Hidden states (B·N, M) after the layer, handed over."""
        output_NM, self._output_NM = self._output_NM, None
        assert output_NM is not None
        return output_NM


class _Active(threading.local):
    call: LayerCall | None = None
    capture: bool = False
    scratch: dict[str, Tensor] | None = None
    base_implementation: str | None = None


ACTIVE = _Active()
"""The layer call that this thread is inside of. Set and cleared within one forward of one layer."""


@contextmanager
def active(call: LayerCall | None, *, capture: bool = False) -> Iterator[None]:
    """Makes `call` what attention and MLP of the layer running in this thread see."""
    before = (ACTIVE.call, ACTIVE.capture, ACTIVE.scratch)
    ACTIVE.call, ACTIVE.capture, ACTIVE.scratch = call, capture, {}
    try:
        yield
    finally:
        ACTIVE.call, ACTIVE.capture, ACTIVE.scratch = before


def gather_keywords(kwargs: Mapping[str, Any], rows_N: Tensor, batch: int, tokens: int) -> dict[str, Any]:
    """Keywords of a layer call for a packed batch of chosen rows: (1, N, ...) for (B, T, ...).

    Every tensor whose leading sizes are (B, T) or (1, T) is gathered, also inside tuples; one-dimensional ones of T
    entries (cache positions) too. The attention mask is dropped: rows carry documents and positions of their own.
    """
    places = rows_N, rows_N % tokens
    sizes = batch, tokens
    return {name: None if name == "attention_mask" else _gather(value, places, sizes) for name, value in kwargs.items()}


def _gather(value: Any, places: tuple[Tensor, Tensor], sizes: tuple[int, int]) -> Any:
    """`places`: flat rows and their places in their sequences; `sizes`: B and T.

    No closure: one that calls itself would keep the rows until Python looks for cycles.
    """
    if isinstance(value, tuple):
        return tuple(_gather(item, places, sizes) for item in value)
    if not isinstance(value, Tensor):
        return value
    (rows_N, place_N), (batch, tokens) = places, sizes
    if value.dim() >= 2 and value.shape[0] == 1 and value.shape[1] == tokens:
        return value[:, place_N]
    if value.dim() >= 2 and value.shape[0] == batch and value.shape[1] == tokens:
        return value.flatten(0, 1)[rows_N].unsqueeze(0)
    if value.dim() == 1 and value.shape[0] == tokens:
        return value[place_N]
    return value


def hidden_of(output: Any) -> Tensor:
    """The hidden states of a module's output, which some families wrap in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def inverse(rows_N: Tensor, size: int) -> Tensor:
    """(size,) place of each row in `rows_N`; only entries of rows that are in it mean anything."""
    places = torch.zeros(size, dtype=torch.int64, device=rows_N.device)
    places[rows_N] = torch.arange(len(rows_N), device=rows_N.device)
    return places


def all_rows(layout: Layout) -> RowSet:
    """Every row of every document."""
    return layout.once("all rows", lambda: _all_rows(layout))


def _all_rows(layout: Layout) -> RowSet:
    if layout.on_host is not None and layout.on_host is not layout:
        return all_rows(layout.on_host).on(layout.device)
    count = layout.real_rows
    rows_N = torch.argsort((layout.document_of_row_N < 0).to(torch.uint8), stable=True)[:count]
    return RowSet(rows_N, tuple(layout.document_length_D.tolist()), rows_N[:0])


def without_class(reduced: tuple, mixin: type, attributes: tuple[str, ...]) -> tuple:
    """What `object.__reduce_ex__` gave, with the class below `mixin`'s subclass and without some attributes."""
    _, (found, *_), state, *rest = reduced
    mro = found.__mro__
    kept = {name: value for name, value in state.items() if name not in attributes}
    return (_blank, (mro[2] if mro[1] is mixin else found,), kept, *rest)


def _blank(found: type) -> Any:
    """An instance before its state; pickle's own constructor insists on the class of the original."""
    return found.__new__(found)
