"""An adapter that was trained in an extended context takes its RoPE along, wherever it is copied to."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from lemo.cli.main import app
from lemo.config import ModelConfig
from lemo.errors import ConfigError
from lemo.train.lora import CONTEXT_FILE, load_adapter, read_context, save_adapter, write_context
from lemo.train.merge import merge_adapter
from lemo.train.model import load_model
from tests.train.test_merge import lemo, make_adapter
from tests.train.tiny import words

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
    config.update(json.loads((adapter / CONTEXT_FILE).read_text())["config"])
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
    adapter = tmp_path / "adapter"
    assert read_context(adapter) is None and not (adapter / CONTEXT_FILE).exists()
    model = load_adapter(load_model(config, device="cpu"), adapter)
    (adapter / CONTEXT_FILE).write_text("{}")
    (adapter / "lemo.json").write_text('{"context_length": 2, "rope_scaling": "yarn"}')
    save_adapter(model, adapter, config.path)  # over one that had them
    assert not (adapter / CONTEXT_FILE).exists() and not (adapter / "lemo.json").exists()
    for text in ('{"sparse_batches": 2}', "[]"):  # what checkpoints and others call so stays
        (adapter / "lemo.json").write_text(text)
        write_context(model, adapter)
        assert (adapter / "lemo.json").read_text() == text and read_context(adapter) is None


CUT = '{"context_length": 2, "rope_scaling": "yarn", "config": {}}'


@pytest.mark.parametrize(
    ("name", "text"),
    [(CONTEXT_FILE, text) for text in ("{", "{}", "[]", CUT)] + [("lemo.json", text) for text in ("{", CUT)],
)
def test_a_damaged_file_is_named(tmp_path, name, text):
    config = make_adapter(tmp_path)
    (tmp_path / "adapter" / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"{name}: cannot be read"):
        merge_adapter(config, tmp_path / "adapter", tmp_path / "merged")


@SCALINGS
def test_the_file_of_earlier_versions_is_read(tmp_path, scaling):
    adapter, _, logits = extended(tmp_path, scaling)
    (adapter / CONTEXT_FILE).rename(adapter / "lemo.json")
    done = lemo(adapter, "--out", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    assert torch.allclose(logits_of(tmp_path / "merged"), logits, atol=1e-4)


def logits_of(folder):
    """What plain Transformers computes."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


def make_checkpoint(folder, adapter, text=True):
    """What the Trainer, PEFT and the callbacks leave of a step; `text` is whether it says how the context was made."""
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, folder)
    (folder / "lemo.json").write_text('{"sparse_batches": 2, "dense_batches": 0}')
    if text:
        (folder / "context.json").write_text((adapter / CONTEXT_FILE).read_text())
    return folder


def test_a_checkpoint_is_merged_with_its_context_outside_its_run(tmp_path):
    adapter, config, logits = extended(tmp_path, "linear")
    checkpoint = make_checkpoint(tmp_path / "elsewhere" / "checkpoint-2", adapter)
    done = lemo(checkpoint, "--base", config.path, "--out", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    assert "the context is extended to 1,024 tokens (linear)" in done.stdout
    assert torch.allclose(logits_of(tmp_path / "merged"), logits, atol=1e-4)


@pytest.mark.parametrize("text", [False, True])
def test_a_checkpoint_in_its_run_is_merged_and_measured_with_its_context(tmp_path, monkeypatch, text):
    """The run's recipe knows it too, of checkpoints of versions that did not write it."""
    adapter, _, logits = extended(tmp_path, "linear")
    run = tmp_path / "run"
    checkpoint = make_checkpoint(run / "checkpoints" / "checkpoint-2", adapter, text)
    (tmp_path / "v.txt").write_text(words(200))
    recipe = "model: {{path: {0}/model, dtype: float32{1}}}\ndata: {{validation: [{0}/v.txt], window_tokens: 128}}\n"
    (run / "recipe.yaml").write_text(recipe.format(tmp_path, ", context_length: 1024, rope_scaling: linear"))
    (tmp_path / "plain.yaml").write_text(recipe.format(tmp_path, ""))
    monkeypatch.chdir(checkpoint.parent)
    done = lemo("checkpoint-2", "--out", tmp_path / "merged")
    assert done.exit_code == 0 and "validation text" in done.stdout, done.output
    assert torch.allclose(logits_of(tmp_path / "merged"), logits, atol=1e-4)

    def nats(*arguments):
        name = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        done = CliRunner().invoke(app, ["eval", *map(str, arguments), "--output", str(name)])
        assert done.exit_code == 0, done.output
        return json.loads(name.read_text())["dense"]["nats"]

    # The merged model's folder has the RoPE in its configuration.
    merged = nats(tmp_path / "plain.yaml", f"model.path={tmp_path}/merged")
    assert nats(run, "--adapter", checkpoint) == pytest.approx(merged, abs=1e-5)
    if text:
        other = CliRunner().invoke(app, ["eval", str(tmp_path / "plain.yaml"), "--adapter", str(checkpoint)])
        assert other.exit_code == 2 and "model.rope_scaling=linear" in other.stderr


def test_the_file_is_written_for_any_folder(tmp_path):
    """With an adapter around the model and without."""
    _, config, _ = extended(tmp_path, "linear")
    model = load_model(config, device="cpu")
    (tmp_path / "a").mkdir()
    write_context(model, tmp_path / "a")
    (tmp_path / "b").mkdir()
    write_context(load_adapter(model, tmp_path / "adapter"), tmp_path / "b")
    assert read_context(tmp_path / "a") == read_context(tmp_path / "b") == read_context(tmp_path / "adapter")
    assert read_context(tmp_path / "a")["context_length"] == 1024
