"""Liger Kernel under PEFT: fused norms, RoPE, SwiGLU, and a loss that never forms all logits."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from typing import Any

from benchmarks.peers.peer import Prepared, Setting, Unsupported, adapted, checkpoint_layers, plain_forward

OPTIONS = {"adapter": "float32", "recompute": "none", "bits": "16"}


def patch(config: Any) -> None:
    """Puts Liger's kernels into Transformers' module, in this process, before a model is made.

    Raises:
        Unsupported: Liger is not installed, or has no kernels for this family.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise Unsupported("liger-kernel is not installed")
    from liger_kernel.transformers import monkey_patch

    kind = config.get_text_config().model_type
    apply = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get(kind)
    if apply is None:
        raise Unsupported(f"Liger {metadata.version('liger-kernel')} has no kernels for {kind}")
    apply(fused_linear_cross_entropy=True, cross_entropy=False)


def prepare(config: Any, setting: Setting, options: dict[str, str]) -> Prepared:
    patch(config)
    model = adapted(config, setting, options["adapter"], bits=options["bits"])
    checkpoint_layers(model, options["recompute"])
    return Prepared(model, plain_forward(model), lambda: {"liger": metadata.version("liger-kernel")})
