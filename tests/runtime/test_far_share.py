"""A sample of far keys in backward: values untouched, gradients without bias, the same draws wherever they are made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lemo.core.plan import LayerPlan, Plan
from lemo.core.score import pair_numbers
from lemo.errors import ConfigError, UnsupportedModelError
from lemo.ops.attend_rows import explicit, far
from lemo.runtime.attach import attach
from lemo.runtime.attention import attention_module
from lemo.runtime.model import decoder_layers, window_of
from tests.runtime.oracle import batch, gradients, tiny_model
from tests.runtime.test_context_window import _packed, run
from tests.runtime.test_exact import BOUND, exact_plan, in_double
from tests.runtime.test_fused import FUSED, assert_equal_engines
from tests.runtime.test_laws import assert_same_gradients

ENGINES = ("generic", "fused")


@pytest.fixture(autouse=True)
def short_stripes(monkeypatch):
    monkeypatch.setattr(far, "FAR_STRIPE", 8)


def sampled(model, forward=1.0, gradient="keys", kv="all", share=0.25, **choices) -> Plan:
    """Exact forward whose backward rows read a share of the far keys."""
    plan = exact_plan(model, forward, gradient, kv)
    layers = tuple(replace(x, backward_ratio=0.25) for x in plan.layers)
    return replace(plan, layers=layers, far_share=share, **choices)


@pytest.mark.parametrize("gradient", ["rows", "keys"])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_loss_stays_and_the_gradient_does_not(engine, gradient, monkeypatch):
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    plan = sampled(model, gradient=gradient)
    loss, found, _ = run(model, plan, batch(80, supervised_from=70), engine)
    exact_loss, exact, _ = run(model, replace(plan, far_share=1.0), batch(80, supervised_from=70), engine)
    assert abs(float(loss - exact_loss)) < 1e-12
    assert any(float((found[n] - exact[n]).abs().max()) > 1e-4 * float(exact[n].abs().max()) for n in exact)


@pytest.mark.parametrize("gradient", ["rows", "keys"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_document_of_two_stripes_is_untouched(engine, gradient, monkeypatch):
    """Bit for bit, and so is a share of 1 at any length."""
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    for plan, tokens in ((sampled(model, gradient=gradient), 16), (sampled(model, gradient=gradient, share=1.0), 64)):
        inputs = batch(tokens, supervised_from=tokens - 6)
        with monkeypatch.context() as patch:
            patch.setattr(explicit, "_far_backward", None)  # calling it would fail
            loss, found, _ = run(model, plan, inputs, engine)
        wanted_loss, wanted, _ = run(model, replace(plan, far_share=1.0), inputs, engine)
        assert torch.equal(loss, wanted_loss)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(("forward", "kv"), [(1.0, "all"), (0.75, "all"), (0.75, "kept")])
@pytest.mark.parametrize("gradient", ["rows", "keys"])
@pytest.mark.parametrize("family", FUSED)
def test_fused_is_generic(family, gradient, kv, forward, monkeypatch):
    in_double(monkeypatch)
    model = tiny_model(family, dtype=torch.float64)
    inputs, plan = batch(64, supervised_from=56), sampled(model, forward, gradient, kv)
    if all(window_of(attention_module(layer)) is None for layer in decoder_layers(model)):
        assert_equal_engines(model, plan, inputs)
        return
    with pytest.raises(UnsupportedModelError, match="far_share"):
        run(model, plan, inputs, "fused")


@pytest.mark.parametrize("recompute", ["none", "mlp", "lin", "layer"])
@pytest.mark.parametrize("gradient", ["rows", "keys"])
def test_what_is_computed_again_draws_alike(gradient, recompute, monkeypatch):
    """Every level, with a dense layer in between, loss rows alone in the last, and context rows attending locally."""
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    plan = sampled(model, gradient=gradient).replace_layer(1, forward_ratio=1.0, backward_ratio=1.0)
    plan = replace(plan, context_window=2 * plan.block_size)
    assert_equal_engines(model, plan, batch(64, supervised_from=56), recompute=recompute)


def test_checkpoints_draw_alike(monkeypatch):
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    inputs, plan = batch(64, supervised_from=56), sampled(model)
    _, wanted, _ = run(model, plan, inputs, "generic")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, found, _ = run(model, plan, inputs, "generic")
    assert_same_gradients(found, wanted, BOUND)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("gradient", ["rows", "keys"])
@pytest.mark.parametrize("engine", ENGINES)
def test_documents_draw_as_they_do_alone(engine, gradient, padding, monkeypatch):
    """Packed or padded, of different lengths, one of them too short for far keys: gradients of each alone."""
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    plan = sampled(model, gradient=gradient)
    inputs, alone = _packed((43, 14, 60), padding)
    _, found, _ = run(model, plan, inputs, engine)
    runs = [run(model, plan, one, engine)[1] for one in alone]
    assert_same_gradients(found, {name: sum(x[name] for x in runs) / len(runs) for name in found}, BOUND)


@pytest.mark.parametrize("kv", ["kept", "all"])
@pytest.mark.parametrize("gradient", ["rows", "keys"])
def test_rows_that_a_threshold_drops_have_no_effect(gradient, kv, monkeypatch):
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    plan = sampled(model, 0.75, gradient, kv)
    plan = replace(plan, policy="threshold", layers=tuple(replace(x, threshold=0.5) for x in plan.layers))
    assert_equal_engines(model, plan, batch(64, supervised_from=56))


@pytest.mark.parametrize("gradient", ["rows", "keys"])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_mean_over_steps_is_the_exact_gradient(engine, gradient, monkeypatch):
    """Through layers too: backward is linear, and layers draw independently. Within three standard errors a tensor."""
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64, num_hidden_layers=2)
    plan, inputs, steps = sampled(model, gradient=gradient, scorer="recent"), batch(64, supervised_from=56), 100
    _, exact, _ = run(model, replace(plan, far_share=1.0), inputs, engine)
    found = []
    with attach(model, plan, engine=engine, self_test=False, unsafe_no_bypass=True):
        for _ in range(steps):
            model.zero_grad(set_to_none=True)
            model(**inputs).loss.backward()
            found.append(gradients(model))
    moved = 0
    for name, wanted in exact.items():
        samples = torch.stack([x[name] for x in found])
        error, deviation = (samples.mean(0) - wanted).norm(), samples.std(0).norm() / steps**0.5
        assert float(error) <= 3 * float(deviation) + 1e-12, name
        moved += float(deviation) > 1e-3 * float(wanted.norm())
    assert moved >= 3


@pytest.mark.parametrize("engine", ENGINES)
def test_steps_draw_anew_and_seeds_repeat(engine):
    model = tiny_model()
    plan, inputs = sampled(model, scorer="recent"), batch(64, supervised_from=56)

    def two_steps(plan):
        found = []
        with attach(model, plan, engine=engine, self_test=False, unsafe_no_bypass=True):
            for _ in range(2):
                model.zero_grad(set_to_none=True)
                model(**inputs).loss.backward()
                found.append(torch.cat([g.flatten() for g in gradients(model).values()]))
        return found

    first, again, other = two_steps(plan), two_steps(plan), two_steps(replace(plan, seed=7))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])


def test_numbers_of_pairs_follow_what_they_are_for():
    options = {"seed": 1, "layer": 2, "step": 3, "key": 4}
    numbers = pair_numbers(16, **options)
    assert numbers.min() >= 0 and len(numbers.unique()) == 256
    assert torch.equal(numbers[:9, :9], pair_numbers(9, **options))
    for name in options:
        assert not (pair_numbers(16, **(options | {name: 9})) == numbers).any()
    draws = torch.stack([pair_numbers(8, seed=0, layer=0, step=n, key=100) for n in range(4000)]).double()
    assert bool(((draws / 2**62).mean(0) - 0.5).abs().max() < 0.025)
    assert float(torch.corrcoef(draws.flatten(1).T).triu(1).abs().max()) < 0.08


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_attention_that_is_not_plain_is_refused(family):
    model = tiny_model(family)
    if family == "mistral":
        model.config.sliding_window = 8
    attached = attach(model, sampled(model), engine="generic", self_test=False, unsafe_no_bypass=True)
    with attached, pytest.raises(UnsupportedModelError, match="far_share"):
        model(**batch(64, supervised_from=56))


@pytest.mark.parametrize("share", [0, -0.5, 1.5, True, "1"])
def test_shares_that_are_none_are_refused(share):
    with pytest.raises(ConfigError, match="far_share"):
        Plan((LayerPlan(),), far_share=share)


def test_pairs_have_no_far_keys():
    with pytest.raises(ConfigError, match="pairs"):
        Plan((LayerPlan(),), gradient="pairs", far_share=0.5)


def test_a_plan_keeps_its_share(tmp_path):
    Plan.uniform(2, far_share=0.25).save(tmp_path)
    assert Plan.load(tmp_path).far_share == 0.25
