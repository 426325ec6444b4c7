"""A map and its adapter as one product, for many rows that go into the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lemo.runtime.fused.maps import MapGroup

ALIGNED = 64  # elements: matrices whose rows begin at multiples of it are read and written at full rate


def joined_width(inputs: int, rank: int) -> int:
    """Columns of both factors: inputs and rank, up to the next multiple of ALIGNED."""
    return -(-(inputs + rank) // ALIGNED) * ALIGNED


def pays(rows: int, inputs: int) -> bool:
    """Whether joining moves fewer bytes: it copies the weight, and spares the output being read and written once."""
    return rows > inputs


@dataclass(frozen=True)
class JoinedMap:
    """[x, x·Aᵀ]·[W, s·B]ᵀ: one pass over the output, where base and adapter by themselves take three.

    Attributes:
        group: of one part.
        weight_OK: (outputs, K), K from `joined_width`; zeros behind inputs and rank.
        inputs: how many.
        rank: of the adapter.
    """

    group: MapGroup
    weight_OK: Tensor
    inputs: int
    rank: int

    @classmethod
    def of(cls, group: MapGroup, stream_NO: Tensor) -> JoinedMap | None:
        """Of a group of one part; None where that cannot be or does not pay.

        It cannot where dropout gives the adapter an input of its own.

        It copies the weight: to be held while the layer runs.

        Args:
            group: the map and its adapter.
            stream_NO: what it will be added to.
        """
        item, rank = group.maps[0], group.ranks[0]
        if rank == 0 or group.keys or item.bias_O is not None or stream_NO.dtype != item.like.dtype:
            return None
        second, inputs = group.seconds[0], item.inputs
        if not pays(len(stream_NO), inputs):
            return None
        assert second is not None
        rest = second.new_zeros(len(second), joined_width(inputs, rank) - inputs - rank)
        return cls(group, torch.cat([item.weight(), second, rest], 1), inputs, rank)

    def room(self, rows: int) -> Tensor:
        """(rows, K) uninitialised; the first columns are for the input."""
        return self.weight_OK.new_empty(rows, self.weight_OK.shape[1])

    def add(self, room_NK: Tensor, into_NO: Tensor, rows_N: Tensor | None) -> Tensor:
        """The map's output added to `into_NO` in place: base and adapter are summed in fp32 and rounded once, with it.

        Args:
            room_NK: the input in the first columns of `room`; the others are written.
            into_NO: rows of the residual stream.
            rows_N: flat rows of the input, which dropout draws by; None for all, in order.
        """
        x_NI, end = room_NK[:, : self.inputs], self.inputs + self.rank
        room_NK[:, self.inputs : end] = self.group.low(x_NI, (0,), rows_N)[0]
        room_NK[:, end:] = 0
        return into_NO.addmm_(room_NK, self.weight_OK.T)
