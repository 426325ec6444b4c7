"""Unsloth through FastLanguageModel. It loads checkpoints only, so a random one is written first."""

from __future__ import annotations

import importlib.util
import tempfile
from importlib import metadata
from typing import Any

import torch

from benchmarks.peers.peer import QKVO, Prepared, Setting, Unsupported, plain_forward
from lemo.train.rehearsal import random_model

OPTIONS = {"recompute": "layer"}
# In the words of its own metadata; what it needs beside what lemo needs, and the releases it excludes.
NEEDS = (
    "unsloth-zoo, xformers, bitsandbytes, torchvision, diffusers and datasets, transformers up to 5.17.0, trl up to "
    "1.15.0, and an NVIDIA GPU at import"
)


def prepare(config: Any, setting: Setting, options: dict[str, str]) -> Prepared:
    if importlib.util.find_spec("unsloth") is None:
        raise Unsupported(f"unsloth is not installed; it needs {NEEDS}")
    if not torch.cuda.is_available():
        raise Unsupported("unsloth refuses to be imported without a GPU")
    try:
        from unsloth import FastLanguageModel
    except Exception as error:  # whatever stops it is the result
        raise Unsupported(f"unsloth {metadata.version('unsloth')} cannot be imported: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        random_model(config, dtype=setting.torch_dtype, device=setting.device, seed=setting.seed).save_pretrained(
            folder
        )
        torch.cuda.empty_cache()
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=setting.tokens, dtype=setting.torch_dtype, load_in_4bit=False
        )
    targets = [*QKVO[:4], *(("gate_proj", "up_proj", "down_proj") if setting.lora == "all" else ())]
    model = FastLanguageModel.get_peft_model(
        model,
        r=setting.rank,
        lora_alpha=setting.alpha,
        lora_dropout=0,
        target_modules=targets,
        use_gradient_checkpointing="unsloth" if options["recompute"] == "layer" else False,
    )
    return Prepared(model.train(), plain_forward(model), lambda: {"unsloth": metadata.version("unsloth")})
