"""`lora.adapter`: what a recipe takes from a saved adapter, and which adapters and keys are refused, each by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lemo.cli.recipe import build_run, dump_recipe, load_recipe
from lemo.config import LoraConfig, ModelConfig
from lemo.errors import ConfigError
from lemo.train.forecast import forecast, probe_step
from lemo.train.lora import add_adapter, check_targets, load_adapter, save_adapter, trainable_parameters
from lemo.train.model import load_model
from lemo.train.start_adapter import KEYS, describe_start, settle
from tests.runtime.oracle import fill_adapters, tiny_model
from tests.train.test_merge import make_adapter
from tests.train.tiny import save_tiny_model

OWN = {"rank": 3, "alpha": 12.0, "targets": ("q_proj", "down_proj"), "modules_to_save": ("norm",), "use_rslora": True}
IDS = torch.arange(3, 35)[None]


@pytest.fixture
def made(tmp_path):
    """ModelConfig of a base model; its adapter lies beside it."""
    return make_adapter(tmp_path, lora=LoraConfig(**OWN, dropout=0.1))


def read(folder, model=None, **lora):
    """The recipe that names the adapter in a folder."""
    values = {"model": {"path": str(folder / "model"), "dtype": "float32", **(model or {})}}
    return build_run({**values, "data": {"window_tokens": 64}, "lora": {"adapter": str(folder / "adapter"), **lora}})


def edit(folder, **changes):
    """Changes what PEFT wrote beside the weights."""
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_keys_that_are_left_out_are_the_adapters(made, tmp_path):
    run = read(tmp_path)
    assert run.lora == LoraConfig(**{**OWN, "targets": ("down_proj", "q_proj")}, dropout=0.1, adapter=run.lora.adapter)
    (tmp_path / "r.yaml").write_text(dump_recipe(run))
    assert load_recipe(tmp_path / "r.yaml").lora == run.lora
    same = read(tmp_path, rank=3, alpha=12, targets=["q_proj", "down_proj"], use_rslora=True, use_dora=False)
    assert set(same.lora.targets) == set(OWN["targets"])
    assert read(tmp_path, dropout=0.0).lora.dropout == 0.0, "dropout is of training, not of the weights"


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"rank": 16},
            r"recipe: lora\.rank is 16, but the adapter in .*adapter \(lora\.adapter\) has 3: leave",
        ),
        ({"alpha": 32.0}, r"lora\.alpha is 32, but .* has 12:"),
        ({"use_dora": True}, r"lora\.use_dora is true, but .* has false"),
        ({"use_rslora": False}, r"lora\.use_rslora is false, but .* has true"),
        ({"targets": ["q_proj"]}, r"lora\.targets is \[q_proj\], but .* has \[down_proj, q_proj\]"),
        ({"modules_to_save": []}, r"lora\.modules_to_save is \[\], but .* has \[norm\]"),
        ({"rank": 2, "alpha": 1.0}, r"lora\.rank is 2 and lora\.alpha is 1, but .* has 3 and 12: leave the keys out"),
        ({"init_lora_weights": "gaussian"}, r"lora\.init_lora_weights is of a new adapter"),
        ({"adapter": ""}, r"lora\.adapter is empty"),
        ({"adapter": "no/such"}, r"lora\.adapter: no/such is no adapter, adapter_config\.json is missing$"),
    ],
)
def test_keys_that_say_something_else_are_named_with_both_values(made, tmp_path, lora, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **lora)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "is a LOHA adapter; only LoRA"),
        ({"task_type": "SEQ_CLS"}, "is a SEQ_CLS adapter; only LoRA of causal language models"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4, which changed the base model"),
        ({"bias": "all"}, "has bias=all, which lemo does not train"),
        ({"r": "many"}, r"adapter_config\.json cannot be read \(invalid literal"),
        ({"alora_invocation_tokens": [1, 2]}, r"has alora_invocation_tokens=\[1, 2\], which lemo does not train"),
    ],
)
def test_adapters_that_cannot_go_on_are_refused(made, tmp_path, changes, message):
    edit(tmp_path, **changes)
    with pytest.raises(ConfigError, match=rf"^recipe: lora\.adapter: .*{message}"):
        read(tmp_path)


def test_folders_that_are_not_whole_are_named(made, tmp_path):
    with pytest.raises(ConfigError, match=r"it is a run, whose adapter is .*adapter$"):
        read(tmp_path, adapter=str(tmp_path))
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"1234567890")
    run = read(tmp_path)
    with pytest.raises(ConfigError, match=r"lora\.adapter: .*adapter_model\.safetensors cannot be read"):
        check_targets(load_model(made, device="cpu"), run.lora)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no weights, adapter_model\.safetensors is missing"):
        read(tmp_path)
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"adapter_config\.json cannot be read"):
        read(tmp_path)


def test_a_stored_recipe_is_read_without_its_adapter(made, tmp_path):
    """All keys are in it; training itself needs the folder, and looks again."""
    run = read(tmp_path)
    (tmp_path / "r.yaml").write_text(dump_recipe(run))
    edit(tmp_path, r=5)
    with pytest.raises(ConfigError, match=r"lora\.rank is 3, but .* has 5"):
        load_recipe(tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml", begun=True).lora == run.lora
    (tmp_path / "adapter").rename(tmp_path / "elsewhere")
    assert load_recipe(tmp_path / "r.yaml").lora == run.lora
    with pytest.raises(ConfigError, match="is no adapter"):
        settle(run.lora, KEYS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_begins_where_the_adapter_ended(made, tmp_path, dtype):
    """The same logits; factors and saved modules train, in the model's dtype, and the base does not."""
    run, config = read(tmp_path, dropout=0.0), ModelConfig(made.path, dtype=dtype)
    model = add_adapter(load_model(config, device="cpu"), run.lora).eval()
    saved = load_adapter(load_model(config, device="cpu"), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, saved(IDS).logits)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {getattr(torch, dtype)}
    assert trainable_parameters(model) == sum(p.numel() for p in load_file(weights(tmp_path)).values())
    assert model.peft_config["default"].lora_dropout == 0.0
    assert model.peft_config["default"].base_model_name_or_path is None


