"""Plain torch specification of linear_ce."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_ce_reference(
    hidden_NM: Tensor,
    weight_VM: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Cross-entropy of all logits at once; see `lemo.ops.linear_ce` for the contract."""
    labels_N = labels_N.reshape(-1)
    labelled_N = torch.ones_like(labels_N, dtype=torch.bool) if ignore_index is None else labels_N != ignore_index
    rows = labelled_N.nonzero().squeeze(1)
    logits_NV = F.linear(hidden_NM.reshape(-1, hidden_NM.shape[-1])[rows], weight_VM, bias_V)
    logits_NV = shape_logits(logits_NV, softcap, logit_scale)
    return F.cross_entropy(logits_NV, labels_N[rows], reduction="sum") / count_items(num_items, len(rows))


def shape_logits(logits_NV: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    """What a model does to its head's output, in fp32 (fp64 for fp64): scale, then softcap·tanh(z/softcap)."""
    z_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) * logit_scale
    return z_NV if softcap is None else softcap * torch.tanh(z_NV / softcap)


def count_items(num_items: int | Tensor | None, valid_rows: int) -> int | Tensor:
    """What the summed loss is divided by: `num_items`, or the rows that carry a label; at least 1."""
    if isinstance(num_items, torch.Tensor):
        return num_items.clamp(min=1)
    return max(valid_rows if num_items is None else num_items, 1)
