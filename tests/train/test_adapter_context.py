"""An adapter that was trained in an extended context takes its RoPE along, wherever it is copied to."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lemo.config import ModelConfig
from lemo.errors import ConfigError
from lemo.train.lora import load_adapter, read_context, save_adapter
from lemo.train.merge import merge_adapter
from lemo.train.model import load_model
from tests.train.test_merge import lemo, make_adapter

IDS = torch.arange(3, 203)[None]
SCALINGS = pytest.mark.parametrize("scaling", ["linear", "yarn"])


def extended(folder, scaling, length=1024):
    """Folder of an extended adapter outside its run, its ModelConfig, and the logits that it was trained to give."""
    config = make_adapter(folder, model={"context_length": length, "rope_scaling": scaling})
    (folder / "elsewhere").mkdir()
    shutil.copytree(folder / "adapter", folder / "elsewhere" / "ad")
    with torch.no_grad():
        logits = load_adapter(load_model(config, device="cpu"), folder / "adapter").eval()(IDS).logits
    return folder / "elsewhere" / "ad", config, logits


@SCALINGS
def test_a_copied_adapter_is_merged_with_its_context(tmp_path, scaling):
    adapter, _, logits = extended(tmp_path, scaling)
    done = lemo(adapter, "--out", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    assert f"the context is extended to 1,024 tokens ({scaling}), as the adapter was trained" in done.stdout
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.max_position_embeddings == 1024
    assert merged.config.rope_parameters["rope_type"] == scaling
    with torch.no_grad():
        assert torch.allclose(merged(IDS).logits, logits, atol=1e-4)


@SCALINGS
def test_plain_peft_needs_the_two_lines_of_the_guide(tmp_path, scaling):
    from peft import PeftModel

    adapter, _, logits = extended(tmp_path, scaling)
    config = AutoConfig.from_pretrained(tmp_path / "model")
    config.update(json.loads((adapter / "lemo.json").read_text())["config"])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", config=config, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(base, str(adapter)).eval()(IDS).logits, logits)


@SCALINGS
def test_another_context_is_refused(tmp_path, scaling):
    adapter, config, _ = extended(tmp_path, scaling)
    plain = ModelConfig(config.path, dtype="float32")
    with pytest.raises(ConfigError, match=rf"model\.context_length=1024 and model\.rope_scaling={scaling}"):
        load_adapter(load_model(plain, device="cpu"), adapter)
    longer = ModelConfig(config.path, dtype="float32", context_length=2048, rope_scaling=scaling)
    with pytest.raises(ConfigError, match="trained in another context than the model has"):
        merge_adapter(longer, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@SCALINGS
def test_a_base_model_that_is_extended_already_is_taken_as_it_is(tmp_path, scaling):
    adapter, config, logits = extended(tmp_path, scaling)
    load_model(config, device="cpu").save_pretrained(tmp_path / "longer")
    report = merge_adapter(ModelConfig(str(tmp_path / "longer"), dtype="float32"), adapter, tmp_path / "merged")
    assert not any("extended" in note for note in report.notes)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert torch.allclose(merged(IDS).logits, logits, atol=1e-4)


def test_adapters_without_an_extension_have_no_such_file(tmp_path):
    config = make_adapter(tmp_path)
    assert read_context(tmp_path / "adapter") is None and not (tmp_path / "adapter" / "lemo.json").exists()
    model = load_adapter(load_model(config, device="cpu"), tmp_path / "adapter")
    (tmp_path / "adapter" / "lemo.json").write_text("{}")
    save_adapter(model, tmp_path / "adapter", config.path)  # over one that had it
    assert not (tmp_path / "adapter" / "lemo.json").exists()


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"context_length": 2, "rope_scaling": "yarn", "config": {}}'])
def test_a_damaged_file_is_named(tmp_path, text):
    config = make_adapter(tmp_path)
    (tmp_path / "adapter" / "lemo.json").write_text(text)
    with pytest.raises(ConfigError, match=r"lemo\.json: cannot be read"):
        merge_adapter(config, tmp_path / "adapter", tmp_path / "merged")
