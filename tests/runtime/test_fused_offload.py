"""Offload moves what only keys need to the host and back, changes no bit, and keeps no memory longer than it must."""

from __future__ import annotations

import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lemo.runtime.fused.attention as attention
import lemo.runtime.fused.offload as offload
from lemo import attach
from lemo.errors import ConfigError
from lemo.runtime.fused.engine import make_call
from lemo.runtime.fused.maps import MapGroup
from tests.runtime.oracle import batch, fill_adapters, gradients, tiny_model
from tests.runtime.test_exact import in_double
from tests.runtime.test_fused import assert_equal_engines, plan_of, run

CASES = [("skip", "all"), *((mode, kv) for mode in ("exact rows", "exact keys", "both keys") for kv in ("kept", "all"))]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks a layer, the last one not full."""
    monkeypatch.setattr(offload, "CHUNK_BYTES", 1000)


def packed():
    inputs = batch(40, rows=2, supervised_from=28)
    inputs["position_ids"] = torch.cat([torch.arange(18), torch.arange(22)]).expand(2, -1).clone()
    inputs["labels"][:, 10:14] = inputs["input_ids"][:, 10:14]
    return inputs


def lane_of(handle) -> offload.Lane:
    (lane,) = handle._fused._host.lanes.values()
    return lane


def assert_idle(lane: offload.Lane) -> None:
    """All host memory is free, and no device memory is held."""
    assert len(lane._free) == lane.allocated and lane._waiting == 0 and lane.slots == []


LEVELS = [*((level, True) for level in ("none", "mlp", "lin", "layer")), ("lin", "keys"), ("layer", "keys")]


@pytest.mark.parametrize(("recompute", "offloads"), LEVELS)
@pytest.mark.parametrize(("mode", "kv"), CASES)
@pytest.mark.parametrize("inputs", [batch(48), packed()], ids=["plain", "packed"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_offload_changes_no_bit(family, inputs, mode, kv, recompute, offloads):
    """Loss and every gradient, with one layer dense; something did go to the host.

    Keys and values of forward are to the bit those that backward would make, as the same products make them here.
    """
    check_no_bit_changes(tiny_model(family), inputs, mode, kv, recompute, offloads)


@pytest.mark.parametrize("recompute", ["lin", "layer"])
@pytest.mark.parametrize(("mode", "kv"), [("exact keys", "kept"), ("both keys", "kept"), ("skip", "all")])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_keys_of_every_head_change_no_bit(family, mode, kv, recompute):
    """As many key heads as query heads; the default tiny model shares them."""
    model = tiny_model(family, num_attention_heads=4, num_key_value_heads=4)
    check_no_bit_changes(model, batch(48), mode, kv, recompute, "keys")


def check_no_bit_changes(model, inputs, mode, kv, recompute, offloads):
    plan = plan_of(model, mode, kv, dense=(1,))
    loss, wanted, _ = run(model, plan, inputs, "fused", recompute=recompute)
    model.zero_grad(set_to_none=True)
    with attach(
        model, plan, engine="fused", self_test=False, unsafe_no_bypass=True, recompute=recompute, offload=offloads
    ) as handle:
        got_loss = model(**inputs).loss
        got_loss.backward()
        lane = lane_of(handle)
        assert lane.allocated and lane.fetches >= 1
        assert_idle(lane)
    got = gradients(model)
    assert torch.equal(loss, got_loss)
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], g) for name, g in wanted.items())


@pytest.mark.parametrize("recompute", ["lin", "layer"])
@pytest.mark.parametrize(("mode", "kv"), [("exact keys", "kept"), ("both keys", "all"), ("skip", "all")])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["o_proj"]])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_parked_keys_under_adapters(family, targets, mode, kv, recompute, monkeypatch):
    """The generic executor's gradients, also of maps whose products backward does not repeat."""
    in_double(monkeypatch)
    model = get_peft_model(tiny_model(family, dtype=torch.float64), LoraConfig(r=3, target_modules=targets))
    fill_adapters(model)
    assert_equal_engines(model, plan_of(model, mode, kv, dense=(1,)), batch(48), recompute=recompute, offload="keys")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_keys_are_taken_and_not_made_again(family, monkeypatch):
    """Inputs, keys and values of all rows go to the host; backward projects and rotates queries alone."""
    parked, made, turned = [], [], []
    watch(monkeypatch, offload.Convoy, "park", lambda convoy, tensors: parked.append(sorted(tensors)))
    watch(monkeypatch, attention, "rope_rows_", lambda heads, *args, **keys: turned.append(type(heads)))
    watch(monkeypatch, MapGroup, "forward", lambda maps, x, which, *args: made.append(which))
    model = tiny_model(family)
    names = ["pre_key", "pre_value"] if family == "qwen3" else ["head_key", "head_value"]
    for offloads in ("inputs", "keys"):
        parked.clear()
        with attach(
            model, plan_of(model, "exact keys"), engine="fused", self_test=False, recompute="lin", offload=offloads
        ) as handle:
            loss = model(**batch(48)).loss
            made.clear(), turned.clear()
            loss.backward()
        layers = len(handle.plan.layers)
        assert parked == [["frame", *(names if offloads == "keys" else ())]] * layers
        assert made.count((1, 2)) == (0 if offloads == "keys" else layers)
        # Gradients of queries and keys are turned back. Keys whose norm is taken again are rotated again.
        again = layers if offloads == "keys" and family == "llama" else 2 * layers
        assert len(turned) == 2 * layers + again


