"""Layers run forward and backward while asking the device for anything is an error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def run_layers_without_waiting(handle: Any, model: Any, context: Any, tokens_BT: Tensor) -> None:
    """The decoder layers of a PEFT model with a fused plan attached, in a batch's context; fails where one waits."""
    base = model.get_base_model().model
    hidden = base.embed_tokens(tokens_BT)
    positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    tables = base.rotary_emb(hidden, positions[None])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with handle._running(context):
            for layer in base.layers:
                hidden = layer(hidden, position_embeddings=tables)
        hidden.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