def weights(folder):
    return folder / "adapter" / "adapter_model.safetensors"


def test_adapters_of_other_models_are_refused_by_the_map_that_differs(made, tmp_path):
    lora = read(tmp_path).lora
    for name, overrides, message in (
        ("wide", {"hidden_size": 48}, r"for 32 outputs of model\.layers\.0\.mlp\.down_proj; the model has 48"),
        ("long", {"intermediate_size": 80}, r"for 64 inputs of model\.layers\.0\.mlp\.down_proj; the model has 80"),
        ("short", {"layers": 1}, r"changes model\.layers\.1\.\w+\.\w+, which the model does not have"),
    ):
        save_tiny_model(tmp_path / name, **{"layers": 2, **overrides})
        model = load_model(ModelConfig(str(tmp_path / name)), device="cpu")
        with pytest.raises(ConfigError, match=rf"lora\.adapter: .* {message}"):
            check_targets(model, lora)
        with pytest.raises(ConfigError, match=message):
            forecast(read(tmp_path, model={"path": str(tmp_path / name)}))
    deeper = load_model(ModelConfig(str(save_tiny_model(tmp_path / "deep", layers=3))), device="cpu")
    check_targets(deeper, lora)
    with pytest.raises(ConfigError, match=r"cannot be loaded \(it has no .*layers\.2\.input_layernorm"):
        add_adapter(deeper, lora)


def test_all_linear_is_held_against_the_model(tmp_path):
    make_adapter(tmp_path)
    whole = read(tmp_path, targets=["all-linear"])
    assert whole.lora.targets == ("all-linear",)
    check_targets(load_model(whole.model, device="cpu"), whole.lora)
    for name, targets, message in (
        ("some", ("q_proj",), r"leaves out model\.layers\.0\.mlp\.down_proj"),
        ("more", ("all-linear", "lm_head"), r"changes lm_head"),
    ):
        linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        targets = (*linear, "lm_head") if name == "more" else targets
        make_adapter(tmp_path / name, lora=LoraConfig(rank=2, targets=targets))
        run = read(tmp_path / name, targets=["all-linear"])
        with pytest.raises(ConfigError, match=rf"lora\.targets is all-linear, but the adapter in .* {message}"):
            check_targets(load_model(run.model, device="cpu"), run.lora)


def test_the_context_must_be_the_adapters(tmp_path):
    make_adapter(tmp_path, model={"context_length": 1024, "rope_scaling": "linear"})
    message = r"set model\.context_length=1024 and model\.rope_scaling=linear"
    run = read(tmp_path)
    with pytest.raises(ConfigError, match=message):
        check_targets(load_model(run.model, device="cpu"), run.lora)
    with pytest.raises(ConfigError, match=message):
        forecast(run)
    extended = read(tmp_path, model={"context_length": 1024, "rope_scaling": "linear"})
    check_targets(load_model(extended.model, device="cpu"), extended.lora)
    assert forecast(extended).sizes.adapter.parameters > 0


