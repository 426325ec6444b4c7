"""The fused engine is the generic executor: values and all gradients, in fp64, for every combination of options."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lemo import attach
from lemo.core.bypass import Bypass
from lemo.errors import UnsupportedModelError
from lemo.families import all_families
from lemo.ops import linear_ce
from lemo.runtime import head
from tests.runtime.oracle import batch, fill_adapters, gradients, tiny_model
from tests.runtime.test_exact import in_double
from tests.runtime.test_laws import sparse_plan

FUSED = sorted(name for name, family in all_families().items() if family.names is not None)
BOUND = 1e-10
MODES = {
    "skip": (0.5, 0.5, "rows"),
    "exact rows": (1.0, 0.4, "rows"),
    "exact pairs": (1.0, 0.4, "pairs"),
    "exact keys": (1.0, 0.4, "keys"),
    "both keys": (0.75, 0.4, "keys"),
    "both rows": (0.75, 0.4, "rows"),
    "both pairs": (0.75, 0.4, "pairs"),
}


def plan_of(model, mode: str, kv: str = "kept", dense: tuple[int, ...] = (), **choices):
    """A random plan with random bypass; some layers dense."""
    forward, backward, gradient = MODES[mode]
    plan = sparse_plan(model, kv=kv, gradient=gradient, **choices)
    layers = [replace(x, forward_ratio=forward, backward_ratio=backward) for x in plan.layers]
    for index in dense:
        layers[index] = replace(layers[index], forward_ratio=1.0, backward_ratio=1.0)
    return replace(plan, layers=tuple(layers))


def run(model, plan, inputs, engine: str, **options):
    """Loss and gradients of one training step under an engine."""
    model.zero_grad(set_to_none=True)
    with attach(model, plan, engine=engine, self_test=False, unsafe_no_bypass=True, **options) as handle:
        loss = model(**inputs).loss
        loss.backward()
        kinds = handle.selections
    return loss.detach(), gradients(model), kinds


def assert_equal_engines(model, plan, inputs, *, bound: float = BOUND, **options):
    """Loss and every gradient of the fused engine are the generic executor's."""
    loss, wanted, _ = run(model, plan, inputs, "generic")
    fused_loss, got, _ = run(model, plan, inputs, "fused", **options)
    assert got.keys() == wanted.keys()
    assert abs(float(loss - fused_loss)) <= bound * abs(float(loss))
    scale = torch.stack([g.norm() for g in wanted.values()]).norm()
    for name, gradient in wanted.items():
        error = float((got[name] - gradient).norm() / scale)
        assert error <= bound, f"{name}: {error:.1e}"


