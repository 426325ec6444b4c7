"""A map and its adapter as one product: where it is taken, and that it is what both give."""

from __future__ import annotations

import pytest
import torch

from lemo.runtime.fused.joined import ALIGNED, JoinedMap, joined_width
from lemo.runtime.fused.maps import LinearMap, MapGroup

OUTPUTS, INPUTS = 16, 24


def group_of(rank: int, *, bias: bool = False, dropout: float = 0.0, scale: float = 0.5) -> MapGroup:
    """A map of random numbers with an adapter of a rank (0 for none), in fp64."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.float64, generator=generator)

    a, b = (drawn(rank, INPUTS), drawn(OUTPUTS, rank)) if rank else (None, None)
    bias_O = drawn(OUTPUTS) if bias else None
    item = LinearMap(drawn(OUTPUTS, INPUTS), bias_O, a, b, scale, dropout, (None,) * 4)
    group = MapGroup((item,), ((0, slice(0, OUTPUTS)),))
    return group if a is None else group.bound(a, (scale * b,))


@pytest.mark.parametrize("rank", [1, 8, 13])
def test_is_the_sum_of_both(rank):
    group = group_of(rank)
    stream = torch.randn(5, OUTPUTS, dtype=torch.float64)
    x = torch.randn(5, INPUTS, dtype=torch.float64)
    wanted = stream + group.forward(x, (0,))[0]
    joined = JoinedMap.of(group, stream)
    room = joined.room(5)
    assert room.shape == (5, joined_width(INPUTS, rank)) and room.shape[1] % ALIGNED == 0
    room.fill_(float("nan"))
    room[:, :INPUTS] = x
    got = joined.add(room, stream, None)
    assert got is stream
    torch.testing.assert_close(stream, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "group",
    [group_of(0), group_of(8, bias=True), group_of(8, dropout=0.1).keyed(((1, 2),))],
    ids=["no adapter", "bias", "dropout"],
)
def test_is_left_where_it_does_not_fit(group):
    assert JoinedMap.of(group, torch.zeros(1, OUTPUTS, dtype=torch.float64)) is None


def test_is_left_for_a_stream_of_another_dtype():
    assert JoinedMap.of(group_of(8), torch.zeros(1, OUTPUTS)) is None
