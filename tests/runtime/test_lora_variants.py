"""DoRA runs in the generic executor, exactly, and the fused engine refuses it; that one scales rsLoRA as PEFT does."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, XLoraConfig, get_peft_model

from lemo import attach
from lemo.core.plan import Plan
from lemo.errors import UnsupportedModelError
from lemo.runtime.model import decoder_layers
from tests.runtime.oracle import batch, tiny_model
from tests.runtime.test_exact import BOUND, error, exact_plan, in_double
from tests.runtime.test_fused import assert_equal_engines, plan_of
from tests.runtime.test_laws import assert_subset_is_masked, run, sparse_plan

FAMILIES = ["llama", "opt", "gpt2", "phi3"]


def adapted(family: str = "llama", dtype: torch.dtype = torch.float32, **settings):
    """A model inside PEFT's, with adapters and, under DoRA, lengths that matter."""
    model = get_peft_model(tiny_model(family, dtype=dtype), LoraConfig(r=4, target_modules="all-linear", **settings))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.get_base_model().train()


@pytest.mark.parametrize("family", FAMILIES)
def test_dora_with_all_rows_is_peft_bit_for_bit(family):
    """Loss and gradients, lengths included, are those of the dense PEFT model."""
    model, inputs = adapted(family, use_dora=True), batch(rows=2)
    wanted_loss, wanted = run(model, inputs)
    with attach(model, Plan.uniform(model, backward_ratio=0.99, block_size=4), loss="model") as handle:
        loss, got = run(model, inputs)
        assert len(handle.selections) == len(decoder_layers(model)), "its layers are the generated ones"
    assert torch.equal(loss, wanted_loss) and got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert sum("magnitude" in name for name in wanted) > 0


@pytest.mark.parametrize("kv", ["kept", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dora_on_a_subset_is_the_masked_reference(family, kv):
    """As of plain LoRA: rows that skip take no part, forward and backward."""
    assert_subset_is_masked(adapted(family, use_dora=True), kv)


@pytest.mark.parametrize("gradient", ["rows", "pairs", "keys"])
def test_dora_under_exact_forward_is_the_stop_gradient_reference(gradient, monkeypatch):
    """Rows that run and pass no gradient, in fp64."""
    in_double(monkeypatch)
    model = adapted(dtype=torch.float64, use_dora=True)
    assert error(model, exact_plan(model, 1.0, gradient, "all")) <= BOUND


def test_the_fused_engine_refuses_dora_with_the_reason():
    """Under `auto` that is the reason that is noted on a GPU, and Transformers' own layers run."""
    model = adapted(use_dora=True)
    plan = Plan.uniform(model, backward_ratio=0.5, block_size=4)
    reason = r"self_attn\.q_proj: a LoRA variant such as DoRA"
    with (
        pytest.raises(UnsupportedModelError, match=rf"engine 'fused' cannot run layer 0: {reason}"),
        attach(model, plan, engine="fused", self_test=False) as handle,
    ):
        handle.fused_layers()
    with attach(model, plan, engine="auto", self_test=False) as handle:
        assert handle.fused_layers() == frozenset()
        assert handle._fused._ask(list(decoder_layers(model))) == frozenset()  # what `layers` asks on a GPU
        assert re.fullmatch(rf"layers run in the generic engine \(first: layer 0\): {reason}", handle.notes[0])


@pytest.mark.parametrize("mode", ["skip", "exact keys"])
@pytest.mark.parametrize("family", ["llama", "opt", "phi3"])
def test_the_fused_engine_scales_by_the_root_of_the_rank(family, mode, monkeypatch):
    """rsLoRA: fused is generic, and neither is what plain LoRA with the same factors gives."""
    in_double(monkeypatch)
    model, plain = (adapted(family, torch.float64, lora_alpha=7, use_rslora=on) for on in (True, False))
    kv = "all" if mode == "exact keys" else "kept"
    assert_equal_engines(model, plan_of(model, mode, kv), batch(48))
    first, second = (float(run(m, batch(48))[0]) for m in (model, plain))
    assert first != pytest.approx(second, rel=1e-3)


def test_a_reason_is_noted_once():
    """Not once for each layer that has it: `auto` names the first."""
    model = adapted(use_dora=True)
    with attach(model, sparse_plan(model), engine="auto", unsafe_no_bypass=True) as handle:
        assert handle._fused._ask(list(decoder_layers(model))) == frozenset()
        found = [note for note in handle.notes if "DoRA" in note]
    assert len(found) == 1 and "(first: layer 0)" in found[0]


def test_activated_lora_is_refused_when_a_plan_is_attached():
    """Its offsets count from the end of the sequence, of which layers get some rows."""
    model = adapted(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 7])
    with pytest.raises(UnsupportedModelError, match=r"'default' is an activated LoRA \(alora_invocation_tokens\)"):
        attach(model, sparse_plan(model), unsafe_no_bypass=True)
    assert "_lemo_handle" not in model.__dict__


def test_activated_lora_is_refused_where_it_is_in_force():
    """Beside a plain adapter it does no harm; in force it is refused in training, and an evaluation forward runs."""
    plain, activated = (
        LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=tokens)
        for tokens in (None, [5, 7])
    )
    model = get_peft_model(tiny_model(), plain)
    model.add_adapter("late", activated)
    with attach(model, sparse_plan(model), unsafe_no_bypass=True):
        model(**batch()).loss.backward()
        model.set_adapter("late")
        with pytest.raises(UnsupportedModelError, match="'late' is an activated LoRA"):
            model(**batch())
        with model.disable_adapter():
            assert torch.isfinite(model(**batch()).loss)
        with torch.no_grad():
            assert torch.isfinite(model.eval()(**batch()).loss)


def test_x_lora_is_refused(tmp_path):
    """It brings a weight for every token of the batch."""
    get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    base = tiny_model(use_cache=False)
    settings = {"hidden_size": base.config.hidden_size, "adapters": {"0": str(tmp_path)}}
    model = get_peft_model(base, XLoraConfig(task_type="CAUSAL_LM", **settings))
    with pytest.raises(UnsupportedModelError, match="'default' is an X-LoRA"):
        attach(model, sparse_plan(model), unsafe_no_bypass=True)
