"""LongLoRA's shifted sparse attention: heads attend inside groups of a quarter, half of them in groups shifted by half.

*Source*: LongLoRA (arXiv 2309.12307), section 3.2. The groups at both ends of the shifted heads are halves: nothing
wraps around, so no row sees a later one. LongLoRA also trains norms and embeddings; here adapters are those of the
protocol for every method.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NAME = "shifted_groups"
GROUPS = 4


def group_edges(tokens: int, shifted: bool) -> list[int]:
    """Starts of the groups, and the end."""
    size = max(2, tokens // GROUPS)
    first = size // 2 if shifted else size
    return [0, *range(first, tokens, size), tokens]


def attend_groups(query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, shifted: bool, scaling: float) -> Tensor:
    """Causal attention inside each group: (B, H, T, D)."""
    edges = group_edges(query_BHTD.shape[2], shifted)
    pieces = []
    for start, end in itertools.pairwise(edges):
        parts = (x[:, :, start:end] for x in (query_BHTD, key_BHTD, value_BHTD))
        pieces.append(F.scaled_dot_product_attention(*parts, is_causal=end - start > 1, scale=scaling))
    return torch.cat(pieces, dim=2)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function. query (B, H, T, D), key and value (B, G, T, D); returns (B, T, H, D)."""
    heads, repeat = query.shape[1], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    half = heads // 2
    output = torch.cat(
        [
            attend_groups(query[:, :half], key[:, :half], value[:, :half], False, scaling),
            attend_groups(query[:, half:], key[:, half:], value[:, half:], True, scaling),
        ],
        dim=1,
    )
    return output.transpose(1, 2).contiguous(), None


@contextmanager
def shifted_groups(model: Any, plan: Any) -> Iterator[None]:
    """Inside, training forwards of the model attend in groups; it has to be left before anything is evaluated.

    Args:
        model: a Transformers causal language model.
        plan: not looked at.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before
