"""The walk through Transformers' own layers: against measured peaks, and against what lives on a CPU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lemo import attach
from lemo.config import LoraConfig
from lemo.measure.attention_memory import Workspace
from lemo.measure.memory import GIB
from lemo.measure.sizes import read_sizes
from lemo.measure.step_memory import MemoryConstants, StepSetting, step_memory
from lemo.train.lora import add_adapter
from lemo.train.rehearsal import random_batch, random_plan, shape_config
from tests.measure.tracker import counting

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj")
SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 512}
SMALL |= {"max_position_embeddings": 1024, "use_cache": False}
KINDS = {
    "llama": {"intermediate_size": 704, "num_key_value_heads": 4},
    "opt": {"ffn_dim": 704, "word_embed_proj_dim": 256, "dropout": 0.0},
    "qwen3_moe": {"num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192,
                  "head_dim": 32},
}  # fmt: skip
CASES = [
    ("llama", "plain", "none", 1.0),
    ("llama", "plain", "layer", 1.0),
    ("llama", "generic", "none", 0.5),
    ("opt", "fused", "none", 0.5),
    ("opt", "fused", "lin", 1.0),
    ("qwen3_moe", "plain", "layer", 1.0),
    ("qwen3_moe", "generic", "none", 0.5),
    ("qwen3_moe", "generic", "layer", 0.5),
]


@pytest.fixture(scope="module")
def llama2_7b():
    """With PEFT's fp32 adapters, whose maps keep fp32 copies of their inputs."""
    return read_sizes(shape_config("llama2-7b", tokens=4096), rank=8, targets=QKVO, adapter_dtype=torch.float32)


@pytest.mark.parametrize(
    ("tokens", "recompute", "gib"),
    [(4096, "none", 38.5), (8192, "none", 64.3), (8192, "layer", 18.3), (32768, "layer", 34.9), (65536, "layer", 57.1)],
)
def test_peaks_of_plain_training_on_an_h200(llama2_7b, tokens, recompute, gib):
    """Measured once with Transformers 5.17 and PEFT, LoRA of rank 8 on q, k, v and o, batch 1: within 1 %."""
    dense = {"forward_ratio": 1.0, "backward_ratio": 1.0, "segmented": False, "engine": "plain"}
    found = step_memory(llama2_7b, StepSetting(tokens, recompute=recompute, **dense))
    assert found.peak_bytes / GIB == pytest.approx(gib, rel=0.01)


@pytest.mark.parametrize(("kind", "engine", "recompute", "keep"), CASES)
def test_what_lives_is_close_to_the_walk(kind, engine, recompute, keep, monkeypatch):
    """Peak of a step in bf16, weights and optimizer left out: within 6 %."""
    expected, peak = peaks(kind, engine, recompute, keep, monkeypatch)
    assert expected == pytest.approx(peak, rel=0.06)


@pytest.mark.parametrize("targets", [QKVO, ("all-linear",)])
@pytest.mark.parametrize(("engine", "recompute", "keep"), [("plain", "none", 1.0), ("generic", "none", 0.5)])
def test_what_dora_keeps_is_counted(engine, recompute, keep, targets, monkeypatch):
    """Of each map its output and its adapter's; products of whole weights live for a moment and are left out."""
    expected, peak = peaks("llama", engine, recompute, keep, monkeypatch, targets=targets, use_dora=True)
    assert expected == pytest.approx(peak, rel=0.08)


def peaks(kind, engine, recompute, keep, monkeypatch, targets=QKVO, use_dora=False):
    """Of one step, weights and optimizer left out: what the walk says, and what lives."""
    tokens, block = 1024, 16
    config = AutoConfig.for_model(kind, **SMALL, **KINDS[kind])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").train()
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    named = {"targets": tuple(name for name in targets if name in present or name == "all-linear"), "rank": 8}
    model = add_adapter(model, LoraConfig(use_dora=use_dora, **named))
    sizes = read_sizes(config, use_dora=use_dora, **named)
    setting = StepSetting(
        tokens, engine=engine, recompute=recompute, forward_ratio=keep, backward_ratio=keep, block_size=block,
        segmented=engine != "plain", predictor=False, bypass_rank=16 if keep < 1 else 0,
    )  # fmt: skip
    if engine != "fused" and recompute == "layer":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    plan = random_plan(
        config, forward_ratio=keep, backward_ratio=keep, block_size=block, bypass_rank=16, scorer="random"
    )
    level = {"recompute": recompute} if engine == "fused" else {}
    attached = nullcontext() if engine == "plain" else attach(model, plan, engine=engine, self_test=False, **level)
    with attached, counting(monkeypatch) as live:
        model(**random_batch(512, tokens, share=0.4, seed=0, block_size=block)).loss.backward()
    nothing = replace(MemoryConstants(), fixed_bytes=0, share=0.0, attention=Workspace(0.0, 0.0))
    # Adapters in bf16; beside them their fp32 copies and two moments.
    standing = 2 * sizes.parameters + (2 + 3 * 4) * sizes.adapter.parameters + 2 * 8 * tokens
    expected = step_memory(sizes, setting, nothing).peak_bytes - standing
    return expected, live.peak
