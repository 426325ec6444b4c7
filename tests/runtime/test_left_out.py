"""Rows that skip every layer and that none reads are left out: a text with gaps, without bypass or calibration."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lemo import attach
from lemo.core.plan import LayerPlan, Plan
from lemo.core.score import SAME_IN_ALL_LAYERS, TRAINING_SCORERS, scorer_named, scores_by_layer
from lemo.errors import PlanError
from tests.runtime.oracle import batch, tiny_model

BLOCK, CHOICES = 4, {"kv": "kept", "scorer": "recent", "block_size": 4}


@pytest.mark.parametrize("engine", ["generic", "fused"])
@pytest.mark.parametrize("scorer", ["recent", "words"])
def test_what_is_left_is_the_shorter_text_at_its_places(engine, scorer):
    model = tiny_model("llama").double()
    inputs = batch(64, supervised_from=52)
    plan = Plan.uniform(model, forward_ratio=0.5, backward_ratio=0.5, **CHOICES | {"scorer": scorer})
    assert plan.leaves_out and not plan.needs_bypass
    with attach(model.train(), plan, engine=engine) as handle:
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        rows = handle.selections[0].forward.rows_N
        assert all(torch.equal(x.forward.rows_N, rows) for x in handle.selections.values()) and len(rows) == 32
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    causal = torch.zeros(1, 1, 32, 32, dtype=torch.float64).masked_fill(torch.ones(32, 32).triu(1).bool(), -1e30)
    labels = torch.cat([inputs["labels"][:, 1:], torch.full((1, 1), -100)], 1)[:, rows]
    logits = model(input_ids=inputs["input_ids"][:, rows], position_ids=rows[None], attention_mask=causal).logits
    alone = torch.nn.functional.cross_entropy(logits[0], labels[0])
    alone.backward()
    # Norms and rotary embeddings of Transformers round to fp32.
    torch.testing.assert_close(loss, alone, rtol=1e-7, atol=1e-7)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "changes",
    [{"kv": "all"}, {"scorer": "random"}, {"scorer": "predictor"}, {"policy": "threshold"}, {"mlp": "own"}],
)
def test_rows_that_others_read_need_a_bypass(changes):
    model = tiny_model("llama")
    plan = Plan.uniform(model, forward_ratio=0.5, backward_ratio=0.5, **CHOICES | changes)
    assert not plan.leaves_out and plan.needs_bypass


def test_so_do_rows_that_skip_some_layers_only():
    model = tiny_model("llama")
    plan = Plan.uniform(model, forward_ratio=0.5, backward_ratio=0.5, **CHOICES)
    other = replace(plan, layers=(*plan.layers[:-1], LayerPlan(0.6, 0.5)))
    for each in (other, Plan.uniform(model, forward_ratio=0.5, backward_ratio=0.5, dense_layers=(0,), **CHOICES)):
        assert not each.leaves_out
        with pytest.raises(PlanError, match=r"leave the same rows out of all layers"):
            attach(model, each)
    dense = Plan.uniform(model, forward_ratio=1.0, backward_ratio=0.5, **CHOICES)
    assert not dense.leaves_out and not dense.needs_bypass


def test_scorers_say_whether_they_look_at_the_layer():
    same = [name for name in TRAINING_SCORERS if name != "predictor" and not scores_by_layer(scorer_named(name))]
    assert tuple(same) == SAME_IN_ALL_LAYERS
