"""Which rows a layer runs: the one value that scorers and policies make and executors use."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lemo.ops.backend import send_all


@dataclass(frozen=True, eq=False)
class RowSet:
    """Rows of a batch, document by document. Equal is only what is the same object.

    `rows_N` has `capacity` entries, a number the host knows before the layer runs. Inside a document the first entries
    are the chosen rows in ascending order; under the `threshold` policy they may be followed by rows that were not
    chosen (`valid_N` false), which an executor computes with no effect or masks.

    Attributes:
        rows_N: (capacity,) int64 flat rows, on the batch's device.
        segment_lengths: rows of each document in `rows_N`, in document order; host integers that add up to capacity.
        skipped_S: (real rows - capacity,) int64 ascending flat rows that are in no document's entries.
        valid_N: (capacity,) bool on the device, or None when every entry is chosen.
        twin: the same rows with tensors on the CPU, where the host knows them and the batch is on another device.
    """

    rows_N: Tensor
    segment_lengths: tuple[int, ...]
    skipped_S: Tensor
    valid_N: Tensor | None = None
    twin: RowSet | None = field(default=None, repr=False)

    @property
    def on_host(self) -> RowSet | None:
        """The same rows on the CPU; None where only the device knows them."""
        return self if self.rows_N.device.type == "cpu" else self.twin

    def on(self, device: torch.device) -> RowSet:
        """Rows of the host with their tensors on a device, in one copy."""
        if device.type == "cpu":
            return self
        tensors = [t for t in (self.rows_N, self.skipped_S, self.valid_N) if t is not None]
        rows_N, skipped_S, *valid = send_all(tensors, device)
        return RowSet(rows_N, self.segment_lengths, skipped_S, valid[0] if valid else None, self)

    @property
    def capacity(self) -> int:
        """Entries of `rows_N`; known to the host."""
        return self.rows_N.shape[0]

    @property
    def count(self) -> Tensor | int:
        """Rows chosen: the capacity, or a device scalar under the `threshold` policy."""
        return self.capacity if self.valid_N is None else self.valid_N.sum()

    def chosen(self) -> Tensor:
        """Ascending int64 flat rows that were chosen. Synchronises with the device under `threshold`."""
        rows = self.rows_N if self.valid_N is None else self.rows_N[self.valid_N]
        return rows.sort().values


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows of one layer for one batch, or of several layers that choose alike: what is made from it is made once.

    `y = x; y[rows] = layer(x[rows])`: `forward` are the rows whose value the layer computes, `backward` the subset that
    also keeps activations and passes gradient. None means all rows of the batch (the layer's dense call).

    Attributes:
        forward: rows that run the layer; None when all do.
        backward: rows that pass gradient; None when all do. The same object as `forward` when the budgets are equal.
    """

    forward: RowSet | None
    backward: RowSet | None

    @property
    def on_host(self) -> Selection | None:
        """The same rows on the CPU; None where only the device knows some of them."""
        same = self.forward is self.backward
        forward = None if self.forward is None else self.forward.on_host
        backward = forward if same or self.backward is None else self.backward.on_host
        if (forward is None) != (self.forward is None) or (backward is None) != (self.backward is None):
            return None
        return Selection(forward, backward)

    @property
    def is_dense(self) -> bool:
        """Whether the layer runs as if lemo were not attached."""
        return self.forward is None and self.backward is None
