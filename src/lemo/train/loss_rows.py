"""LossRows: draws the rows of plain text that carry loss, by masking labels in the collator."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lemo.core.layout import Layout
from lemo.errors import ConfigError, LabelsError
from lemo.runtime.batch import RunDense, read_layout

IGNORE = -100
PLACEMENTS = ("random", "spread", "tail")


class LossRows:
    """A collator that keeps the labels of a share of blocks and masks the others.

    Rows that carry loss never skip a layer, so with loss on every token nothing could be skipped. Labels are masked in
    the collator because Transformers' Trainer counts `num_items_in_batch` from the batch: the loss stays a mean over
    the rows that are left.

    Row t predicts token t + 1: a block of rows [s, e) keeps labels[s+1 : e+1]. Blocks are those of `Layout`
    (`block_size` rows of one document from its first row), so a drawn block is exactly one forced block of the
    selection. The share is of the blocks of a sample that hold any supervised row, rounded to the nearest block, at
    least one. The draw depends on (seed, sample id, epoch) only, not on batch size, order or worker. Samples without a
    `sample_id` are named by a hash of their tokens.

    During evaluation all labels count: `LemoTrainer` sees to it; with a plain Trainer pass this object to
    `LemoCallback`.
    """

    def __init__(
        self, collator: Any, share: float = 0.4, placement: str = "random", seed: int = 0, block_size: int = 64
    ) -> None:
        """Wraps a collator.

        Args:
            collator: makes a batch with `labels` (or `shift_labels`) from a list of samples.
            share: share of blocks that carry loss; 1.0 masks nothing.
            placement: `random` blocks, `spread` evenly with a drawn offset, or the `tail` of each document.
            seed: of the draw.
            block_size: rows per block; the plan's.

        Raises:
            ConfigError: a value is out of range.
        """
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(f"share of loss rows must lie in (0, 1], got {share!r}")
        if placement not in PLACEMENTS:
            raise ConfigError(f"placement of loss rows must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
            raise ConfigError(f"block_size must be a positive integer, got {block_size!r}")
        self.collator = collator
        self.share = float(share)
        self.placement = placement
        self.seed = seed
        self.block_size = block_size
        self.epoch = 0
        self.enabled = True

    def set_epoch(self, epoch: int) -> None:
        """Makes the following batches draw anew; call it before the epoch's first batch."""
        self.epoch = int(epoch)

    @contextmanager
    def all_labels(self) -> Iterator[None]:
        """Masks nothing inside; for evaluation."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def __call__(self, features: Sequence[Any]) -> Any:
        """A batch of the wrapped collator with labels masked.

        Raises:
            LabelsError: the batch has no labels.
        """
        names = [_sample_name(feature) for feature in features]
        batch = self.collator([_without_name(feature) for feature in features])
        if not self.enabled or self.share == 1.0:
            return batch
        shifted = "shift_labels" in batch
        key = "shift_labels" if shifted else "labels"
        if key not in batch:
            raise LabelsError("LossRows got a batch without labels: the wrapped collator must make them")
        labels_BT = batch[key]
        # supervised_BT[b, t]: row t predicts something.
        supervised_BT = labels_BT != IGNORE
        if not shifted:
            supervised_BT = torch.cat([supervised_BT[:, 1:], torch.zeros_like(supervised_BT[:, :1])], dim=1)
        keep_BT = self._draw(batch, supervised_BT, names)
        if not shifted:
            keep_BT = torch.cat([torch.zeros_like(keep_BT[:, :1]), keep_BT[:, :-1]], dim=1)
        batch[key] = labels_BT.masked_fill(~keep_BT, IGNORE)
        return batch

    def _draw(self, batch: Any, supervised_BT: Tensor, names: Sequence[str]) -> Tensor:
        """(B, T) bool: supervised rows that lie in drawn blocks."""
        rows, tokens = supervised_BT.shape
        try:
            layout = read_layout(batch, supervised_BT, self.block_size)
        except RunDense as error:
            raise LabelsError(f"LossRows cannot cut this batch into blocks: {error}") from error
        candidates = layout.supervised_K.nonzero().squeeze(-1)
        sequence = layout.block_start_K[candidates] // tokens
        drawn_K = torch.zeros(len(layout.block_start_K), dtype=torch.bool)
        for b in range(rows):
            mine = candidates[sequence == b]
            # A padding-free batch is one sequence of several samples: its draw depends on all of their names.
            name = names[b] if len(names) == rows else "+".join(names)
            drawn_K[mine[self._choose(layout, mine, name)]] = True
        block_of_row = layout.block_of_row_N.cpu()
        inside_N = (block_of_row >= 0) & drawn_K[block_of_row.clamp(min=0)]
        return inside_N.reshape(rows, tokens).to(supervised_BT.device) & supervised_BT

    def _choose(self, layout: Layout, blocks: Tensor, name: str) -> Tensor:
        """Indices into `blocks` of those that are drawn."""
        total = len(blocks)
        if total == 0:
            return torch.zeros(0, dtype=torch.int64)
        count = max(1, round(self.share * total))
        if self.placement == "tail":
            return _from_the_end(layout.block_document_K[blocks])[:count].sort().values
        digest = hashlib.sha256(f"{self.seed}|{name}|{self.epoch}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:16], "little"))
        if self.placement == "spread":
            steps = np.floor((np.arange(count) + generator.random()) * total / count).astype(np.int64)
            return torch.from_numpy(steps)
        return torch.from_numpy(np.sort(generator.permutation(total)[:count]))


def _from_the_end(document_N: Tensor) -> Tensor:
    """Indices ordered so that any number of first entries takes about the same share from each document's end."""
    _, size_N = torch.unique_consecutive(document_N, return_inverse=True)
    counts = torch.bincount(size_N)
    first = torch.cumsum(counts, 0) - counts
    place = torch.arange(len(document_N)) - first[size_N]
    distance = (counts[size_N] - 1 - place + 0.5) / counts[size_N]
    return torch.argsort(distance, stable=True)


def _sample_name(feature: Any) -> str:
    """The sample's id, or a hash of its tokens."""
    if isinstance(feature, dict) and feature.get("sample_id") is not None:
        return str(feature["sample_id"])
    tokens = feature["input_ids"] if isinstance(feature, dict) and "input_ids" in feature else feature
    return hashlib.sha256(np.asarray(tokens, dtype=np.int64).tobytes()).hexdigest()


def _without_name(feature: Any) -> Any:
    """The sample without its id, which collators of other packages cannot turn into a tensor."""
    if isinstance(feature, dict) and "sample_id" in feature:
        return {key: value for key, value in feature.items() if key != "sample_id"}
    return feature
