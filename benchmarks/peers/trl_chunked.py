"""TRL's loss over tiles of the vocabulary, on supervised rows only, around Transformers and PEFT.

SFTTrainer puts this head on its model in its constructor; here the same function is called without a Trainer, so that
all methods run the same training loop. It computes what SFTTrainer has it compute: log-probabilities, entropy and hits.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata
from typing import Any

from benchmarks.peers.peer import Prepared, Setting, Unsupported, add_lora, checkpoint_layers
from lemo.train.rehearsal import random_model

OPTIONS = {"adapter": "model", "recompute": "none"}


def prepare(config: Any, setting: Setting, options: dict[str, str]) -> Prepared:
    if importlib.util.find_spec("trl") is None:
        raise Unsupported("trl is not installed")
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError as error:
        raise Unsupported(f"trl {metadata.version('trl')} cannot put its loss on a model: {error}") from error
    model = random_model(config, dtype=setting.torch_dtype, device=setting.device, seed=setting.seed)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    model = add_lora(model, setting, options["adapter"])
    checkpoint_layers(model, options["recompute"])
    return Prepared(
        model,
        lambda batch: model(**batch, fused_lm_head=True).loss,
        lambda: {"trl": metadata.version("trl")},
    )
