"""What the fused engine remembers of a layer: whatever changes between two steps, it computes what a new one would."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lemo import attach
from lemo.errors import UnsupportedModelError
from lemo.runtime.fused import factors, parts
from lemo.runtime.model import causal_model, decoder_layers
from tests.runtime.oracle import batch, fill_adapters, gradients, tiny_model
from tests.runtime.test_exact import in_double
from tests.runtime.test_fused import plan_of, run

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


def adapted(dtype=torch.float64):
    """A model with two adapters that matter."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(dtype=dtype), LoraConfig(r=3, target_modules=TARGETS, lora_alpha=7))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], lora_alpha=5))
    fill_adapters(model)
    return model


def _first(model):
    return decoder_layers(causal_model(model))[0]


@torch.no_grad()
def _step(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.sub_(0.1)


def _new_factor(model):
    holder = _first(model).self_attn.q_proj.lora_A["default"]
    holder.weight = nn.Parameter(holder.weight.detach() * 2)


def _new_storage(model):
    weight = _first(model).self_attn.k_proj.weight
    weight.data = weight.data * 1.5


def _rescale(model):
    _first(model).self_attn.q_proj.scaling["default"] = 0.7


def _freeze(model):
    _first(model).self_attn.o_proj.lora_A["default"].weight.requires_grad_(False)


def _unfreeze(model):
    _first(model).input_layernorm.weight.requires_grad_(True)


def _replace(model):
    layer = _first(model)
    made = nn.Linear(layer.mlp.gate_proj.in_features, layer.mlp.gate_proj.out_features, bias=False, dtype=torch.float64)
    layer.mlp.gate_proj = made.requires_grad_(False)


def _switch(model):
    model.set_adapter("other")


def _switch_off(model):
    model.base_model.disable_adapter_layers()


def _merge(model):
    _first(model).self_attn.v_proj.merge()


CHANGES = [_step, _new_factor, _new_storage, _rescale, _freeze, _unfreeze, _replace, _switch, _switch_off, _merge]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_changes_between_steps_are_seen(change, monkeypatch):
    """Loss and gradients after a change are bit for bit those of an engine that never saw the model before it."""
    in_double(monkeypatch)
    model, inputs = adapted(), batch(48)
    plan = plan_of(model, "skip", dense=(0, 1, 2, 3))
    with attach(model, plan, engine="fused", self_test=False):
        loss = model(**inputs).loss
        before = float(loss.detach())
        if loss.requires_grad:
            loss.backward()
        torch.manual_seed(1)
        change(model)
        model.zero_grad(set_to_none=True)
        loss = model(**inputs).loss
        if loss.requires_grad:
            loss.backward()
        got = gradients(model)
    if change is _switch_off:
        with attach(model, plan, engine="fused", self_test=False):
            assert torch.equal(model(**inputs).loss, loss)
        assert float(loss) != before
        return
    wanted_loss, wanted, _ = run(model, plan, inputs, "fused")
    assert torch.equal(loss.detach(), wanted_loss)
    assert got.keys() == wanted.keys() and all(torch.equal(got[n], g) for n, g in wanted.items())
    if change not in (_freeze, _unfreeze, _merge):
        assert abs(float(loss.detach()) - before) > 1e-12


def test_a_hook_on_a_map_is_seen(monkeypatch):
    """It would not run: the layer is refused."""
    in_double(monkeypatch)
    model, inputs = adapted(), batch(48)
    with attach(model, plan_of(model, "skip"), engine="fused", self_test=False):
        model(**inputs).loss.backward()
        _first(model).mlp.up_proj.register_forward_hook(lambda *_: None)
        with pytest.raises(UnsupportedModelError, match=r"mlp\.up_proj has a forward hook"):
            model(**inputs)


def _drop(model):
    _first(model).self_attn.attention_dropout = 0.5
    return "dropout is active"


def _norm_in_another_dtype(model):
    _first(model).post_attention_layernorm.to(torch.bfloat16)
    return "post_attention_layernorm: torch.bfloat16 beside"


def _norm_by_other_means(model):
    norm = _first(model).input_layernorm
    weight = norm.weight.detach().to(torch.bfloat16)
    del norm.weight
    norm.weight = weight
    return "input_layernorm: torch.bfloat16 beside"


def _hook(model):
    _first(model).mlp.up_proj.register_forward_pre_hook(lambda *_: None)
    return "up_proj has a forward pre-hook"


def _second_adapter(model):
    model.base_model.set_adapter(["default", "other"])
    return "several active adapters"


def _new_layer(model):
    layers = decoder_layers(causal_model(model))
    layers[1].self_attn.attention_dropout = 0.5
    layers[0] = layers[1]
    return "dropout is active"


REFUSED = [_drop, _norm_in_another_dtype, _norm_by_other_means, _hook, _second_adapter, _new_layer]


@pytest.mark.parametrize("change", REFUSED, ids=lambda f: f.__name__.strip("_"))
def test_what_the_engine_cannot_run_is_seen_between_steps(change, monkeypatch):
    in_double(monkeypatch)
    model, inputs = adapted(), batch(48)
    with attach(model, plan_of(model, "skip"), engine="fused", self_test=False) as handle:
        model(**inputs).loss.backward()
        assert handle.fused_layers() == {0, 1, 2, 3}
        with pytest.raises(UnsupportedModelError, match=change(model)):
            model(**inputs)


def test_autocast_is_seen_between_steps(monkeypatch):
    in_double(monkeypatch)
    model = adapted()
    with attach(model, plan_of(model, "skip"), engine="fused", self_test=False) as handle:
        assert handle.fused_layers() == {0, 1, 2, 3}
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(UnsupportedModelError, match="autocast over"):
            handle.fused_layers()
        assert handle.fused_layers() == {0, 1, 2, 3}


def test_layers_are_asked_once_while_nothing_changes(monkeypatch):
    in_double(monkeypatch)
    model, inputs, asked = adapted(), batch(48), []
    inner = parts.LayerReader.why_not
    monkeypatch.setattr(parts.LayerReader, "why_not", lambda *a: asked.append(a) or inner(*a))
    with attach(model, plan_of(model, "skip"), engine="fused", self_test=False):
        for _ in range(3):
            model(**inputs).loss.backward()
            _step(model)
    assert len(asked) == 4


def test_backward_uses_the_factors_of_its_forward(monkeypatch):
    """Parameters that change between forward and backward do not mix two models in one gradient."""
    in_double(monkeypatch)
    model, inputs = adapted(), batch(48)
    plan = plan_of(model, "skip")
    wanted = run(model, plan, inputs, "fused")[1]
    model.zero_grad(set_to_none=True)
    with attach(model, plan, engine="fused", self_test=False):
        loss = model(**inputs).loss
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.add_(1.0)
        loss.backward()
        got = gradients(model)
    assert all(torch.equal(got[name], gradient) for name, gradient in wanted.items())


def test_factors_of_shards_are_made_in_the_layers_call(monkeypatch):
    """Where adapters are shards before the call, each layer is prepared alone, and the numbers are the same."""
    in_double(monkeypatch)
    model, inputs = adapted(), batch(48)
    plan, seen = plan_of(model, "skip"), []
    wanted = run(model, plan, inputs, "fused")
    inner = factors.AdapterFactors.prepare

    def prepare(self, layers):
        layers = list(layers)
        seen.append(len(layers))
        inner(self, layers)

    monkeypatch.setattr(factors.AdapterFactors, "prepare", prepare)
    run(model, plan, inputs, "fused")
    assert seen == [1, 2, 1]
    monkeypatch.setattr("lemo.runtime.fused.parts.LayerReader.is_whole", lambda self: False)
    got = run(model, plan, inputs, "fused")
    assert seen == [1, 2, 1, 1, 1, 1, 1]
    assert torch.equal(got[0], wanted[0]) and all(torch.equal(got[1][n], g) for n, g in wanted[1].items())


def test_layers_that_are_compiled_one_by_one():
    """The fused engine stays outside of what the compiler sees; loss and gradients are the same numbers."""
    model, inputs = tiny_model(), batch(48)
    plan = replace(plan_of(model, "exact keys"), scorer="recent")
    with attach(model, plan, engine="fused", self_test=False):
        for layer in model.model.layers:
            layer.compile(backend="eager")
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            loss = model(**inputs).loss
            loss.backward()
    wanted_loss, wanted, _ = run(tiny_model(), plan, inputs, "fused")
    got = gradients(model)
    assert torch.equal(loss, wanted_loss) and all(torch.equal(got[name], x) for name, x in wanted.items())
