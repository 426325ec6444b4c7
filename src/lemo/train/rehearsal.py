"""A rehearsal: a model of the right shape with random weights and a random plan, to learn time and memory of training.

Neither depends on the values of weights or tokens, so nothing has to be downloaded or calibrated. A random predictor
ranks blocks arbitrarily, but its scoring and the selection cost what a calibrated one's cost.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lemo.config import CalibrationConfig
from lemo.core.bypass import Bypass
from lemo.core.plan import LayerPlan, Plan
from lemo.core.predictor import PatternPredictor
from lemo.errors import ConfigError, first_line
from lemo.train.collate import IGNORE, WindowCollator
from lemo.train.loss_rows import LossRows

_LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
SHAPES: dict[str, dict[str, Any]] = {
    "llama2-7b": {**_LLAMA, "intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000},
    "llama3-8b": {
        **_LLAMA,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "opt-6.7b": {
        "model_type": "opt",
        "hidden_size": 4096,
        "word_embed_proj_dim": 4096,
        "ffn_dim": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 50272,
    },
    "opt-1.3b": {
        "model_type": "opt",
        "hidden_size": 2048,
        "word_embed_proj_dim": 2048,
        "ffn_dim": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "vocab_size": 50272,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
}


def shape_config(shape: str, *, tokens: int, layers: int | None = None) -> Any:
    """Configuration of a model to rehearse.

    Args:
        shape: a name of SHAPES, or a folder with a config.json.
        tokens: context that it must reach; its own limit is raised where that is lower, its RoPE left alone.
        layers: run only so many layers; None for all.

    Raises:
        ConfigError: neither a known name nor a folder with a config.json that can be read, or more layers than there
            are.
    """
    from transformers import AutoConfig

    if shape in SHAPES:
        fields = copy.deepcopy(SHAPES[shape])
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    elif (Path(shape) / "config.json").is_file():
        try:
            config = AutoConfig.from_pretrained(shape)
        except Exception as error:  # Transformers fails with errors of many kinds
            raise ConfigError(f"no model can be read from {shape} ({first_line(error)})") from error
        check_causal(config, shape)
    else:
        raise ConfigError(f"{shape!r} is neither a folder with a config.json nor one of {', '.join(SHAPES)}")
    text = config.get_text_config()
    if layers is not None:
        if not 1 <= layers <= text.num_hidden_layers:
            raise ConfigError(f"layers must lie in [1, {text.num_hidden_layers}] for {shape}, got {layers}")
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    text.max_position_embeddings = max(tokens, getattr(text, "max_position_embeddings", 0) or 0)
    text.use_cache = False
    # Random weights, random tokens: dropout would only add what the compared runs do not share.
    for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
        if hasattr(text, name):
            setattr(text, name, 0.0)
    return config


def check_causal(config: Any, name: str) -> None:
    """Raises ConfigError for a model that Transformers does not know as a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"{name}: Transformers has no causal language model of the type {config.model_type}")


def random_model(
    config: Any, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0, attention: str = "sdpa"
) -> Any:
    """A causal language model with random weights, drawn on the device itself, in training mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)
    return model.train()


def random_plan(
    config: Any,
    *,
    forward_ratio: float,
    backward_ratio: float,
    kv: str = "kept",
    dense_layers: tuple[int, ...] = (0, -1),
    block_size: int = 64,
    bypass_rank: int = 64,
    **choices: Any,
) -> Plan:
    """A plan whose layers have a random predictor and, where rows skip, a random bypass of the usual sizes.

    Args:
        config: the model's.
        forward_ratio: share of rows that run a layer.
        backward_ratio: share of rows that pass gradient.
        kv: `kept` or `all`.
        dense_layers: layers that run densely; negative numbers count from the end.
        block_size: C.
        bypass_rank: R; 0 leaves the bypass out.
        **choices: further fields of Plan.
    """
    text, sizes = config.get_text_config(), CalibrationConfig()
    width = text.hidden_size
    choices = {"scorer": "predictor", **choices}
    plan = Plan.uniform(
        text.num_hidden_layers,
        forward_ratio=forward_ratio,
        backward_ratio=backward_ratio,
        dense_layers=dense_layers,
        kv=kv,
        block_size=block_size,
        **choices,
    )

    def equip(layer: LayerPlan) -> LayerPlan:
        if layer.is_dense:
            return layer
        predictor = bypass = None
        if plan.scorer == "predictor":
            predictor = PatternPredictor(
                width,
                pooled_features=sizes.pooled_features,
                query_widths=(sizes.predictor_width,) * 2,
                key_widths=(sizes.predictor_width,) * 2,
                rank=sizes.predictor_rank,
            )
        if layer.forward_ratio < 1 and bypass_rank:
            # Small, so that the stream of a random model stays finite over many layers.
            up_RM = 0.01 * torch.randn(bypass_rank, width) / bypass_rank**0.5
            bypass = Bypass(torch.randn(width, bypass_rank) / width**0.5, up_RM)
        return replace(layer, predictor=predictor, bypass=bypass)

    return replace(plan, layers=tuple(equip(layer) for layer in plan.layers))


def random_batch(
    vocabulary: int,
    tokens: int,
    *,
    share: float,
    seed: int,
    block_size: int = 64,
    ids_T: Tensor | None = None,
    span: int | None = None,
    local_share: float = 0.0,
) -> dict[str, Tensor]:
    """One sequence with a share of its blocks supervised, drawn as `LossRows` draws them.

    Args:
        vocabulary: V.
        tokens: T.
        share: of the blocks that carry loss; 1.0 for all.
        seed: of the draw of tokens and blocks.
        block_size: C.
        ids_T: (T,) token ids to use instead of random ones.
        span: rows of a run of drawn blocks; None draws single blocks.
        local_share: of the blocks that carry loss besides, and attend locally.

    Returns:
        `input_ids` and `labels`, (1, T) int64 on the CPU, and `local_rows`, (1, T) bool, where there are such blocks.
    """
    if ids_T is None:
        ids_T = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    labels_T = ids_T.clone()
    labels_T[0] = IGNORE
    sample = {"input_ids": ids_T.numpy(), "labels": labels_T.numpy(), "sample_id": str(seed)}
    return LossRows(WindowCollator(), share, block_size=block_size, span=span, local_share=local_share)([sample])