def watch(monkeypatch, owner, name, see):
    """Calls of a function, which runs as ever."""
    inner = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **keys: (see(*args, **keys), inner(*args, **keys))[1])


@pytest.mark.parametrize("recompute", ["none", "mlp"])
def test_levels_that_keep_keys_park_the_same(recompute):
    """At `none` and `mlp` keys and values go to the host anyway."""
    model = tiny_model()
    counts = []
    for offloads in (True, "inputs", "keys"):
        with attach(
            model, plan_of(model, "exact keys"), engine="fused", self_test=False, recompute=recompute, offload=offloads
        ) as handle:
            model(**batch(48)).loss.backward()
            counts.append(lane_of(handle).allocated)
    assert counts[0] > 0 and set(counts) == {counts[0]}


@pytest.mark.parametrize("offloading", [True, "keys"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_before_their_backwards(order, offloading):
    """Every graph owns its host memory, in whatever order backward runs; both gradients add up to the bit."""
    model = tiny_model()
    plan, batches = plan_of(model, "exact keys"), [batch(48, seed=3), batch(36, seed=4)]
    found = []
    for offloads in (False, offloading):
        model.zero_grad(set_to_none=True)
        with attach(model, plan, engine="fused", self_test=False, recompute="lin", offload=offloads):
            losses = [model(**inputs).loss for inputs in batches]
            for number in order:
                losses[number].backward()
        found.append(gradients(model))
    assert all(torch.equal(found[1][name], g) for name, g in found[0].items())


@pytest.mark.parametrize("offloads", [True, "keys"])
def test_memory_is_reused_over_steps(offloads):
    """The first step allocates; later ones, and shorter ones, take what is there. The last two layers stay in slots."""
    model = tiny_model()
    options = {"engine": "fused", "self_test": False, "recompute": "lin", "offload": offloads}
    with attach(model, plan_of(model, "exact keys"), **options) as handle:
        seen = []
        for step, tokens in enumerate((48, 48, 32, 48)):
            model(**batch(tokens, seed=step)).loss.backward()
            seen.append(lane_of(handle).allocated)
        layers = len(handle.plan.layers)
        assert seen[0] > 0 and set(seen) == {seen[0]}
        assert lane_of(handle).fetches == 4 * (layers - offload.SLOTS)
        assert_idle(lane_of(handle))


@pytest.mark.parametrize("offloads", [True, "keys"])
def test_at_most_two_layers_on_the_device(offloads, monkeypatch):
    """In forward and backward, whatever the order of layers."""
    counts = []
    inner = offload.Lane._copy
    monkeypatch.setattr(
        offload.Lane, "_copy", lambda lane, *args, **keys: (counts.append(len(lane.slots)), inner(lane, *args, **keys))
    )
    model = tiny_model()
    options = {"engine": "fused", "self_test": False, "recompute": "lin", "offload": offloads}
    with attach(model, plan_of(model, "exact keys"), **options):
        losses = [model(**batch(48, seed=seed)).loss for seed in (3, 4)]
        losses[0].backward()
        model(**batch(48, seed=5)).loss.backward()
        losses[1].backward()
    assert counts and max(counts) == offload.SLOTS


@pytest.mark.parametrize("offloads", [True, "keys"])
def test_memory_of_a_freed_graph_comes_back(offloads):
    """A loss that nobody differentiates, and one whose backward fails half way."""
    model = tiny_model()
    plan, inputs = plan_of(model, "exact keys"), batch(48)
    wanted = run(model, plan, inputs, "fused", recompute="lin")[1]
    with attach(model, plan, engine="fused", self_test=False, recompute="lin", offload=offloads) as handle:
        loss = model(**inputs).loss
        allocated = lane_of(handle).allocated
        assert not lane_of(handle)._free
        del loss
        gc.collect()
        assert_idle(lane_of(handle))

        parameter = model.model.layers[1].mlp.down_proj.weight

        def fail(gradient):
            raise FloatingPointError("stop")

        hook = parameter.register_hook(fail)
        loss = model(**inputs).loss
        with pytest.raises(FloatingPointError):
            loss.backward()
        hook.remove()
        del loss
        # Autograd may hold what a failed backward left over until the next one begins.
        model.zero_grad(set_to_none=True)
        model(**inputs).loss.backward()
        gc.collect()
        assert_idle(lane_of(handle))
        model.zero_grad(set_to_none=True)
        handle.sparse_batches = 0  # random rows are drawn anew every step
        model(**inputs).loss.backward()
        assert lane_of(handle).allocated <= 2 * allocated
    assert all(torch.equal(gradients(model)[name], g) for name, g in wanted.items())


def test_nothing_is_copied_without_gradient():
    """Evaluation under selection has no backward."""
    model = tiny_model().eval()
    inputs = batch(48)
    with attach(
        model, plan_of(model, "exact keys"), engine="fused", self_test=False, offload=True, sparse_eval=True
    ) as handle:
        with torch.no_grad():
            model(**inputs)
        assert handle.sparse_evaluations == 1 and not handle._fused._host.lanes


def test_backward_after_detach():
    """A graph outlives its attachment; its memory goes with it."""
    model = tiny_model()
    plan, inputs = plan_of(model, "exact keys"), batch(48)
    wanted = run(model, plan, inputs, "fused")[1]
    model.zero_grad(set_to_none=True)
    with attach(model, plan, engine="fused", self_test=False, offload=True) as handle:
        loss = model(**inputs).loss
        lane = lane_of(handle)
    loss.backward()
    assert all(torch.equal(gradients(model)[name], g) for name, g in wanted.items())
    assert lane._free == [] and lane._waiting == 0 and not handle._fused._host.lanes


def test_offload_needs_the_fused_engine():
    """The generic engine refuses it, and names what does it there; `auto` says where it has no effect."""
    model = tiny_model()
    plan = plan_of(model, "exact keys")
    with pytest.raises(ConfigError, match="offload moves what the fused engine saves"):
        attach(model, plan, engine="generic", self_test=False, offload=True)
    with attach(model, plan, self_test=False, offload=True) as handle:
        model(**batch(48)).loss.backward()
        assert any("activation_offloading" in note for note in handle.notes)


@pytest.mark.parametrize("offloads", ["key", "true", "", None, 2])
def test_unknown_offload(offloads):
    """One error that names what there is."""
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"offload must be false, true .*, 'inputs' or 'keys', got"):
        attach(model, plan_of(model, "exact keys"), self_test=False, offload=offloads)


def test_last_layer_of_exact_forward_runs_few_rows(monkeypatch):
    """Its loss rows with gradient into all keys; otherwise the rows that pass gradient. Neither is all rows."""
    import lemo.runtime.step as step

    calls = []

    def noted(*args):
        calls.append(make_call(*args))
        return calls[-1]

    monkeypatch.setattr(step, "make_call", noted)
    model, inputs = tiny_model(), batch(48, supervised_from=40)
    for mode in ("exact keys", "exact rows", "exact pairs"):
        calls.clear()
        with attach(model, plan_of(model, mode), engine="fused", self_test=False) as handle:
            model(**inputs).loss.backward()
        last, passes = calls[-1], handle.selections[len(calls) - 1].backward
        assert calls[0].rows_n is None and calls[0].exact is not None
        if mode == "exact keys":
            assert last.exact is None and last.rows_n.tolist() == list(range(39, 47))
        else:
            assert last.exact is not None and torch.equal(last.rows_n, passes.rows_N) and passes.capacity < 48
