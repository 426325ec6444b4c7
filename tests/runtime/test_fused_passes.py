"""Where the fused engine spares passes over memory: rows picked up by chunk, gradients and residuals added in place."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

import lemo.runtime.fused.forward as layer
import lemo.runtime.fused.mlp as mlp
from lemo.runtime.fused.maps import LinearMap, MapGroup
from tests.runtime.oracle import batch, tiny_model
from tests.runtime.test_exact import in_double
from tests.runtime.test_fused import assert_equal_engines, plan_of


def ragged(tokens: int = 40):
    """Two sequences, the second of them padded on the left: a chunk ends inside both."""
    inputs = batch(tokens, rows=2, supervised_from=28)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :9] = 0
    inputs["labels"][1, :9] = -100
    return inputs | {"attention_mask": mask}


@pytest.mark.parametrize(
    "wanted",
    [[0, 4, 5, 9, 10, 12], [4], [5, 6, 7, 8, 9], [12, 0, 6], list(range(13)), []],
    ids=["at borders", "last of a chunk", "one chunk", "in no order", "all", "none"],
)
@pytest.mark.parametrize("rows", [5, 13])
def test_few_are_the_wanted_rows(rows, wanted, monkeypatch):
    """By chunks of `rows`: several and a short last one, or one. What no one wants may be anything."""
    monkeypatch.setattr(mlp, "CHUNK_ROWS", rows)
    places = torch.tensor(wanted, dtype=torch.int64)
    gate, up = torch.full((13, 3), torch.nan), torch.full((13, 2), torch.inf)
    gate[places], up[places] = torch.randn(len(wanted), 3), torch.randn(len(wanted), 2)
    few = mlp._Few(places, 13)
    for part in mlp.chunks(13):
        few.take(part, [gate[part], up[part]])
    found = few.found()
    assert len(found) == 2 and torch.equal(found[0], gate[places]) and torch.equal(found[1], up[places])


@pytest.mark.parametrize("inputs", [batch(48, supervised_from=30), ragged()], ids=["whole", "ragged"])
@pytest.mark.parametrize("mode", ["exact rows", "exact keys", "both keys"])
@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_maps_into_the_mlp_are_kept_over_chunks(family, mode, inputs, monkeypatch):
    in_double(monkeypatch)
    monkeypatch.setattr(mlp, "CHUNK_ROWS", 7)
    model = tiny_model(family, dtype=torch.float64)
    assert_equal_engines(model, plan_of(model, mode), inputs, recompute="none")


@pytest.mark.parametrize("policy", ["topk", "threshold"])
@pytest.mark.parametrize("inputs", [batch(48, supervised_from=30), ragged()], ids=["whole", "ragged"])
@pytest.mark.parametrize(("mode", "kv"), [("skip", "all"), ("exact keys", "kept"), ("both keys", "all")])
def test_gradients_of_queries_meet_those_of_keys(mode, kv, inputs, policy, monkeypatch):
    """Rows that offer keys and run get both; under a threshold some of them are not valid."""
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    plan = plan_of(model, mode, kv)
    if policy == "threshold":
        plan = replace(plan, policy=policy, layers=tuple(replace(x, threshold=0.1) for x in plan.layers))
    assert_equal_engines(model, plan, inputs)


@pytest.mark.parametrize(
    ("mode", "inputs", "wanted"),
    [
        ("exact keys", batch(48, supervised_from=40), [True, True, False]),
        ("exact rows", batch(48, supervised_from=40), [True, True, False]),
        ("exact keys", ragged(), [False, False, False]),
        ("both keys", batch(48, supervised_from=40), [False, False, False]),
    ],
    ids=["keys", "rows", "ragged", "some rows run"],
)
@pytest.mark.parametrize("recompute", ["none", "lin"])
def test_exact_forward_of_all_rows_stays_in_the_stream(mode, inputs, wanted, recompute, monkeypatch):
    """Rows between attention and MLP are the stream's own; in the last layer, which runs some rows only, a copy."""
    finish, found = layer.LayerForward._finish, []

    def noted(work, middle):
        found.append(middle.untyped_storage().data_ptr() == work.stream.untyped_storage().data_ptr())
        assert found[-1] == (middle is work.stream)
        finish(work, middle)

    monkeypatch.setattr(layer.LayerForward, "_finish", noted)
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64, num_hidden_layers=3)
    assert_equal_engines(model, plan_of(model, mode), inputs, recompute=recompute)
    assert found == wanted


def group(weight_OI, bias_O=None, a_RI=None, b_OR=None) -> MapGroup:
    """One map."""
    item = LinearMap(weight_OI, bias_O, a_RI, b_OR, 1.0, 0.0, (None,) * 4)
    return MapGroup((item,), ((0, slice(0, len(weight_OI))),)).bound(a_RI, (b_OR,))


@pytest.mark.parametrize("multiplier", [1.0, 0.25])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_map_is_added_in_place(biased, adapted, multiplier):
    draw = partial(torch.randn, dtype=torch.float64)
    x, into, weight, bias, a, b = draw(9, 5), draw(9, 6), draw(6, 5), draw(6), draw(2, 5), draw(6, 2)
    update = x @ weight.T + biased * bias + adapted * (x @ a.T @ b.T)
    wanted = into + multiplier * update
    maps = group(weight, bias if biased else None, *((a, b) if adapted else (None, None)))
    assert maps.add(x, into, None, multiplier) is into
    torch.testing.assert_close(into, wanted)


def test_a_small_adapter_is_not_lost_beside_the_stream():
    """In bf16, its product is less than half of the last digit of most of the stream; on average all of it arrives."""
    torch.manual_seed(0)
    stream, x = torch.randn(512, 512).bfloat16(), torch.randn(512, 64).bfloat16()
    weight, a, b = torch.randn(512, 64) / 80, torch.randn(4, 64) / 8, torch.randn(512, 4) / 2 * 3e-4
    small = (x.float() @ a.bfloat16().float().T) @ b.bfloat16().float().T
    weight, a, b = weight.bfloat16(), a.bfloat16(), b.bfloat16()
    without = group(weight).add(x, stream.clone(), None, 1.0)
    difference = group(weight, None, a, b).add(x, stream.clone(), None, 1.0).float() - without.float()
    assert float((difference * small).sum() / small.square().sum()) == pytest.approx(1.0, abs=0.15)
