"""Which blocks of one text run in which layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
        starts_K: (K,) first row of each block in the batch's flat rows.
        lengths_K: (K,) rows of each block.
        places_K: (K,) number of each block inside its document.
    """

    kept_LK: list[list[float]]
    supervised_K: list[bool]
    block_size: int
    rows: str
    starts_K: list[int] = field(default_factory=list)
    lengths_K: list[int] = field(default_factory=list)
    places_K: list[int] = field(default_factory=list)


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
    first_D = torch.searchsorted(layout.block_document_K, torch.arange(len(layout.document_start_D)))
    return KeepMap(
        kept_LK,
        layout.supervised_K.tolist(),
        handle.plan.block_size,
        rows,
        layout.block_start_K.tolist(),
        layout.block_length_K.tolist(),
        (torch.arange(blocks) - first_D[layout.block_document_K]).tolist(),
    )


def never_dropped_places(maps: Sequence[KeepMap]) -> list[list[int]]:
    """Per layer, the places (number of a block in its document) that ran whole in every document that has them.

    Blocks that carry loss never skip and say nothing, so they do not count; a place needs two others to be listed.
    """
    found = []
    for layer in range(len(maps[0].kept_LK)):
        seen: Counter[int] = Counter()
        dropped = set()
        for each in maps:
            for place, share, loss in zip(each.places_K, each.kept_LK[layer], each.supervised_K, strict=True):
                seen[place] += not loss
                if share < 1:
                    dropped.add(place)
        found.append(sorted(place for place, count in seen.items() if count >= 2 and place not in dropped))
    return found


def never_dropped_tokens(
    maps: Sequence[KeepMap], tokens: Sequence[Sequence[int]], *, least: int = 5, most: int = 12
) -> list[list[tuple[int, int]]]:
    """Per layer, (token, occurrences) of tokens that never stood in a dropped block, the most frequent first.

    Blocks that carry loss do not count.

    Args:
        maps: of some batches of one sequence.
        tokens: ids of each batch.
        least: occurrences that a token needs in competing blocks.
        most: tokens to list per layer.
    """
    found = []
    for layer in range(len(maps[0].kept_LK)):
        seen: Counter[int] = Counter()
        dropped: set[int] = set()
        for each, ids in zip(maps, tokens, strict=True):
            blocks = zip(each.starts_K, each.lengths_K, each.kept_LK[layer], each.supervised_K, strict=True)
            for start, length, share, loss in blocks:
                if loss:
                    continue
                inside = ids[start : start + length]
                seen.update(inside)
                if share < 1:
                    dropped.update(inside)
        kept = [(token, count) for token, count in seen.most_common() if count >= least and token not in dropped]
        found.append(kept[:most])
    return found
