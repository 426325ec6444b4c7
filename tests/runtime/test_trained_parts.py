"""Norms, embeddings and head trained beside LoRA (`modules_to_save`): the fused engine reads and trains the copies."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lemo import attach
from lemo.runtime.fused.final import DeferringNorm
from lemo.runtime.model import causal_model, fingerprint, in_force
from tests.runtime.oracle import batch, gradients, tiny_model
from tests.runtime.test_exact import in_double
from tests.runtime.test_fused import MODES, assert_equal_engines, plan_of, run

NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]


def adapted(family: str = "llama", saved=(*NORMS, "embed_tokens", "lm_head"), model=None):
    """An adapter with trained copies, all moved away from the base model's values."""
    model = tiny_model(family, dtype=torch.float64) if model is None else model
    torch.manual_seed(7)  # PEFT draws the first factors
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], modules_to_save=list(saved))
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return wrapped


@pytest.mark.parametrize("kv", ["kept", "all"])
@pytest.mark.parametrize("mode", MODES)
def test_trained_copies_under_every_mode(mode, kv, monkeypatch):
    """Values and gradients are the generic executor's, and every copy has a gradient."""
    in_double(monkeypatch)
    model = adapted()
    plan, inputs = plan_of(model, mode, kv), batch(48)
    assert_equal_engines(model, plan, inputs)
    got = run(model, plan, inputs, "fused")[1]
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert got.keys() == wanted
    assert len([name for name in got if ".modules_to_save." in name]) == 2 * 4 + 3
    assert all(float(gradient.norm()) > 0 for gradient in got.values())


@pytest.mark.parametrize(("family", "saved"), [("qwen3", ["q_norm", "k_norm", "norm"]), ("starcoder2", ["norm"])])
def test_norms_of_heads_and_layer_norms(family, saved, monkeypatch):
    """Norms over a head, and norms with a bias; PEFT takes a name's end, so `norm` means every norm."""
    in_double(monkeypatch)
    model = tiny_model(family, dtype=torch.float64)
    targets = ["q_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, modules_to_save=saved))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    assert_equal_engines(model, plan_of(model, "skip"), batch(48))


def test_a_trained_map_is_the_copy(monkeypatch):
    """A whole linear map may be trained too."""
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["o_proj", "gate_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    assert_equal_engines(model, plan_of(model, "skip"), batch(48))


def test_switched_off_copies_are_the_base_model(monkeypatch):
    """Inside PEFT's `disable_adapter` the engine reads the original modules."""
    in_double(monkeypatch)
    model, inputs = adapted(), batch(48)
    plan = plan_of(model, "skip", "all")
    bare = tiny_model(dtype=torch.float64)
    with attach(bare, plan, engine="fused", self_test=False):
        wanted = bare(**inputs).loss.detach()
    with attach(model, plan, engine="fused", self_test=False) as handle, model.disable_adapter():
        got = model(**inputs).loss.detach()
        assert handle.fused_layers() == {0, 1, 2, 3}
    assert torch.equal(got, wanted)


def test_adapter_after_attach(monkeypatch):
    """PEFT wraps the norm before the head after lemo did: it still runs once, on loss rows, and detach restores it."""
    in_double(monkeypatch)
    model, inputs = tiny_model(dtype=torch.float64), batch(48)
    plan = plan_of(model, "skip")
    other = adapted()
    with attach(other, plan, engine="fused", self_test=False):
        other(**inputs).loss.backward()
    handle = attach(model, plan, engine="fused", self_test=False)
    wrapped = adapted(model=model)
    wrapped(**inputs).loss.backward()
    got, wanted = gradients(wrapped), gradients(other)
    assert got.keys() == wanted.keys()
    assert all(torch.allclose(got[name], wanted[name], rtol=1e-9, atol=1e-12) for name in wanted)
    assert isinstance(model.model.norm, DeferringNorm)
    handle.detach()
    assert not any(isinstance(module, DeferringNorm) for module in wrapped.modules())


def test_norms_in_another_dtype_go_to_the_generic_executor():
    """A copy in fp32 beside maps in bf16: the plain layer promotes; the fused one does not pretend to."""
    model = adapted(model=tiny_model(dtype=torch.bfloat16), saved=NORMS)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name and "input_layernorm" in name:
            parameter.data = parameter.data.float()
    plan = replace(plan_of(model, "skip"), scorer="random")
    with attach(model, plan, engine="fused", self_test=False) as handle:
        state = causal_model(model).model.layers[0].__dict__["_lemo_layer"]
        reason = state.why_not_fused(causal_model(model).model.layers[0])
        assert reason == "input_layernorm: torch.float32 beside torch.bfloat16 maps"
    assert handle.notes == []


def test_fingerprint_is_the_base_models():
    """What is trained beside the adapter does not make another base model of it."""
    model = tiny_model(dtype=torch.float64)
    before = fingerprint(model)
    trained = adapted(model=copy.deepcopy(model))
    assert fingerprint(trained) == before
    assert in_force(causal_model(trained).model.norm) is not causal_model(trained).model.norm.original_module
