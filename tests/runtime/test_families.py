"""Hybrids, mixtures of experts, windows, and architectures that lemo refuses or helps around."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lemo import attach
from lemo.calibrate.session import calibrate
from lemo.config import CalibrationConfig, RunConfig, SparsityConfig
from lemo.core.plan import Plan
from lemo.errors import UnsupportedModelError
from lemo.families import all_families, find_family
from lemo.runtime.batch import read_layout
from lemo.runtime.head import segmented_forward
from lemo.runtime.model import decoder_layers, dense_only, has_alibi, window_of
from lemo.runtime.stream import LayerStream
from lemo.train.planning import skeleton_plan
from tests.runtime.oracle import batch, masked_oracle, relative, tiny_model
from tests.runtime.test_exact import in_double
from tests.runtime.test_fused import assert_equal_engines, plan_of
from tests.runtime.test_laws import assert_same_gradients, run, sparse_plan

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HYBRIDS = {
    "qwen3_next": {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3},
}


def made(model_type: str, **settings):
    """A random model of an architecture that has no family file, in training mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SIZES | settings))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=settings.pop("attention", "eager"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model.float().train()


def hybrid_plan(model, **choices) -> Plan:
    """A sparse plan whose recurrent layers are dense."""
    plan = sparse_plan(model, **choices)
    dense = dense_only(model)
    layers = [replace(x, forward_ratio=1.0, backward_ratio=1.0) if i in dense else x for i, x in enumerate(plan.layers)]
    return replace(plan, layers=tuple(layers))


@pytest.mark.parametrize("kv", ["kept", "all"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_attention_layers_of_a_hybrid_skip_rows(name, kv):
    """Recurrent layers run all rows; the others are the masked reference, and keep-all is the model bit for bit."""
    model, inputs = made(name, **HYBRIDS[name]), batch(rows=2)
    assert dense_only(model) == [0, 2]
    wanted, _ = run(model, inputs)
    keep = Plan.uniform(model, backward_ratio=0.99, block_size=4, dense_layers=dense_only(model))
    with attach(model, keep, loss="model"):
        assert torch.equal(run(model, inputs)[0], wanted)
    plan = hybrid_plan(model, kv=kv)
    with attach(model, plan) as handle:
        loss, got = run(model, inputs)
        rows = {i: s.forward.chosen() for i, s in handle.selections.items()}
    assert set(rows) == {1, 3} and all(0.4 < len(r) / 128 < 0.7 for r in rows.values())
    with masked_oracle(model, plan, rows, read_layout(inputs, None, 4)):
        wanted, gradients = run(model, inputs)
    assert relative(loss, wanted) <= 1e-5
    assert_same_gradients(got, gradients, 2e-5)


def test_recurrent_layers_are_refused_by_name_and_dense_in_a_recipes_plan():
    model = made("lfm2", **HYBRIDS["lfm2"])
    with pytest.raises(UnsupportedModelError, match=r"layer 0 \(Lfm2DecoderLayer\) has no single softmax attention"):
        attach(model, sparse_plan(model))
    plan = skeleton_plan(model, RunConfig(sparsity=SparsityConfig(dense_layers=(-1,), scorer="random")))
    assert [layer.is_dense for layer in plan.layers] == [True, False, True, True]


def test_the_stream_of_a_hybrid_is_the_models():
    """Calibration runs layer by layer through recurrent layers too."""
    model, inputs = made("lfm2", **HYBRIDS["lfm2"]).eval(), batch()
    stream = LayerStream.open(model, inputs["input_ids"])
    x = stream.hidden_BTM
    for index in range(stream.layers):
        x = stream.dense(index, x).output_BTM
    wanted = model.base_model(inputs["input_ids"], output_hidden_states=False, use_cache=False).last_hidden_state
    final = getattr(model.base_model, "embedding_norm", None)
    assert relative(final(x), wanted) <= 1e-5


def test_a_hybrid_is_calibrated_in_its_attention_layers():
    model = made("lfm2", **HYBRIDS["lfm2"]).eval()
    ratios = {"forward_ratio": 0.5, "backward_ratio": 0.5}
    skeleton = Plan.uniform(model, block_size=8, scorer="predictor", dense_layers=dense_only(model), **ratios)
    supervised = torch.arange(96)[None] > 80
    batches = [{"input_ids": batch(96, seed=i)["input_ids"], "supervised": supervised} for i in range(3)]
    nets = {"predictor_steps": 5, "predictor_width": 8, "predictor_rank": 4, "bypass_rank": 4}
    settings = CalibrationConfig(windows=2, tune_windows=1, **nets)
    plan = calibrate(model, batches, settings, plan=skeleton, progress=False)
    fitted = [layer.bypass is not None and layer.predictor is not None for layer in plan.layers]
    assert fitted == [False, True, False, True]
    with attach(model.train(), plan) as handle:
        run(model, batch(96, supervised_from=80))
        assert set(handle.selections) == {1, 3}


def test_alibi_is_refused_with_its_reason():
    bloom = made("bloom", n_head=4, n_layer=4)
    with pytest.raises(UnsupportedModelError, match="ALiBi"):
        attach(bloom, sparse_plan(bloom))
    with pytest.raises(UnsupportedModelError, match=r"no layer can skip rows: BloomBlock .*ALiBi"):
        skeleton_plan(bloom, RunConfig(sparsity=SparsityConfig(scorer="random")))
    assert has_alibi(AutoConfig.for_model("falcon", alibi=True)) and not has_alibi(AutoConfig.for_model("falcon"))
    assert has_alibi(AutoConfig.for_model("mpt")) and not has_alibi(AutoConfig.for_model("llama"))


def test_layers_that_fail_on_rows_are_refused_as_such():
    """Layers that return tuples, of families that never moved to Transformers' attention interface."""
    model = made("gptj", n_embd=32, n_head=4, n_layer=4, rotary_dim=8, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    with pytest.raises(UnsupportedModelError, match="cannot skip rows"):
        attach(model, sparse_plan(model))


def test_chunked_attention_stays_dense():
    kinds = ["chunked_attention", "full_attention"] * 2
    experts = {"num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": 8}
    model = made("llama4_text", layer_types=kinds, attention_chunk_size=16, **experts)
    assert dense_only(model) == [0, 2]
    wanted, _ = run(model, batch())
    with attach(model, Plan.uniform(model, backward_ratio=1.0)) as handle:
        assert torch.equal(model(**batch()).loss, wanted)
        assert handle.notes == [
            "the model's own loss runs instead of the segmented one: the model does not name its decoder"
        ]


def test_a_head_that_does_more_keeps_its_own_loss():
    """ModernBERT's decoder has a map and a norm before the LM head: a segmented loss would be another loss."""
    model, inputs = made("modernbert-decoder", local_attention=24, attention_dropout=0.0), batch(rows=2)
    wanted, _ = run(model, inputs)
    other = segmented_forward(model, dict(inputs), 64).loss
    assert relative(other, wanted) > 1e-3
    with attach(model, Plan.uniform(model, backward_ratio=1.0)) as handle:
        assert torch.equal(model(**inputs).loss, wanted)
        assert any("more than a linear head" in note for note in handle.notes)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_routers_see_the_rows_that_run_and_their_loss_makes_a_batch_dense(family):
    """The auxiliary loss counts all rows: where it is asked for, all rows run."""
    model, inputs = tiny_model(family), batch(rows=2)
    plan, seen = sparse_plan(model), []
    hook = decoder_layers(model)[0].mlp.gate.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with attach(model, plan) as handle:
        model(**inputs).loss.backward()
        assert seen.pop().reshape(-1, 32).shape[0] == handle.selections[0].forward.capacity < 128
        model.config.output_router_logits = True
        auxiliary = model(**inputs)
        assert handle.dense_batches == 1 and seen.pop().reshape(-1, 32).shape[0] == 128
    hook.remove()
    assert torch.equal(auxiliary.loss, model(**inputs).loss) and float(auxiliary.aux_loss) > 0


def test_a_cache_that_goes_through_keywords_is_switched_off():
    """Granite's experts take `use_cache` among their keywords; a cache would hold keys of two passes."""
    model, inputs = made("granitemoe", num_local_experts=4, num_experts_per_tok=2), batch(rows=2)
    wanted, _ = run(model, inputs)
    exact = Plan.uniform(model, forward_ratio=1.0, backward_ratio=0.4, block_size=4)
    with attach(model, exact, loss="model"):
        assert torch.equal(run(model, inputs)[0], wanted)


@pytest.mark.parametrize("mode", ["skip", "exact rows"])
@pytest.mark.parametrize("kv", ["kept", "all"])
def test_windows_in_the_fused_engine(mode, kv, monkeypatch):
    """Sliding and full layers in turn."""
    in_double(monkeypatch)
    kinds = ["sliding_attention", "full_attention"] * 2
    model = tiny_model("ministral", dtype=torch.float64, sliding_window=24, layer_types=kinds)
    assert [window_of(x.self_attn) for x in decoder_layers(model)] == [24, None] * 2
    assert_equal_engines(model, plan_of(model, mode, kv), batch(64, supervised_from=50))


def test_model_types_that_share_classes_share_a_family():
    config = AutoConfig.for_model("llama")
    config.model_type = "internlm3"
    assert find_family(config) is all_families()["llama"]
