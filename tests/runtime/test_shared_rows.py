"""Layers that choose the same rows share them: selected, planned and indexed once a batch, to the same result."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lemo.runtime.fused.engine as engine_module
from lemo.core.layout import Layout
from lemo.core.plan import LayerPlan, Plan
from lemo.core.predictor import PatternPredictor
from lemo.core.score import Predicted, scorer_named, scores_by_layer
from lemo.runtime.batch import LOCAL_ROWS, BatchContext, supervised_rows
from tests.runtime.oracle import batch, tiny_model
from tests.runtime.test_context_window import _packed
from tests.runtime.test_local_rows import marked, run

BLOCK, LAYERS = 4, 4
DENSE = (1.0, 1.0)
RATIOS = ((0.75, 0.75), (1.0, 0.5), (0.75, 0.5), DENSE)
MODELS = {}


def plan_of(*ratios, scorer="recent", **choices) -> Plan:
    """Four layers unless ratios say otherwise, none of them dense."""
    layers = tuple(LayerPlan(*pair) for pair in (ratios or ((0.75, 0.5),) * LAYERS))
    return Plan(layers, block_size=BLOCK, scorer=scorer, **choices)


def context_of(plan, tokens=48, **options) -> BatchContext:
    """A batch whose last eight rows carry loss."""
    supervised = torch.arange(tokens)[None] >= tokens - 8
    return BatchContext(plan, Layout.build(torch.zeros(1, tokens), supervised, block_size=BLOCK), **options)


def selected(plan, **options):
    """The selection of every layer, each for an input of its own."""
    context = context_of(plan, **options)
    generator = torch.Generator().manual_seed(0)
    return [context.select(i, torch.randn(48, 8, generator=generator)) for i in range(len(plan.layers))]


def test_scorers_say_whether_layers_differ():
    """Only scorers that look at nothing but positions and loss; a scorer that does not say is one that may differ."""
    by_layer = {
        name: scores_by_layer(scorer_named(name)) for name in ("recent", "words", "position", "random", "interaction")
    }
    assert by_layer == {"recent": False, "words": False, "position": False, "random": True, "interaction": True}
    assert scores_by_layer(Predicted(PatternPredictor(8)))
    assert scores_by_layer(object())


def test_layers_that_choose_alike_share_a_selection():
    """One object for equal ratios; others, and other batches, have their own."""
    pairs = ((0.75, 0.5), (1.0, 0.5), (0.75, 0.5), (1.0, 1.0), (1.0, 0.5), (1.0, 1.0))
    found = selected(plan_of(*pairs))
    for i, one in enumerate(pairs):
        for j, other in enumerate(pairs):
            assert (found[i] is found[j]) == (one == other)
    assert found[0].forward.capacity < 48 and found[1].forward is None and found[3].is_dense
    again = selected(plan_of(*pairs))
    assert all(a is not b for a, b in zip(found, again, strict=True))


def test_thresholds_part_layers_where_they_count():
    """Under `topk` they are informative."""
    layers = tuple(LayerPlan(0.75, 0.75, threshold=t) for t in (-3.0, -3.0, -1.0))
    topk, drops = (selected(Plan(layers, BLOCK, policy, scorer="recent")) for policy in ("topk", "threshold"))
    assert topk[0] is topk[1] is topk[2]
    assert drops[0] is drops[1] is not drops[2]
    assert int(drops[2].forward.count) < int(drops[0].forward.count)


@pytest.mark.parametrize("scorer", ["random", "predictor"])
def test_layers_with_scores_of_their_own_select_by_themselves(scorer):
    """They draw, or look at their inputs; so they keep different rows."""
    plan = plan_of(scorer=scorer)
    if scorer == "predictor":
        torch.manual_seed(0)
        plan = replace(plan, layers=tuple(replace(x, predictor=PatternPredictor(8)) for x in plan.layers))
    found = selected(plan)
    assert len({id(selection) for selection in found}) == LAYERS
    assert len({tuple(selection.forward.chosen().tolist()) for selection in found}) > 1


def _forget(patch) -> None:
    """Inside, every layer selects and plans for itself."""
    patch.setattr(BatchContext, "once", lambda self, key, make: make())


def _inputs(kind):
    if kind == "packed":
        return _packed((28, 20))[0]
    if kind == "padded":
        return _packed((28, 20), "right")[0]
    return batch(48, supervised_from=40) if kind == "plain" else marked()


@pytest.mark.parametrize("engine", ["generic", "fused"])
@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["plain", "local", "packed", "packed local", "padded", "padded local"]),
    ratios=st.lists(st.sampled_from(RATIOS), min_size=LAYERS, max_size=LAYERS).filter(lambda x: set(x) != {DENSE}),
    gradient=st.sampled_from(["rows", "pairs", "keys"]),
    kv=st.sampled_from(["kept", "all"]),
    recompute=st.sampled_from(["none", "layer"]),
    loss=st.sampled_from(["segmented", "model"]),
)
def test_sharing_changes_nothing(engine, kind, ratios, gradient, kv, recompute, loss):
    """Loss and every gradient, bit for bit, are those of layers that all select and plan for themselves."""
    if not MODELS:
        MODELS["llama"] = tiny_model(num_hidden_layers=LAYERS)
    inputs, choices = _inputs(kind.removesuffix(" local")), {}
    if kind.endswith("local"):
        ratios = [(1.0, 0.5) if kind == "local" or pair[0] == pair[1] else pair for pair in ratios]
        gradient, choices = "keys", {"context_window": 8}
        if kind == "local":
            inputs = marked()
        else:
            row_T = torch.arange(inputs["labels"].shape[1])
            inputs[LOCAL_ROWS] = supervised_rows(inputs) & (row_T // BLOCK % 2 == 0)
    plan = plan_of(*ratios, gradient=gradient, kv=kv, **choices)
    options = {"loss": loss} | ({"recompute": recompute} if engine == "fused" else {})
    results = [run(MODELS["llama"], plan, dict(inputs), engine, **options)]
    with pytest.MonkeyPatch.context() as patch:
        _forget(patch)
        results.append(run(MODELS["llama"], plan, dict(inputs), engine, **options))
    (loss_a, shared, found), (loss_b, alone, anew) = results
    assert torch.equal(loss_a, loss_b) and shared.keys() == alone.keys()
    assert all(torch.equal(shared[name], alone[name]) for name in shared)
    assert len({id(s) for s in found.values()}) == len(set(ratios))
    assert len({id(s) for s in anew.values()}) == LAYERS


@pytest.mark.parametrize("kind", ["plain", "local"])
@pytest.mark.parametrize("forward", [1.0, 0.75])
def test_a_batch_is_planned_once(forward, kind, monkeypatch):
    """Rows that attend to all keys are planned once, and once more where the last layer runs loss rows alone."""
    inputs = batch(48, supervised_from=38) if kind == "plain" else marked()
    plan = plan_of(*(((forward, 0.5),) * LAYERS), gradient="keys", context_window=8)
    model, planned = tiny_model(num_hidden_layers=LAYERS), []

    def plan_rows(queries, keys):
        planned.append(len(queries.position_N))
        return queries

    monkeypatch.setattr(engine_module, "plan_rows", plan_rows)
    monkeypatch.setattr(engine_module, "_has_vendor", lambda x_BTM: True)
    counts = {}
    for name in ("shared", "alone"):
        with pytest.MonkeyPatch.context() as patch:
            if name == "alone":
                _forget(patch)
            run(model, plan, dict(inputs), "fused")
        counts[name] = len(planned)
        planned.clear()
    assert 0 < counts["shared"] < counts["alone"]
    assert counts["shared"] <= 2 * counts["alone"] // LAYERS


def test_calls_of_alike_layers_differ_in_what_is_theirs():
    """Places and ranges are the same objects; the last layer's are its own where nobody reads behind its loss rows."""
    plan = plan_of(*(((1.0, 0.5),) * LAYERS), gradient="keys")
    context = context_of(plan, loss_rows_only=True)
    x_BTM = torch.randn(1, 48, 8)
    calls = []
    for index in range(LAYERS):
        tables = {"position_embeddings": (torch.full((1, 48, 4), float(index)),) * 2}
        selection = context.select(index, x_BTM[0])
        calls.append(engine_module.make_call(context, index, selection, x_BTM, tables, None))
    for one, other in pairwise(calls[:-1]):
        assert one.exact is other.exact is not None and one.queries is other.queries and one.keys is other.keys
    assert calls[-1].exact is None and calls[-1].keys is calls[0].keys
    assert len(calls[-1].rows_n) == 8 < len(calls[0].exact.rows_n)
    assert [float(call.cosine_PR[0, 0]) for call in calls] == [0, 1, 2, 3]
