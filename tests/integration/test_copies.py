"""Adapters, checkpoints and copies of an attached model: all are what they would be without lemo."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lemo.runtime.attach import attach
from tests.integration.checks import INPUTS, assert_equal, is_plain, run
from tests.integration.plans import exact, keep_all, skipping
from tests.runtime.oracle import tiny_model

# PEFT


def test_lora_before_or_after_attach_gives_equal_gradients():
    def adapters(model):
        torch.manual_seed(7)
        targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
        return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))

    for plan in (skipping, exact):
        before = adapters(tiny_model())
        attach(before, plan(before.get_base_model()))
        after = tiny_model()
        attach(after, plan(after))
        assert_equal(run(adapters(after)), run(before))


@pytest.mark.parametrize("kind", ["dora", "several", "modules_to_save"])
def test_other_adapters_go_through_the_generic_layer(kind):
    """What is not plain LoRA on a plain linear map: keep-all is bit-equal, selection trains what PEFT trains."""
    changes = {"dora": {"use_dora": True}, "several": {}, "modules_to_save": {"modules_to_save": ["lm_head"]}}[kind]
    torch.manual_seed(7)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **changes)
    model = get_peft_model(tiny_model(), config)
    if kind == "several":
        model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
    wanted = run(model)
    with attach(model, keep_all(model.get_base_model()), loss="model"):
        assert_equal(run(model), wanted)
    for loss in ("model", "segmented"):
        with attach(model, skipping(model.get_base_model()), loss=loss):
            assert run(model)[1].keys() == wanted[1].keys()


def test_adapters_saved_while_attached_load_without_lemo(tmp_path):
    """Same files, same keys, same bits as without lemo; the loaded model is plain."""
    torch.manual_seed(7)
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    wanted = model.eval()(**INPUTS).logits
    model.train().save_pretrained(tmp_path / "plain")
    with attach(model, skipping(model.get_base_model()), self_test=False):
        run(model)
        model.save_pretrained(tmp_path / "attached")
    files = {p.name for p in (tmp_path / "plain").iterdir()}
    assert {p.name for p in (tmp_path / "attached").iterdir()} == files
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "attached" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "attached").eval()
    assert is_plain(loaded)
    assert torch.equal(loaded(**INPUTS).logits, wanted)


def test_merging_adapters_while_attached_gives_the_plain_merge():
    def merged(plan):
        torch.manual_seed(7)
        model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
        handle = None if plan is None else attach(model, plan(model.get_base_model()), self_test=False)
        result = model.merge_and_unload()
        if handle is not None:
            handle.detach()
        return result

    got, wanted = merged(skipping), merged(None)
    assert is_plain(got)
    assert torch.equal(got(**INPUTS).logits, wanted(**INPUTS).logits)


# Saving and copying


def test_model_saved_while_attached_is_a_plain_checkpoint(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "plain")
    with attach(model, skipping(model), self_test=False):
        run(model)
        model.save_pretrained(tmp_path / "attached")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "attached" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert "lemo" not in (tmp_path / "attached" / "config.json").read_text()
    assert json.loads((tmp_path / "attached" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "attached").train()
    assert torch.equal(loaded(**INPUTS).logits, model(**INPUTS).logits)


def test_state_dict_keys_are_the_models_own():
    model = tiny_model()
    wanted = list(model.state_dict())
    with attach(model, skipping(model), self_test=False):
        assert list(model.state_dict()) == wanted
        assert list(dict(model.named_modules())) == list(dict(tiny_model().named_modules()))


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
@pytest.mark.parametrize("adapters", [False, True])
def test_a_copy_of_an_attached_model_is_a_plain_model(how, adapters):
    """It runs densely, shares nothing with the handle, can be attached itself; the original stays attached."""
    model = tiny_model()
    if adapters:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    wanted = run(model)
    handle = attach(model, skipping(getattr(model, "get_base_model", lambda: model)()), self_test=False)
    sparse = run(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert is_plain(twin)
    assert_equal(run(twin), wanted)
    assert handle.sparse_batches == 1
    base = getattr(twin, "get_base_model", lambda: twin)()
    assert all(m.config is base.model.config for m in base.modules() if "Attention" in type(m).__name__)
    with attach(twin, skipping(base)) as second:
        assert_equal(run(twin), sparse)
        assert second.sparse_batches == 1
    handle.sparse_batches = 0
    assert_equal(run(model), sparse)
    handle.detach()
