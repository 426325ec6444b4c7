"""Plans: what was saved loads, what does not fit is refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch

from lemo.core.bypass import Bypass
from lemo.core.plan import LayerPlan, Plan
from lemo.core.predictor import PatternPredictor
from lemo.errors import ConfigError, PlanError
from lemo.runtime.attach import attach
from lemo.runtime.model import fingerprint
from tests.runtime.oracle import batch, tiny_model


def full_plan(model) -> Plan:
    """A plan that uses every field."""
    torch.manual_seed(3)
    net = lambda: PatternPredictor(32, pooled_features=8, rank=4)  # noqa: E731
    bypass = Bypass(torch.randn(32, 4) * 0.1, torch.randn(4, 32) * 0.1)
    layer = LayerPlan(0.6, 0.6, -0.5, net(), bypass, 0.5, net(), bypass)
    layers = (LayerPlan(), layer, replace(layer, predictor=net()), LayerPlan())
    return Plan(layers, 4, "threshold", "predictor", "kept", "pairs", "own", 7, fingerprint(model), {"why": "test"})


def test_saved_plan_loads_and_selects_alike(tmp_path):
    """Loss and selections are the same bits after a round trip."""
    model, inputs = tiny_model(), batch(rows=2)
    plan = full_plan(model)
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    results = []
    for each in (plan, loaded):
        with attach(model, each) as handle:
            loss = model(**inputs).loss
            results.append((loss, [handle.selections[i].forward.chosen() for i in (1, 2)]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
    fields = ("block_size", "policy", "scorer", "kv", "gradient", "mlp", "seed", "fingerprint", "provenance")
    assert all(getattr(plan, f) == getattr(loaded, f) for f in fields)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_others_may_read_a_plan_as_far_as_the_umask_says(tmp_path, mask):
    before = os.umask(mask)
    try:
        Plan((LayerPlan(bypass=Bypass(torch.ones(4, 2), torch.ones(2, 4))),)).save(tmp_path / "plan")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "plan").iterdir()}
    assert modes == {"plan.json": 0o666 & ~mask, "plan.safetensors": 0o666 & ~mask}


def test_plan_of_another_model_is_refused():
    """Same sizes, other weights: the fingerprint differs. Adapters do not change it."""
    from peft import LoraConfig, get_peft_model

    model, other = tiny_model(seed=0), tiny_model(seed=1)
    plan = full_plan(model)
    with pytest.raises(PlanError, match="another base model"):
        attach(other, plan)
    with pytest.raises(PlanError, match="has 4 layers, the model 3"):
        attach(tiny_model(num_hidden_layers=3), plan)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    with attach(adapted, plan) as handle:
        assert torch.isfinite(adapted(**batch()).loss) and handle.sparse_batches == 1


def test_fingerprint_does_not_depend_on_the_dtype_a_model_is_loaded_in():
    """bf16 weights and the same weights read as fp32 are one model."""
    model = tiny_model().bfloat16()
    assert fingerprint(model) == fingerprint(model.float())


def test_skipping_without_bypass_is_refused():
    """It ruins models, so it must be asked for."""
    model = tiny_model()
    plan = Plan.uniform(model, forward_ratio=0.5, backward_ratio=0.5)
    with pytest.raises(PlanError, match="unsafe_no_bypass"):
        attach(model, plan)
    attach(model, plan, unsafe_no_bypass=True).detach()


@pytest.mark.parametrize("damage", ["missing", "text", "format", "field", "tensors"])
def test_damaged_plans_name_the_folder(tmp_path, damage):
    """Every way a plan can be broken gives one PlanError that names it."""
    full_plan(tiny_model()).save(tmp_path)
    text = (tmp_path / "plan.json").read_text()
    if damage == "missing":
        (tmp_path / "plan.json").unlink()
    elif damage == "text":
        (tmp_path / "plan.json").write_text(text[: len(text) // 2])
    elif damage == "format":
        (tmp_path / "plan.json").write_text(text.replace('"format": 1', '"format": 99'))
    elif damage == "field":
        (tmp_path / "plan.json").write_text(text.replace('"seed"', '"sead"'))
    else:
        (tmp_path / "plan.safetensors").write_bytes(b"not tensors")
    with pytest.raises(PlanError, match=str(tmp_path)):
        Plan.load(tmp_path)


@pytest.mark.parametrize("field", ["policy", "scorer", "kv", "gradient", "mlp"])
def test_unknown_choices_are_refused(field):
    """Each choice names what it may be."""
    with pytest.raises(ConfigError, match=field):
        Plan((LayerPlan(),), **{field: "nonsense"})


def test_uniform_names_a_dense_layer_that_does_not_exist():
    """Indices count from either end."""
    assert [x.is_dense for x in Plan.uniform(4, dense_layers=(0, -1)).layers] == [True, False, False, True]
    with pytest.raises(ConfigError, match="names layer 4"):
        Plan.uniform(4, dense_layers=(4,))


def test_a_plan_of_an_earlier_version_counts_all_rows(tmp_path):
    plan = Plan.uniform(2, forward_ratio=1.0, backward_ratio=0.5, ratio_of="context")
    plan.save(tmp_path)
    assert Plan.load(tmp_path).ratio_of == "context"
    path = tmp_path / "plan.json"
    stored = json.loads(path.read_text())
    del stored["ratio_of"]
    path.write_text(json.dumps(stored))
    assert Plan.load(tmp_path).ratio_of == "all"


def test_plans_say_what_local_rows_see(tmp_path):
    Plan.uniform(2, context_window=512, local_forward="all").save(tmp_path)
    assert Plan.load(tmp_path).local_forward == "all"
    written = json.loads((tmp_path / "plan.json").read_text())
    del written["local_forward"]
    (tmp_path / "plan.json").write_text(json.dumps(written))
    assert Plan.load(tmp_path).local_forward == "near", "as plans from before this choice are"
    for wrong in ({}, {"context_window": 512, "local_forward": "far"}):
        with pytest.raises(ConfigError, match="local_forward"):
            Plan.uniform(2, **{"local_forward": "all"} | wrong)


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), True, 0, -3, None])
def test_a_plan_needs_a_number_of_layers(model):
    with pytest.raises(ConfigError, match="decoder layers, or their number"):
        Plan.uniform(model)


def test_a_field_that_plans_lack_is_named_with_those_they_have():
    with pytest.raises(ConfigError, match=r"no field .foo.; known are block_size, .*scorer"):
        Plan.uniform(3, foo=1)


def test_a_plan_that_cannot_be_written_says_where(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PlanError, match=r"file/plan: the plan cannot be written there \(Not a directory\)"):
        Plan.uniform(3).save(tmp_path / "file" / "plan")


@pytest.mark.parametrize("plan", [None, "a folder"])
def test_what_is_no_plan_is_refused(plan):
    with pytest.raises(PlanError, match=r"plan must be a lemo\.Plan, got (NoneType|str); lemo\.Plan\.uniform"):
        attach(tiny_model(), plan)
