"""Loading: context extension does what its name says, errors name the key, adapters have the model's dtype."""

from __future__ import annotations

import pytest
import torch

from lemo.config import LoraConfig, ModelConfig
from lemo.errors import ConfigError
from lemo.train.lora import add_adapter, load_adapter, save_adapter, trainable_parameters
from lemo.train.model import load_model, load_tokenizer, resolve_path
from tests.train.tiny import save_tiny_model, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), layers=2))


def rope_of(model, positions):
    cos, sin = model.model.rotary_emb(torch.zeros(1, 1), torch.tensor([positions]).float())
    return cos, sin


def test_dtype_and_attention_are_as_asked_and_nothing_is_cached(folder):
    model = load_model(ModelConfig(path=folder, dtype="bfloat16", attention="eager"), device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert model.config.use_cache is False


def test_linear_extension_stretches_positions(folder):
    plain = load_model(ModelConfig(path=folder, dtype="float32"), device="cpu")
    longer = load_model(
        ModelConfig(path=folder, dtype="float32", context_length=1024, rope_scaling="linear"), device="cpu"
    )
    assert longer.config.max_position_embeddings == 1024
    for old, new in zip(rope_of(plain, [0, 3, 7]), rope_of(longer, [0, 6, 14]), strict=True):
        torch.testing.assert_close(old, new)


def test_yarn_keeps_fast_frequencies_and_stretches_slow_ones(folder):
    plain = load_model(ModelConfig(path=folder, dtype="float32"), device="cpu").model.rotary_emb.inv_freq
    model = load_model(
        ModelConfig(path=folder, dtype="float32", context_length=2048, rope_scaling="yarn"), device="cpu"
    )
    yarn = model.model.rotary_emb.inv_freq
    assert model.config.rope_parameters["original_max_position_embeddings"] == 512
    torch.testing.assert_close(yarn[0], plain[0])
    assert float(plain[-1] / yarn[-1]) == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"context_length": 1024}, "exceeds the model's own 512: set model.rope_scaling"),
        ({"rope_scaling": "linear"}, "model.rope_scaling is linear, but model.context_length"),
        ({"context_length": 512, "rope_scaling": "yarn"}, "does not exceed the model's own 512"),
        ({"gguf_file": "x.gguf"}, "has no file x.gguf"),
    ],
)
def test_contradictions_are_named(folder, wrong, message):
    with pytest.raises(ConfigError, match=message):
        load_model(ModelConfig(path=folder, **wrong))


def test_windows_longer_than_the_context_are_refused(folder):
    with pytest.raises(ConfigError, match=r"data.window_tokens \(600\) exceeds the model's context of 512"):
        load_model(ModelConfig(path=folder), window_tokens=600)


def test_models_whose_positions_cannot_be_extended(tmp_path):
    from transformers import OPTConfig

    OPTConfig(max_position_embeddings=64).save_pretrained(tmp_path / "opt")
    with pytest.raises(ConfigError, match="opt has no RoPE"):
        load_model(ModelConfig(path=str(tmp_path / "opt"), context_length=128, rope_scaling="linear"))
    scaled = tiny_llama(layers=1).config
    scaled.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    scaled.save_pretrained(tmp_path / "scaled")
    with pytest.raises(ConfigError, match=r"scaled already \(linear\)"):
        load_model(ModelConfig(path=str(tmp_path / "scaled"), context_length=1024, rope_scaling="linear"))


def test_missing_models_are_named(tmp_path):
    with pytest.raises(ConfigError, match="there is no folder"):
        load_model(ModelConfig(path=str(tmp_path / "absent")))
    with pytest.raises(ConfigError, match="package 'no_such_package'"):
        load_model(ModelConfig(path="package:no_such_package"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no model can be read from"):
        load_model(ModelConfig(path=str(tmp_path / "empty")))
    (tmp_path / "empty" / "weights.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"model.gguf_file is not set.*weights.gguf"):
        load_model(ModelConfig(path=str(tmp_path / "empty")))
    with pytest.raises(ConfigError, match="no tokenizer can be read"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "empty"), gguf_file="weights.gguf"))


def test_a_package_stands_for_its_folder():
    import safetensors

    assert resolve_path("package:safetensors") == next(iter(safetensors.__path__))


def test_adapter_has_the_dtype_of_the_model_and_loads_without_lemo(folder, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    model = add_adapter(load_model(ModelConfig(path=folder), device="cpu"), LoraConfig(rank=2))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.bfloat16}
    assert all("lora_" in name for name in trained)
    # Seven linears in each of two layers: rank · (in + out).
    assert trainable_parameters(model) == 2 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    for parameter in trained.values():
        torch.nn.init.normal_(parameter)
    save_adapter(model, tmp_path / "adapter", folder)
    ids = torch.randint(3, 200, (1, 20))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter"), autocast_adapter_dtype=False)
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "adapter")).base_model_name_or_path == folder
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    ours = load_adapter(load_model(ModelConfig(path=folder), device="cpu"), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, model(ids).logits)


def test_adapter_errors_name_the_key(folder, tmp_path):
    model = load_model(ModelConfig(path=folder), device="cpu")
    with pytest.raises(ConfigError, match=r"lora\.targets"):
        add_adapter(model, LoraConfig(targets=("no_such_module",)))
    with pytest.raises(ConfigError, match=r"adapter_config\.json is missing"):
        load_adapter(model, tmp_path)
