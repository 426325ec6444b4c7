"""Base weights of 4 bits: each engine gives what it gives for the weights that the numbers stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lemo import attach
from lemo.errors import UnsupportedModelError
from lemo.runtime.fused.linear import Packed
from lemo.train.four_bits import is_packed, match_dtype, pack_linear
from tests.runtime.oracle import batch, fill_adapters, tiny_model
from tests.runtime.test_fused import plan_of, run

BUDGET = 2e-5  # of fp32, over the norm of all gradients; the engines sum in another order


def adapted(model):
    """With LoRA on all linear maps, in the dtype of the weights."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", lora_alpha=8)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    match_dtype(model)
    fill_adapters(model)
    return model


def pair(family="llama", dtype=torch.float32, device="cpu"):
    """A model in 4 bits, and the same one with plain maps of the weights that its numbers stand for."""
    packed, plain = (tiny_model(family, dtype=dtype).requires_grad_(False).to(device) for _ in range(2))
    pack_linear(packed)
    for name, module in list(packed.named_modules()):
        found = Packed.of(getattr(module, "weight", None))
        if found is not None:
            plain.get_submodule(name).weight.data = found.unpack(module.weight)
    packed, plain = adapted(packed), adapted(plain)
    factors = {n: p for n, p in packed.named_parameters() if "lora_" in n}
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(factors[name])
    return packed, plain


def assert_close(got, wanted, budget):
    """Loss and gradients of two runs."""
    assert got[1].keys() == wanted[1].keys() and got[1]
    scale = torch.stack([g.double().norm() for g in wanted[1].values()]).norm()
    for name, gradient in wanted[1].items():
        assert float((got[1][name].double() - gradient.double()).norm() / scale) <= budget, name
    assert abs(float(got[0] - wanted[0])) <= budget * abs(float(wanted[0]))


@pytest.mark.parametrize("recompute", ["none", "lin"])
@pytest.mark.parametrize(("mode", "kv"), [("skip", "kept"), ("exact keys", "all"), ("exact rows", "all")])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "opt"])
def test_engines_unpack(family, mode, kv, recompute):
    """Bit for bit what the fused engine gives for the unpacked weights; the generic executor is as close as ever."""
    packed, plain = pair(family)
    assert is_packed(packed) and not is_packed(plain)
    assert any(type(module).__module__ == "peft.tuners.lora.bnb" for module in packed.modules())
    plan, inputs = plan_of(packed, mode, kv), batch(48)
    fused = run(packed, plan, inputs, "fused", recompute=recompute)
    assert_close(fused, run(plain, plan, inputs, "fused", recompute=recompute), 0.0)
    assert_close(run(packed, plan, inputs, "generic"), fused, BUDGET)


def test_joined_map_is_unpacked(monkeypatch):
    """Where the map out of the MLP is one product with its adapter, its weight is copied out of the numbers."""
    monkeypatch.setattr("lemo.runtime.fused.joined.pays", lambda rows, inputs: True)
    packed, plain = pair()
    plan, inputs = plan_of(packed, "exact keys", "all"), batch(48)
    assert_close(run(packed, plan, inputs, "fused"), run(plain, plan, inputs, "fused"), 0.0)


def test_keep_all_is_dense():
    """Without a plan that skips, the loss is that of PEFT over bitsandbytes."""
    packed, _ = pair()
    inputs = batch(48)
    with torch.no_grad():
        dense = packed(**inputs).loss
    packed.train()
    loss, _, _ = run(packed, plan_of(packed, "exact keys", "all"), inputs, "fused")
    assert float(loss) == pytest.approx(float(dense), rel=1e-5)


def test_bf16_weights_and_adapters():
    """An adapter over 4 bits has the dtype that maps are computed in, and the fused engine takes it."""
    packed, plain = pair(dtype=torch.bfloat16)
    assert {p.dtype for n, p in packed.named_parameters() if "lora_" in n} == {torch.bfloat16}
    plan, inputs = plan_of(packed, "exact keys", "all"), batch(48)
    assert_close(run(packed, plan, inputs, "fused"), run(plain, plan, inputs, "fused"), 0.0)


def test_only_what_is_understood_is_fused():
    """Numbers computed in another dtype, or packed anew for inference, are left to the generic executor."""
    for change, reason in (
        (lambda m: setattr(m, "compute_dtype", torch.bfloat16), "computed in"),
        (lambda m: setattr(m.weight.quant_state, "packing_format_for_cpu", True), "packed anew"),
    ):
        model = tiny_model().requires_grad_(False)
        pack_linear(model)
        change(model.model.layers[0].self_attn.q_proj)
        model = adapted(model)
        plan = plan_of(model, "exact keys", "all")
        with (
            attach(model, plan, engine="fused", self_test=False, unsafe_no_bypass=True),
            pytest.raises(UnsupportedModelError, match=reason),
        ):
            model(**batch(48))


def test_head_and_embeddings_stay():
    """The map before the logits is not packed."""
    model = tiny_model().requires_grad_(False)
    head = model.get_output_embeddings()
    pack_linear(model)
    assert model.get_output_embeddings() is head and type(head) is nn.Linear
    assert sum(type(m).__name__ == "Linear4bit" for m in model.modules()) == 7 * model.config.num_hidden_layers
