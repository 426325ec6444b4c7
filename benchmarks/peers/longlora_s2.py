"""LongLoRA's shifted sparse attention: groups of a quarter of the sequence, half of the heads shifted by half a group.

As in the original the shift wraps around, so the first half group shares a group with the last one and may look at
later tokens. The embedding and the norms, which LongLoRA also trains, stay frozen: all methods train the same adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers.peer import Prepared, Setting, Unsupported, adapted, checkpoint_layers, plain_forward

OPTIONS = {"adapter": "model", "recompute": "none", "groups": "4"}
NAME = "longlora_s2"


def shifted_groups(query: Tensor, key: Tensor, value: Tensor, groups: int, scaling: float | None) -> Tensor:
    """Causal attention inside groups: (B, H, T, D) each, returns (B, T, H, D)."""
    batch, heads, tokens, dim = query.shape
    size, half = tokens // groups, heads // 2

    def cut(x: Tensor) -> Tensor:
        x = x.repeat_interleave(heads // x.shape[1], 1) if x.shape[1] < heads else x
        x = torch.cat([x[:, :half], x[:, half:].roll(-(size // 2), 2)], 1)
        return x.view(batch, heads, groups, size, dim).transpose(1, 2).reshape(batch * groups, heads, size, dim)

    out = F.scaled_dot_product_attention(cut(query), cut(key), cut(value), is_causal=True, scale=scaling)
    out = out.view(batch, groups, heads, size, dim).transpose(1, 2).reshape(batch, heads, tokens, dim)
    return torch.cat([out[:, :half], out[:, half:].roll(size // 2, 2)], 1).transpose(1, 2)


def prepare(config: Any, setting: Setting, options: dict[str, str]) -> Prepared:
    from transformers import AttentionInterface, AttentionMaskInterface

    groups = int(options["groups"])
    if setting.tokens % groups or config.get_text_config().num_attention_heads < 2:
        raise Unsupported(f"{setting.tokens} tokens cannot be cut into {groups} groups, or there is one head only")

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling=None, **_: Any) -> Any:
        return shifted_groups(query, key, value, groups, scaling), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    model = adapted(config, setting, options["adapter"], attention=NAME)
    checkpoint_layers(model, options["recompute"])
    return Prepared(model, plain_forward(model), lambda: {"attention": f"{groups} groups, half of the heads shifted"})