def test_an_estimate_counts_what_the_adapter_has(made, tmp_path, monkeypatch):
    counted = sum(p.numel() for p in load_file(weights(tmp_path)).values())
    run = read(tmp_path, model={"dtype": "bfloat16"}, dropout=0.0)
    found = forecast(run)
    assert found.sizes.adapter.parameters == counted
    assert found.sizes.adapter.inputs == (3, 0, 0) and found.sizes.adapter.down == 3
    assert any("rounded from float32 to bfloat16" in note for note in found.notes)
    assert probe_step(run, found, layers=1).peak_bytes > 0


def test_an_estimate_of_dora_is_of_the_generic_engine(tmp_path):
    make_adapter(tmp_path, lora=LoraConfig(rank=2, use_dora=True))
    found = forecast(read(tmp_path))
    assert found.setting.engine == "generic" and any("lora.use_dora" in note for note in found.notes)
    assert found.sizes.adapter.parameters == sum(p.numel() for p in load_file(weights(tmp_path)).values())
    assert forecast(read(tmp_path, adapter=None)).setting.engine == "fused"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"target_modules": r".*\.(q|v)_proj", "rank_pattern": {"v_proj": 5}}, "rank_pattern"),
        ({"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 5}}, "alpha_pattern"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, "layers_to_transform"),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*0\.self_attn\.v_proj"}, "exclude_modules"),
    ],
)
def test_what_a_recipe_cannot_say_of_an_adapter_stays_and_is_said(tmp_path, settings, name):
    """Ranks of single maps, patterns of names, some of the layers: counted, and trained further."""
    from peft import LoraConfig as Settings
    from peft import get_peft_model

    config = ModelConfig(str(save_tiny_model(tmp_path / "model", layers=2)), dtype="float32")
    model = get_peft_model(load_model(config, device="cpu"), Settings(r=2, lora_alpha=4, **settings))
    fill_adapters(model)
    save_adapter(model, tmp_path / "adapter", config.path)
    run = read(tmp_path)
    wanted = settings["target_modules"]
    assert run.lora.targets == ((wanted,) if isinstance(wanted, str) else tuple(wanted))
    (said,) = describe_start(run.lora, run.model, config.path)
    assert said == f"the adapter has settings of its own that stay: {name}"
    check_targets(load_model(config, device="cpu"), run.lora)
    again = add_adapter(load_model(config, device="cpu"), run.lora)
    shapes = [{n: p.shape for n, p in m.named_parameters() if "lora_" in n} for m in (model, again)]
    assert shapes[0] == shapes[1]
    assert forecast(run).sizes.adapter.parameters == trainable_parameters(again) == trainable_parameters(model)
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS).logits, model.eval()(IDS).logits)


def test_experts_of_one_weight_go_on(tmp_path):
    model = add_adapter(tiny_model("mixtral"), LoraConfig(rank=2))
    fill_adapters(model)
    save_adapter(model, tmp_path / "adapter", "x")
    lora = settle(LoraConfig(adapter=str(tmp_path / "adapter")), {"targets"})
    fresh = tiny_model("mixtral")
    check_targets(fresh, lora)
    again = add_adapter(fresh, lora)
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS).logits, model.eval()(IDS).logits)
    assert trainable_parameters(again) == trainable_parameters(model)


def test_weights_in_torchs_format_and_another_base_are_taken_and_said(made, tmp_path):
    path = weights(tmp_path)
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    edit(tmp_path, base_model_name_or_path="someone/other")
    run = read(tmp_path, dropout=0.0)
    check_targets(model := load_model(made, device="cpu"), run.lora)
    add_adapter(model, run.lora)
    said = describe_start(run.lora, run.model, made.path)
    assert said == [f"the adapter names someone/other as its base model, and model.path is {made.path}: their weights "
                    "must be equal"]  # fmt: skip


def test_factors_that_are_not_in_the_file_are_an_error_everywhere(made, tmp_path):
    """PEFT warns and goes on with those of a new adapter."""
    path = weights(tmp_path)
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"]
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=r"missing adapter keys.*layers\.1\.mlp\.down_proj\.lora_A"):
        load_adapter(load_model(made, device="cpu"), tmp_path / "adapter")