@pytest.mark.parametrize("kv", ["kept", "all"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FUSED)
def test_fused_is_generic(family, mode, kv, monkeypatch):
    """Every parameter trainable: base weights, biases, norms and embeddings."""
    in_double(monkeypatch)
    model = tiny_model(family, dtype=torch.float64)
    assert_equal_engines(model, plan_of(model, mode, kv), batch(48, supervised_from=30))


@pytest.mark.parametrize("recompute", ["none", "mlp", "lin", "layer"])
@pytest.mark.parametrize("kv", ["kept", "all"])
@pytest.mark.parametrize("mode", ["skip", "exact rows", "exact pairs", "exact keys"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_recompute_changes_nothing(family, mode, kv, recompute, monkeypatch):
    """What is computed again in backward is what forward had."""
    in_double(monkeypatch)
    model = tiny_model(family, dtype=torch.float64)
    assert_equal_engines(model, plan_of(model, mode, kv, dense=(1,)), batch(48), recompute=recompute)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj", "up_proj"], ["k_proj", "gate_proj", "down_proj"]])
@pytest.mark.parametrize("kv", ["kept", "all"])
def test_adapters_on_any_subset(targets, kv, monkeypatch):
    """LoRA on some maps, everything else frozen; the first layer's input then needs no gradient."""
    from peft import LoraConfig, get_peft_model

    in_double(monkeypatch)
    model = get_peft_model(tiny_model(dtype=torch.float64), LoraConfig(r=3, target_modules=targets, lora_alpha=7))
    fill_adapters(model)
    plan = plan_of(model, "skip", kv)
    assert_equal_engines(model, plan, batch(48))


@pytest.mark.parametrize("rank", [8, 65])
@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
@pytest.mark.parametrize("recompute", ["none", "lin"])
def test_adapters_of_any_rank(family, rank, recompute, monkeypatch):
    """What an adapter of a low rank adds to gate and up is added with the activation, that of others before it."""
    from peft import LoraConfig, get_peft_model

    in_double(monkeypatch)
    config = LoraConfig(r=rank, target_modules="all-linear", lora_alpha=7)
    model = get_peft_model(tiny_model(family, dtype=torch.float64), config)
    fill_adapters(model)
    for mode, kv in (("exact keys", "all"), ("skip", "kept")):
        assert_equal_engines(model, plan_of(model, mode, kv), batch(48), recompute=recompute)


def test_adapters_on_fused_projections(monkeypatch):
    """One map that makes queries, keys and values, and one for gate and up."""
    from peft import LoraConfig, get_peft_model

    in_double(monkeypatch)
    config = LoraConfig(r=3, target_modules=["qkv_proj", "gate_up_proj", "o_proj", "down_proj"])
    model = get_peft_model(tiny_model("phi3", dtype=torch.float64), config)
    fill_adapters(model)
    for kv in ("kept", "all"):
        assert_equal_engines(model, plan_of(model, "skip", kv), batch(48))


@pytest.mark.parametrize("side", ["left", "right", "packed"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kv", ["kept", "all"])
def test_ragged_and_packed_batches(mode, kv, side, monkeypatch):
    """Padding on either side, and documents packed into one sequence; one layer dense."""
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    inputs = batch(40, rows=2, supervised_from=28)
    if side == "packed":
        position_ids = torch.cat([torch.arange(18), torch.arange(22)]).expand(2, -1).clone()
        inputs["position_ids"] = position_ids
        inputs["labels"][:, 10:14] = inputs["input_ids"][:, 10:14]
    else:
        mask = torch.ones_like(inputs["input_ids"])
        hidden = slice(0, 9) if side == "left" else slice(33, 40)
        mask[1, hidden] = 0
        inputs["labels"][1, hidden] = -100
        inputs["attention_mask"] = mask
    assert_equal_engines(model, plan_of(model, mode, kv, dense=(2,)), inputs)


@pytest.mark.parametrize("mode", ["skip", "exact rows", "exact keys"])
@pytest.mark.parametrize("kv", ["kept", "all"])
def test_threshold_inside_capacity(mode, kv, monkeypatch):
    """Rows of the capacity that were not chosen have no effect."""
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    plan = plan_of(model, mode, kv)
    plan = replace(plan, policy="threshold", layers=tuple(replace(x, threshold=0.5) for x in plan.layers))
    assert_equal_engines(model, plan, batch(64, supervised_from=56))


def test_checkpointing_is_left_to_the_engine(monkeypatch):
    """Under gradient checkpointing the engine recomputes by itself, to the same numbers."""
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    plan, inputs = plan_of(model, "skip", "all"), batch(48)
    wanted = run(model, plan, inputs, "fused")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = run(model, plan, inputs, "fused")
    assert torch.equal(wanted[0], got[0])
    for name, gradient in wanted[1].items():
        assert torch.allclose(got[1][name], gradient, rtol=1e-12, atol=1e-14), name
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_out_of_place_is_in_place(monkeypatch):
    """Copying the stream once a layer changes no bit."""
    in_double(monkeypatch)
    model, inputs = tiny_model(dtype=torch.float64), batch(48)
    plan = plan_of(model, "skip", "all")
    found = []
    for in_place in (True, False):
        model.zero_grad(set_to_none=True)
        with attach(model, plan, engine="fused", self_test=False) as handle:
            handle.in_place = in_place
            loss = model(**inputs).loss
            loss.backward()
        found.append((loss.detach(), gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][n], g) for n, g in found[1][1].items())


def test_two_forwards_before_two_backwards(monkeypatch):
    """Nothing of a batch lives on modules between its forward and its backward."""
    in_double(monkeypatch)
    model, plan = tiny_model(dtype=torch.float64), None
    plan = plan_of(model, "skip", "kept")
    first, second = batch(48, seed=3), batch(48, seed=4)
    separate = [
        run(
            model,
            plan,
            inputs,
            "fused",
        )[1]
        for inputs in (first,)
    ]
    model.zero_grad(set_to_none=True)
    with attach(model, plan, engine="fused", self_test=False):
        losses = [model(**first).loss, model(**second).loss]
        losses[1].backward()
        model.zero_grad(set_to_none=True)
        losses[0].backward()
        got = gradients(model)
    assert all(torch.equal(got[n], g) for n, g in separate[0].items())


def test_hidden_gradients_are_not_overwritten_for_others(monkeypatch):
    """The gradient of the embedding output, which a user may watch, is the generic executor's."""
    in_double(monkeypatch)
    model, inputs = tiny_model(dtype=torch.float64), batch(48)
    plan, seen = plan_of(model, "skip", "all"), {}
    for engine in ("generic", "fused"):
        embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        with attach(model, plan, engine=engine, self_test=False):
            model(inputs_embeds=embedded, labels=inputs["labels"]).loss.backward()
        seen[engine] = embedded.grad
    assert float((seen["fused"] - seen["generic"]).norm() / seen["generic"].norm()) <= BOUND


def test_second_backward_is_refused():
    """The first backward uses up what was saved."""
    model = tiny_model()
    with attach(model, plan_of(model, "skip"), engine="fused", self_test=False):
        loss = model(**batch(48)).loss
        loss.backward(retain_graph=True)
        with pytest.raises(UnsupportedModelError, match="second backward"):
            loss.backward()


def test_reasons_for_the_generic_executor():
    """What the fused engine cannot run is named; `auto` notes it, `fused` refuses."""
    model = tiny_model(attention_dropout=0.1)
    with (
        attach(model, plan_of(model, "skip"), engine="fused", self_test=False),
        pytest.raises(UnsupportedModelError, match=r"layer 0: dropout is active \(self_attn.attention_dropout\)"),
    ):
        model(**batch(48))
    gemma = tiny_model("gemma2")
    with (
        attach(gemma, plan_of(gemma, "skip"), engine="fused", self_test=False),
        pytest.raises(UnsupportedModelError, match="no family file names the parts"),
    ):
        gemma(**batch(48))


def test_dense_plan_runs_fused_when_asked(monkeypatch):
    """All layers dense, run by the fused engine: the plain model's numbers."""
    in_double(monkeypatch)
    model, inputs = tiny_model(dtype=torch.float64), batch(48)
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    wanted = gradients(model)
    plan = plan_of(model, "skip", dense=(0, 1, 2, 3))
    got_loss, got, _ = run(model, plan, inputs, "fused")
    assert abs(float(loss.detach() - got_loss)) <= BOUND
    assert all(float((got[n] - g).norm()) <= BOUND * float(g.norm() + 1) for n, g in wanted.items())


def test_self_test_covers_the_fused_engine(monkeypatch):
    """A fused layer that computed something else would be found at attach time."""
    from lemo.runtime import selftest

    model, seen = tiny_model(), []
    monkeypatch.setattr(selftest, "_check_layer", lambda stream, index, fused: seen.append((index, fused)))
    attach(model, plan_of(model, "skip"), engine="fused").detach()
    assert seen == [(0, frozenset()), (0, frozenset({0}))]
    monkeypatch.undo()
    monkeypatch.setattr("lemo.runtime.fused.attention.rope_rows_", lambda *a, **k: None)
    with pytest.raises(UnsupportedModelError, match="cannot skip rows"):
        attach(model, plan_of(model, "skip"), engine="fused")


@pytest.mark.parametrize("recompute", ["none", "lin"])
@pytest.mark.parametrize("kv", ["kept", "all"])
@pytest.mark.parametrize("family", ["llama", "granite", "opt", "phi3"])
def test_own_mlp_rows(family, kv, recompute, monkeypatch):
    """The MLP runs fewer rows than attention; the others take its bypass, or none."""
    in_double(monkeypatch)
    model = tiny_model(family, dtype=torch.float64)
    plan = replace(plan_of(model, "skip", kv), mlp="own")
    width = model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(9)
    bypass = Bypass(
        0.2 * torch.randn(width, 3, generator=generator, dtype=torch.float64),
        0.2 * torch.randn(3, width, generator=generator, dtype=torch.float64),
    )
    layers = [replace(x, mlp_ratio=0.3, mlp_bypass=bypass if i % 2 else None) for i, x in enumerate(plan.layers)]
    plan = replace(plan, layers=tuple(layers))
    assert_equal_engines(model, plan, batch(48, supervised_from=40), recompute=recompute)


def test_labelled_rows_are_counted_only_where_the_labels_do_not_say(monkeypatch):
    """Rows read from labels carry one, so nothing waits for a count; rows stated by a mask may carry none."""
    seen = []
    monkeypatch.setattr(head, "linear_ce", lambda *a, **k: seen.append(k["ignore_index"]) or linear_ce(*a, **k))
    model, inputs = tiny_model(), batch(48, supervised_from=30)
    plan = plan_of(model, "exact keys")
    every_row = torch.ones_like(inputs["labels"], dtype=torch.bool)
    with attach(model, plan, engine="fused", self_test=False, unsafe_no_bypass=True) as handle:
        losses = [model(**inputs).loss]
        with handle.supervised(every_row):
            losses.append(model(**inputs).loss)
        losses.append(model(**inputs, loss_weights=torch.ones(1, 48)).loss)
    assert seen == [None, -100]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0])
