"""Which of Transformers' causal language models lemo can train, tried one by one, and the page that says so.

    python -m benchmarks.families [--out FILE] [--page FILE] [TYPE ...]
    python -m benchmarks.families --render    # the page from the newest Record, without trying anything

Each model type gets a tiny random model on the CPU in fp32 and the laws of tests/runtime: keep-all is the dense model
bit for bit; half of the rows kept, with and without keys of the others, is a masked dense run, loss and all gradients;
exact forward has the dense loss. Layers that cannot skip rows run densely.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.families_page import render
from lemo.core.plan import Plan
from lemo.errors import LemoError
from lemo.families import all_families, find_family
from lemo.measure.record import Record
from lemo.runtime.attach import attach
from lemo.runtime.batch import read_layout
from lemo.runtime.model import decoder_layers, dense_only, why_dense
from tests.runtime.oracle import batch, masked_oracle, relative
from tests.runtime.test_laws import run, sparse_plan

SCRIPT = "benchmarks/families.py"
ROOT = Path(__file__).resolve().parent.parent
BOUND = 1e-4  # of loss and of the whole gradient, in fp32; families with a file are held to 1e-5 by their tests
MOST_PARAMETERS = 20_000_000

# Names that configurations give to sizes, and what a tiny model has.
SIZES: dict[int, str] = {
    128: "vocab_size vocab_size_per_layer_input",
    32: "hidden_size d_model n_embd embed_dim word_embed_proj_dim moe_intermediate_size dim_model_base lru_width "
    "shared_expert_intermediate_size expert_ffn_hidden_size moe_ffn_hidden_size",
    64: "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size decoder_ffn_dim",
    4: "num_hidden_layers n_layer num_layers n_layers decoder_layers num_attention_heads n_head n_heads num_heads "
    "decoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads "
    "mamba_n_heads mamba_num_heads n_mamba_heads time_step_rank adapter_rank",
    2: "num_key_value_heads num_kv_heads n_head_kv num_experts_per_tok moe_topk num_experts_per_token moe_k "
    "linear_num_key_heads attn_layer_period expert_layer_period index_n_heads eos_token_id",
    8: "head_dim kv_channels attention_head_dim swa_head_dim qk_nope_head_dim v_head_dim qk_rope_head_dim "
    "mamba_d_state mamba_n_groups ssm_state_size linear_key_head_dim linear_value_head_dim rotary_dim state_size "
    "hidden_size_per_layer_input query_pre_attn_scalar index_head_dim",
    512: "max_position_embeddings n_positions max_seq_len max_sequence_length",
    16: "q_lora_rank kv_lora_rank qk_head_dim mamba_d_head mamba_headdim mamba_head_dim mamba_chunk_size chunk_size "
    "index_topk",
    24: "sliding_window attention_window attention_window_size",
    1: "n_group topk_group n_groups n_shared_experts first_k_dense_replace attn_layer_offset mamba_ngroups "
    "bos_token_id",
    3: "conv_L_cache",
    0: "pad_token_id num_kv_shared_layers",
}
_LATENT = {"num_key_value_heads": 4}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
_NO_JITTER = {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32"), _LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), _LATENT),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "bailing_hybrid"), _LINEAR),
    "kimi_linear": _LATENT | _LINEAR,
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_groups": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_groups": 1},
    "nemotron_h": {"layer_types": ["mamba", "attention"] * 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_groups": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "zamba2": {"layer_types": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "llama4_text": {"layer_types": ["full_attention"] * 4, "intermediate_size_mlp": 64},
    "zaya": {"num_experts_per_tok": 1},
    "phimoe": _NO_JITTER | {"sliding_window": 512},
    "moshi": {"sliding_window": 512},
    "xmod": {"default_language": "en_XX"},
}


def tiny_config(model_type: str) -> tuple[Any, str]:
    """A configuration of a random model small enough to try, and its attention implementation."""
    family = all_families().get(model_type)
    if family is not None:
        return family.tiny_config(), family.attention
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    known = set(default.to_dict()) | set(vars(default)) | set(getattr(default, "attribute_map", {}))
    values: dict[str, Any] = {name: size for size, names in SIZES.items() for name in names.split() if name in known}
    for name in known:
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(getattr(default, name, None), float):
            values[name] = 0.0
    values |= {name: value for name, value in (("is_decoder", True), ("layerdrop", 0.0)) if name in known}
    return config_class(**(values | SPECIAL.get(model_type, {}))), "sdpa"


def tiny_model(config: Any, attention: str) -> Any:
    """The random model, in training mode; by eager attention where it knows no other."""
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError("its sizes have names of their own, so that no small one was made")
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except ValueError:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float().train()


def probe(model_type: str) -> dict[str, Any]:
    """What a model type can do: `tried` false with the reason, `refused` with the reason, or what works."""
    found: dict[str, Any] = {"type": model_type, "tried": False}
    try:
        config, attention = tiny_config(model_type)
        if config.get_text_config() is not config:
            return found | {"text": config.get_text_config().model_type}
        model, inputs = tiny_model(config, attention), batch(rows=2)
        wanted, _ = run(model, inputs)
    except Exception as error:
        return found | {"reason": first_line(error)}
    found["tried"] = True
    try:
        layers, dense = decoder_layers(model), dense_only(model)
        if len(dense) == len(layers):
            return found | {"refused": f"{type(layers[0]).__name__} {why_dense(layers[0], 0, config)}"}
        found |= {"layers": len(layers), "dense": len(dense)}
        failed, loss = keep_all(model, dense, inputs, wanted)
        failed += [kv for kv in ("kept", "all") if not is_masked_reference(model, dense, inputs, kv)]
        failed += [] if is_dense_loss(model, dense, inputs, wanted, "rows") else ["exact forward"]
    except LemoError as error:
        return found | {"refused": first_line(error, kind=False)}
    except Exception as error:
        return found | {"refused": f"fails in training ({first_line(error)})"}
    if failed:
        return found | {"refused": f"breaks a law: {', '.join(failed)}"}
    return found | {"loss": loss} | extras(model, dense, inputs, wanted)


def keep_all(model: Any, dense: list[int], inputs: dict, wanted: torch.Tensor) -> tuple[list[str], str]:
    """Laws that a plan which keeps every row breaks, and whose loss runs: `segmented` or `model`."""
    with attach(model, uniform(model, dense, backward_ratio=0.99), loss="model"):
        same = torch.equal(run(model, inputs)[0], wanted)
    with attach(model, uniform(model, dense, backward_ratio=1.0)) as handle:
        output = model(**inputs)
        close = relative(output.loss, wanted) <= BOUND
        own = any("own loss" in note for note in handle.notes)
    return ([] if same else ["keep all"]) + ([] if close else ["segmented loss"]), "model" if own else "segmented"


def uniform(model: Any, dense: list[int], **ratios: Any) -> Plan:
    """A plan with random rows."""
    return Plan.uniform(model, block_size=4, dense_layers=dense, **ratios)


def is_masked_reference(model: Any, dense: list[int], inputs: dict, kv: str) -> bool:
    """Whether half of the rows kept gives loss and gradients of a masked dense run."""
    plan = sparse_plan(model, kv=kv)
    layers = (replace(x, forward_ratio=1.0, backward_ratio=1.0) if i in dense else x for i, x in enumerate(plan.layers))
    plan, attention = replace(plan, layers=tuple(layers)), model.config._attn_implementation
    with attach(model, plan, unsafe_no_bypass=True) as handle:
        loss, got = run(model, inputs)
        rows = {i: s.forward.chosen() for i, s in handle.selections.items() if s.forward is not None}
    model.set_attn_implementation("eager")
    with masked_oracle(model, plan, rows, read_layout(inputs, None, 4)):
        wanted_loss, wanted = run(model, inputs)
    model.set_attn_implementation(attention)
    if got.keys() != wanted.keys() or relative(loss, wanted_loss) > BOUND:
        return False
    scale = torch.stack([g.norm() for g in wanted.values()]).norm()
    return all(float((got[name] - wanted[name]).norm() / scale) <= BOUND for name in wanted)


def is_dense_loss(model: Any, dense: list[int], inputs: dict, wanted: torch.Tensor, gradient: str) -> bool:
    """Whether exact forward has the dense loss, bit for bit."""
    plan = uniform(model, dense, forward_ratio=1.0, backward_ratio=0.4, gradient=gradient)
    with attach(model, plan, loss="model"):
        return torch.equal(run(model, inputs)[0], wanted)


def extras(model: Any, dense: list[int], inputs: dict, wanted: torch.Tensor) -> dict[str, bool]:
    """What only some families can: the fused engine, the `pairs` gradient, own MLP rows."""
    found = dict.fromkeys(("fused", "pairs", "mlp"), False)
    family = find_family(model.config)
    if family is not None and family.names is not None:
        plan = uniform(model, dense, forward_ratio=1.0, backward_ratio=0.5)
        with suppress(LemoError), attach(model, plan, engine="fused"):
            run(model, inputs)
            found["fused"] = True
    with suppress(LemoError):
        found["pairs"] = is_dense_loss(model, dense, inputs, wanted, "pairs")
    if family is not None and family.mlp and family.mlp_down is not None:
        plan = replace(uniform(model, dense, backward_ratio=0.5, forward_ratio=0.5), mlp="own")
        layers = tuple(x if x.is_dense else replace(x, mlp_ratio=0.3) for x in plan.layers)
        with attach(model, replace(plan, layers=layers), unsafe_no_bypass=True, self_test=False):
            found["mlp"] = bool(torch.isfinite(run(model, inputs)[0]))
    return found


def first_line(error: Exception, kind: bool = True) -> str:
    """Kind and first line of an error."""
    text = str(error).partition("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if kind else text


def newest(path: Path) -> dict[str, Any]:
    """The last Record of a file."""
    return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Tries every model type, appends the Record and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "types", nargs="*", help="types to try again, beside the newest rows of the others; all by default"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "families.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "families.md")
    parser.add_argument("--render", action="store_true", help="write the page from the newest Record")
    options = parser.parse_args(arguments)
    if not options.render:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        known = {row["type"]: row for row in newest(options.out)["setting"]["rows"]} if options.types else {}
        for model_type in options.types or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            known[model_type] = probe(model_type)
            print(json.dumps(known[model_type]), flush=True)
        rows = list(known.values())
        tried = [row for row in rows if row["tried"]]
        samples = [float("refused" not in row) for row in tried]
        setting = {"statistic": "sum", "bound": BOUND, "dtype": "float32", "rows": rows}
        Record.measure("families/accepted", "families", samples, setting, script=SCRIPT).append(options.out)
    options.page.write_text(render(newest(options.out)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
