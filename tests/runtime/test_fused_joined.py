"""A map and its adapter as one product: where it is taken, and that it is what both give."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lemo.runtime.fused.joined import ALIGNED, JoinedMap, joined_width
from lemo.runtime.fused.maps import LinearMap, MapGroup
from tests.runtime.oracle import batch, tiny_model
from tests.runtime.test_fused import assert_equal_engines, fill_adapters, in_double, plan_of

OUTPUTS, INPUTS, ROWS = 16, 24, 25


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
    stream = torch.randn(ROWS, OUTPUTS, dtype=torch.float64)
    x = torch.randn(ROWS, INPUTS, dtype=torch.float64)
    wanted = stream + group.forward(x, (0,))[0]
    joined = JoinedMap.of(group, stream)
    room = joined.room(ROWS)
    assert room.shape == (ROWS, joined_width(INPUTS, rank)) and room.shape[1] % ALIGNED == 0
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
    assert JoinedMap.of(group, torch.zeros(ROWS, OUTPUTS, dtype=torch.float64)) is None


def test_is_left_where_copying_the_weight_costs_more_than_it_spares():
    assert JoinedMap.of(group_of(8), torch.zeros(INPUTS, OUTPUTS, dtype=torch.float64)) is None


def test_is_left_for_a_stream_of_another_dtype():
    assert JoinedMap.of(group_of(8), torch.zeros(ROWS, OUTPUTS)) is None


@pytest.mark.parametrize("recompute", ["none", "mlp", "lin", "layer"])
def test_engines_are_equal_with_it(recompute, monkeypatch):
    """Exact forward of more rows than the MLP is wide: all layers but the last join their down map."""
    in_double(monkeypatch)
    base = tiny_model(dtype=torch.float64, num_hidden_layers=3)
    model = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear", lora_alpha=7))
    fill_adapters(model)
    made, of = [], JoinedMap.of.__func__

    def noted(cls, group, stream):
        made.append(of(cls, group, stream))
        return made[-1]

    monkeypatch.setattr(JoinedMap, "of", classmethod(noted))
    inputs = batch(96, supervised_from=70)
    assert inputs["input_ids"].numel() > base.config.intermediate_size
    assert_equal_engines(model, plan_of(model, "exact keys"), inputs, recompute=recompute)
    assert [joined is not None for joined in made] == [True, True]
