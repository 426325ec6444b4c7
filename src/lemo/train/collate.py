"""Windows as a dataset, and the collator that pads them into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lemo.train.windows import Window

IGNORE = -100


class WindowDataset(Dataset):
    """Windows as samples: `input_ids`, `labels` (-100 where nothing is learned), `lengths`, `sample_id`."""

    def __init__(self, windows: Sequence[Window]) -> None:
        """Keeps the windows; tokens are copied when a sample is asked for."""
        self.windows = list(windows)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample; arrays are int64, the label of a document's first token is always -100."""
        window = self.windows[index]
        tokens_T = window.tokens_T.astype(np.int64)
        labels_T = tokens_T.copy()
        if window.learned_T is not None:
            labels_T[~window.learned_T] = IGNORE
        lengths = window.lengths or (len(tokens_T),)
        labels_T[np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)] = IGNORE
        return {"input_ids": tokens_T, "labels": labels_T, "lengths": lengths, "sample_id": window.sample_id}


@dataclass
class WindowCollator:
    """Pads samples of `WindowDataset` to the longest of the batch.

    A batch of whole windows has `input_ids` and `labels` only, so that attention stays plain causal; padding adds
    `attention_mask`. A batch with a packed window has no mask, because a mask hides document borders from
    Transformers: it has `position_ids` that restart with each document and `seq_idx` with the number of the document
    (-1 for padding, which is a document that nobody sees). All tensors are (B, T) int64; labels of padding are -100.

    Attributes:
        pad_id: token that fills.
        side: where padding goes.
    """

    pad_id: int = 0
    side: Literal["right", "left"] = "right"

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """One batch."""
        longest = max(len(feature["input_ids"]) for feature in features)
        packed = any(len(feature.get("lengths", ())) > 1 for feature in features)
        batch = {
            "input_ids": self._stack([f["input_ids"] for f in features], longest, self.pad_id),
            "labels": self._stack([f["labels"] for f in features], longest, IGNORE),
        }
        if packed:
            documents = [np.repeat(np.arange(len(f["lengths"])), f["lengths"]) for f in features]
            positions = [np.concatenate([np.arange(n) for n in f["lengths"]]) for f in features]
            batch["seq_idx"] = self._stack(documents, longest, -1)
            batch["position_ids"] = self._stack(positions, longest, None)
        elif any(len(feature["input_ids"]) < longest for feature in features):
            batch["attention_mask"] = self._stack([np.ones(len(f["input_ids"])) for f in features], longest, 0)
        return batch

    def _stack(self, rows: Sequence[Any], longest: int, fill: int | None) -> Tensor:
        """Pads rows to one (B, T) tensor; `fill` None counts up from 0 in the padding."""
        out = torch.empty(len(rows), longest, dtype=torch.int64)
        for b, row in enumerate(rows):
            values = torch.as_tensor(np.asarray(row, dtype=np.int64))
            missing = longest - len(values)
            padding = torch.arange(missing) if fill is None else torch.full((missing,), fill)
            out[b] = torch.cat([values, padding] if self.side == "right" else [padding, values])
        return out
