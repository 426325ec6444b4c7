"""Which blocks of one text run in which layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lemo.errors import DataError
from lemo.eval.perplexity import last_hidden
from lemo.runtime.attach import Handle
from lemo.runtime.batch import read_layout, supervised_rows
from lemo.runtime.model import causal_model


@dataclass(frozen=True)
class KeepMap:
    """Blocks that run, by layer.

    Attributes:
        kept_LK: (L, K) share of each block's rows that run, 0 to 1.
        supervised_K: (K,) whether a block holds a row that carries loss.
        block_size: rows per block.
        rows: which rows are meant, `forward` or `backward`.
    """

    kept_LK: list[list[float]]
    supervised_K: list[bool]
    block_size: int
    rows: str


def keep_map(
    model: Any, batch: Mapping[str, Any], handle: Handle, *, rows: Literal["forward", "backward"] | None = None
) -> KeepMap:
    """Selects the rows of a batch as training would and says which blocks run each layer.

    Args:
        model: the model that `handle` is attached to.
        batch: one batch with labels that leave rows to skip.
        handle: the attached plan.
        rows: rows that run forward, or those that pass gradient; None shows forward where the plan skips there, else
            backward.

    Raises:
        DataError: the batch has no labels.
    """
    if rows is None:
        rows = "forward" if any(layer.forward_ratio < 1 for layer in handle.plan.layers) else "backward"
    device = causal_model(model).get_input_embeddings().weight.device
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    mask_BT = supervised_rows(inputs)
    if mask_BT is None:
        raise DataError("a keep map needs a batch with labels")
    layout = read_layout(inputs, mask_BT, handle.plan.block_size)
    was_training = model.training
    model.eval()
    try:
        last_hidden(model, inputs, mask_BT, handle=handle, sparse=True)
    finally:
        model.train(was_training)
    blocks = len(layout.block_start_K)
    kept_LK = []
    for index in range(len(handle.plan.layers)):
        selection = handle.selections.get(index)
        chosen = None if selection is None else getattr(selection, rows)
        if chosen is None:
            kept_LK.append([1.0] * blocks)
            continue
        count_K = torch.bincount(layout.block_of_row_N[chosen.chosen()], minlength=blocks).cpu()
        kept_LK.append((count_K / layout.block_length_K).tolist())
    return KeepMap(kept_LK, layout.supervised_K.tolist(), handle.plan.block_size, rows)
