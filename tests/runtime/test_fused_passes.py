"""Where the fused engine spares passes over memory: rows picked up by chunk, gradients and residuals added in place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import lemo.runtime.fused.mlp as mlp
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
