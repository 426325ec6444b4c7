"""The arithmetic against known totals, limits and the table of ideal gains that the design states."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from lemo.errors import ConfigError
from lemo.measure.flops import (
    ATTENTION_BACKWARD,
    DecoderShape,
    LayerWork,
    attention_flops,
    head_flops,
    ideal_gain,
    layer_flops,
    local_pairs,
    read_in_backward,
    step_flops,
)
from lemo.ops.attend_rows.far import far_counts

LLAMA_2_7B = DecoderShape(32, 4096, 11008, 32, 32, 128, 32000)
LLAMA_3_8B = DecoderShape(32, 4096, 14336, 32, 8, 128, 128256)
K = 1024


@pytest.mark.parametrize(
    ("tokens", "keep", "kv", "recompute", "gain"),
    [
        (64 * K, 0.3, "kept", "none", 6.4),
        (64 * K, 0.3, "kept", "mlp", 5.8),
        (64 * K, 0.3, "kept", "lin", 5.1),
        (64 * K, 0.3, "kept", "layer", 4.6),
        (64 * K, 0.3, "all", "none", 3.7),
        (64 * K, 0.3, "all", "mlp", 3.5),
        (64 * K, 0.3, "all", "lin", 3.2),
        (64 * K, 0.3, "all", "layer", 2.8),
        (128 * K, 0.3, "kept", "none", 7.2),
        (128 * K, 0.3, "kept", "mlp", 6.7),
        (128 * K, 0.3, "kept", "lin", 6.2),
        (128 * K, 0.3, "kept", "layer", 5.3),
        (64 * K, 0.5, "kept", "none", 3.6),
        (64 * K, 0.5, "kept", "lin", 3.0),
    ],
)
def test_ideal_gain_of_skipping_is_the_table_of_the_design(tokens, keep, kv, recompute, gain):
    work = LayerWork(keep, keep, kv=kv, recompute=recompute)
    assert ideal_gain(LLAMA_2_7B, tokens, work) == pytest.approx(gain, abs=0.06)


@pytest.mark.parametrize(
    ("backward", "gradient", "gain"),
    [(0.5, "pairs", 2.3), (0.25, "pairs", 3.0), (0.5, "rows", 1.9), (0.25, "rows", 2.5)],
)
def test_ideal_gain_of_exact_forward_is_the_table_of_the_design(backward, gradient, gain):
    work = LayerWork(1.0, backward, kv="all", gradient=gradient)
    assert ideal_gain(LLAMA_2_7B, 64 * K, work) == pytest.approx(gain, abs=0.07)


def test_a_dense_recomputed_step_at_64k_does_7_6_pflop():
    dense = step_flops(LLAMA_2_7B, 64 * K, [LayerWork(recompute="layer")] * 32)
    assert dense.total == pytest.approx(7.6e15, rel=0.01)


@pytest.mark.parametrize("shape", [LLAMA_2_7B, LLAMA_3_8B])
def test_gain_with_all_keys_tends_to_3_74_whatever_the_model(shape: DecoderShape):
    work = LayerWork(0.3, 0.3, kv="all")
    assert ideal_gain(shape, 10**9, work) == pytest.approx(3.74, abs=0.01)


def test_grouped_queries_make_offering_all_keys_cheaper():
    def cost(shape: DecoderShape) -> float:
        kept, offered = (layer_flops(shape, 8 * K, LayerWork(0.3, 0.3, kv=kv)).forward for kv in ("kept", "all"))
        scores = attention_flops(shape, 8 * K, 0.3, 1.0) - attention_flops(shape, 8 * K, 0.3, 0.3)
        return offered - kept - scores

    assert cost(LLAMA_2_7B) == pytest.approx(4 * cost(LLAMA_3_8B))


@given(st.floats(0.05, 1.0), st.floats(0.05, 1.0), st.sampled_from(["kept", "all"]), st.integers(64, 10**6))
def test_fewer_rows_never_cost_more(a: float, b: float, kv, tokens: int):
    backward, forward = sorted((a, b))
    dense = layer_flops(LLAMA_3_8B, tokens, LayerWork()).total
    exact = layer_flops(LLAMA_3_8B, tokens, LayerWork(1.0, backward, kv=kv)).total
    both = layer_flops(LLAMA_3_8B, tokens, LayerWork(forward, backward, kv=kv)).total
    pairs = layer_flops(LLAMA_3_8B, tokens, LayerWork(forward, backward, kv=kv, gradient="pairs")).total
    assert pairs <= both * (1 + 1e-9) and both <= exact * (1 + 1e-9) and exact <= dense * (1 + 1e-9)


@pytest.mark.parametrize("recompute", ["none", "mlp", "lin", "layer"])
def test_full_ratios_are_the_dense_layer(recompute):
    works = [LayerWork(recompute=recompute), LayerWork(1.0, 1.0, kv="all", gradient="pairs", recompute=recompute)]
    dense, full = (layer_flops(LLAMA_2_7B, 4 * K, work) for work in works)
    assert dense == full


def test_linear_maps_and_head_agree_with_what_torch_counts():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config.num_key_value_heads, config.head_dim, config.vocab_size = 2, 8, 64
    model = LlamaForCausalLM(config).requires_grad_(False)
    shape, tokens = DecoderShape.from_config(config), 16
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(tokens)[None])
    layer = layer_flops(shape, tokens, LayerWork()).forward - attention_flops(shape, tokens)
    expected = 2 * layer + head_flops(shape, tokens).forward
    counted = counter.get_flop_counts()["LlamaForCausalLM"]
    linear = sum(count for operator, count in counted.items() if operator.__name__.startswith("mm"))
    assert linear == expected


@pytest.mark.parametrize(
    ("config", "gated", "ffn"),
    [
        ({"model_type": "opt", "ffn_dim": 99}, False, 99),
        ({"model_type": "llama", "intermediate_size": 88}, True, 88),
        ({"model_type": "gpt2", "n_inner": None}, False, 128),
    ],
)
def test_shapes_are_read_from_other_families_configs(config, gated, ffn):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 7}
    shape = DecoderShape.from_config(SimpleNamespace(**sizes, **config))
    assert (shape.gated, shape.ffn, shape.head_dim, shape.kv_heads) == (gated, ffn, 8, 4)
    assert ("gate" in shape.linears) == gated


def test_bad_requests_are_refused():
    with pytest.raises(ConfigError, match="hidden_size"):
        DecoderShape.from_config(SimpleNamespace())
    with pytest.raises(ConfigError, match="ratios"):
        LayerWork(0.3, 0.5)
    with pytest.raises(ConfigError, match="recompute"):
        LayerWork(recompute="all")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="32 layers"):
        step_flops(LLAMA_2_7B, 10, [LayerWork()])


def test_bypass_and_adapters_cost_what_their_sizes_say():
    plain, bypass, lora = (LayerWork(0.5, 0.5), LayerWork(0.5, 0.5, bypass_rank=64), LayerWork(lora_rank=16))
    extra = layer_flops(LLAMA_2_7B, K, bypass).total - layer_flops(LLAMA_2_7B, K, plain).total
    assert extra == 2 * 4 * 4096 * 64 * K / 2
    adapters = layer_flops(LLAMA_2_7B, K, lora).total - layer_flops(LLAMA_2_7B, K, LayerWork()).total
    assert adapters == 6 * 16 * sum(i + o for i, o in LLAMA_2_7B.linears.values()) * K


@pytest.mark.parametrize(
    ("tokens", "window", "block"), [(4096, 512, 64), (5000, 512, 64), (900, 512, 64), (700, 128, 0)]
)
def test_pairs_of_context_rows_are_those_of_the_mask(tokens, window, block):
    position = torch.arange(tokens)
    before = (position // window - 1).clamp(min=0) * window
    pairs = position + 1 - before + before.clamp(max=block)
    assert local_pairs(tokens, window, block) == pytest.approx(int(pairs.sum()) - tokens / 2, rel=1e-3)


def test_a_context_window_shortens_the_forward_attention_of_context_rows_only():
    full = LayerWork(1.0, 0.25, gradient="keys", kv="all")
    near, far = (layer_flops(LLAMA_3_8B, 64 * K, replace(full, context_window=w)) for w in (K, 64 * K))
    whole = layer_flops(LLAMA_3_8B, 64 * K, full)
    assert far == whole and (near.backward, near.recompute) == (whole.backward, whole.recompute)
    saved = (whole.forward - near.forward) / attention_flops(LLAMA_3_8B, 64 * K)
    assert 0.75 * 0.94 < saved < 0.75
    dense = LayerWork(context_window=K)
    assert layer_flops(LLAMA_3_8B, 64 * K, dense) == layer_flops(LLAMA_3_8B, 64 * K, LayerWork())


def test_a_share_of_the_far_keys_shortens_the_backward_attention_only():
    full = LayerWork(1.0, 0.25, gradient="keys", kv="all")
    whole, few = (layer_flops(LLAMA_3_8B, 64 * K, replace(full, far_share=share)) for share in (1.0, 0.25))
    assert (few.forward, few.recompute) == (whole.forward, whole.recompute)
    saved = (whole.backward - few.backward) / (2.5 * attention_flops(LLAMA_3_8B, 64 * K, 0.25))
    assert 0.75 * 0.95 < saved < 0.75
    short = (layer_flops(LLAMA_3_8B, 2 * K, replace(full, far_share=share)) for share in (1.0, 0.25))
    assert len(set(short)) == 1
    for other in (LayerWork(), LayerWork(0.5, 0.5, kv="all"), replace(full, gradient="pairs")):
        assert layer_flops(LLAMA_3_8B, 64 * K, replace(other, far_share=0.25)) == layer_flops(LLAMA_3_8B, 64 * K, other)


@pytest.mark.parametrize("recompute", ["none", "mlp", "lin", "layer"])
def test_local_rows_cost_what_backward_rows_do_but_for_attention(recompute):
    work = LayerWork(1.0, 0.12, kv="all", gradient="keys", recompute=recompute, lora_rank=16, context_window=K)
    local, far = replace(work, local_ratio=0.25), replace(work, backward_ratio=0.37)
    short = [layer_flops(LLAMA_3_8B, 2 * K, x) for x in (local, far)]
    assert short[0].total == pytest.approx(short[1].total), "no key is farther away than the window"
    assert layer_flops(LLAMA_3_8B, 64 * K, local).forward == layer_flops(LLAMA_3_8B, 64 * K, work).forward
    saved = layer_flops(LLAMA_3_8B, 64 * K, far).total - layer_flops(LLAMA_3_8B, 64 * K, local).total
    times = 1 + ATTENTION_BACKWARD + (recompute == "layer")
    full = attention_flops(LLAMA_3_8B, 64 * K, 0.25)
    assert saved == pytest.approx(times * full * (1 - local_pairs(64 * K, K, 64) / ((64 * K) ** 2 / 2)))


@pytest.mark.parametrize("recompute", ["lin", "layer"])
def test_local_rows_that_see_all_cost_forward_what_far_ones_do(recompute):
    work = LayerWork(1.0, 0.12, kv="all", gradient="keys", recompute=recompute, lora_rank=16, context_window=K)
    local, far = replace(work, local_ratio=0.25), replace(work, backward_ratio=0.37)
    wide = replace(local, local_forward="all")
    near_flops, wide_flops, far_flops = (layer_flops(LLAMA_3_8B, 64 * K, x) for x in (local, wide, far))
    assert wide_flops.forward == pytest.approx(far_flops.forward)
    assert wide_flops.recompute == pytest.approx(far_flops.recompute)
    assert wide_flops.backward == near_flops.backward < far_flops.backward
    assert layer_flops(LLAMA_3_8B, 64 * K, replace(work, local_forward="all")) == layer_flops(LLAMA_3_8B, 64 * K, work)
    with pytest.raises(ConfigError, match="local_forward"):
        replace(work, local_forward="far")


@pytest.mark.parametrize(("kv", "offering"), [("all", 1 - 0.37), ("kept", 0.8 - 0.37)])
@pytest.mark.parametrize("recompute", ["none", "mlp", "lin", "layer"])
def test_keys_made_again_are_two_maps_of_the_rows_that_offer_nothing_else(recompute, kv, offering):
    work = LayerWork(
        0.8, 0.12, kv=kv, gradient="keys", recompute=recompute, lora_rank=16, context_window=K, local_ratio=0.25
    )
    saved, again = (layer_flops(LLAMA_3_8B, 64 * K, replace(work, remakes_keys=x)) for x in (False, True))
    inputs, outputs = LLAMA_3_8B.linears["k"]
    maps = 2 * (2 * inputs * outputs + 2 * 16 * (inputs + outputs))
    expected = offering * 64 * K * maps if recompute in ("lin", "layer") else 0.0
    assert again.recompute - saved.recompute == pytest.approx(expected)
    assert (again.forward, again.backward) == (saved.forward, saved.backward)


def test_local_rows_need_a_window_and_room():
    for wrong in ({"context_window": None}, {"local_ratio": 0.9}, {"local_ratio": -0.1}):
        with pytest.raises(ConfigError, match="local_ratio"):
            LayerWork(1.0, 0.12, **{"gradient": "keys", "context_window": K, "local_ratio": 0.2} | wrong)


def test_pairs_that_backward_reads_are_those_that_are_drawn():
    work = LayerWork(1.0, 0.25, gradient="keys", kv="all", far_share=0.25)
    read = 0.0
    for a, drawn in enumerate(far_counts(64, 0.25).tolist()):
        read += 1024 * (512 + 1024 * (min(a, 1) + drawn))
    assert read_in_backward(64 * K, work) == pytest.approx(read / ((64 * K) ** 2 / 2), rel=0.02)
