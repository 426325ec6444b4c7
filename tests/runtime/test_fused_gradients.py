"""Gradients where a backward meets what its forward did not promise: no labels, other weights, a second derivative."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lemo import attach
from lemo.runtime.model import causal_model, decoder_layers
from tests.runtime.oracle import batch, fill_adapters, gradients, tiny_model
from tests.runtime.test_exact import in_double
from tests.runtime.test_fused import MODES, plan_of, run


def adapted(family="llama"):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(family, dtype=torch.float64), LoraConfig(r=3, target_modules="all-linear"))
    fill_adapters(model)
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [adapted, lambda: tiny_model(dtype=torch.float64)], ids=["adapters", "all"])
def test_a_batch_without_labels_gives_zeros(make, mode, monkeypatch):
    """The same parameters get a gradient as in the generic executor: ranks that share gradients count on it."""
    in_double(monkeypatch)
    model = make()
    plan, inputs = plan_of(model, mode), batch(48, 2, supervised_from=48)
    wanted, got = (run(model, plan, inputs, engine)[1] for engine in ("generic", "fused"))
    assert got.keys() == wanted.keys()
    assert not any(bool(gradient.any()) for gradient in (*wanted.values(), *got.values()))


PLACES = ["input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"]


@pytest.mark.parametrize("engine", ["generic", "fused"])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_weights_changed_before_backward_are_noticed(place, trained, engine, monkeypatch):
    """As autograd does for what it saves: backward would mix two models."""
    in_double(monkeypatch)
    model, inputs = tiny_model(dtype=torch.float64), batch(48)
    weight = decoder_layers(model)[1].get_submodule(place).weight
    weight.requires_grad_(trained)
    with attach(model, plan_of(model, "skip"), engine=engine, self_test=False):
        loss = model(**inputs).loss
        with torch.no_grad():
            weight.mul_(1.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        model.zero_grad(set_to_none=True)
        model(**inputs).loss.backward()


def test_adapters_may_change_before_backward(monkeypatch):
    """Backward has the factors of its forward."""
    in_double(monkeypatch)
    model, inputs = adapted(), batch(48)
    plan = plan_of(model, "skip")
    wanted = run(model, plan, inputs, "fused")[1]
    model.zero_grad(set_to_none=True)
    with attach(model, plan, engine="fused", self_test=False):
        loss = model(**inputs).loss
        with torch.no_grad():
            for name, parameter in causal_model(model).named_parameters():
                if "lora_" in name:
                    parameter.add_(1.0)
        loss.backward()
    got = gradients(model)
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], gradient) for name, gradient in wanted.items())


@pytest.mark.parametrize("engine", ["generic", "fused"])
def test_a_second_derivative_is_refused_by_the_loss(engine):
    model, inputs = tiny_model(), batch(48)
    with attach(model, plan_of(model, "skip"), engine=engine, self_test=False):
        loss = model(**inputs).loss
        with pytest.raises(RuntimeError, match=r"linear_ce has no second derivative.*create_graph=True"):
            torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
