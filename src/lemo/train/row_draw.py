"""What collators that draw rows have in common: samples' names, epochs, runs of blocks, and labels without any draw."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
WEIGHTS = "loss_weights"


class RowDraw:
    """A collator that changes which rows carry loss, drawn anew in each epoch, while training only.

    Attributes:
        epoch: of the draw.
        enabled: false leaves labels as the wrapped collator makes them, as evaluation wants them.
    """

    epoch: int = 0
    enabled: bool = True

    def set_epoch(self, epoch: int) -> None:
        """Makes the following batches draw anew; call it before the epoch's first batch."""
        self.epoch = int(epoch)

    @contextmanager
    def all_labels(self) -> Iterator[None]:
        """Changes no label inside; for evaluation."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before


def draw_generator(seed: int, name: str, epoch: int) -> np.random.Generator:
    """Of the draws for one sample in one epoch, whatever batch it is in."""
    digest = hashlib.sha256(f"{seed}|{name}|{epoch}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def draw_runs(total: int, count: int, span: int, spread: bool, generator: np.random.Generator) -> Tensor:
    """Ascending indices of `count` of `total` blocks on a circle, in runs of `span` and one that is shorter.

    Args:
        total: blocks.
        count: of them that are drawn.
        span: blocks of a run.
        spread: runs lie at even distances instead of drawn ones.
        generator: of the draw.
    """
    runs = -(-count // span)
    lengths = np.full(runs, span)
    lengths[-1] = count - span * (runs - 1)
    lengths, free = generator.permutation(lengths), total - count
    if spread:
        ends = np.floor(np.arange(1, runs + 1) * free / runs).astype(np.int64)
        gaps = np.diff(ends, prepend=0)
    else:
        # Every way to part the free blocks among the runs is equally likely.
        bars = np.sort(generator.choice(free + runs - 1, runs - 1, replace=False))
        gaps = np.diff(bars, prepend=-1, append=free + runs - 1) - 1
    starts = np.cumsum(lengths + gaps) - lengths
    places = np.concatenate([start + np.arange(length) for start, length in zip(starts, lengths, strict=True)])
    return torch.from_numpy(np.sort((places + generator.integers(total)) % total))


def sample_name(feature: Any) -> str:
    """The sample's id, or a hash of its tokens."""
    if isinstance(feature, dict) and feature.get("sample_id") is not None:
        return str(feature["sample_id"])
    tokens = feature["input_ids"] if isinstance(feature, dict) and "input_ids" in feature else feature
    return hashlib.sha256(np.asarray(tokens, dtype=np.int64).tobytes()).hexdigest()


def without_name(feature: Any) -> Any:
    """The sample without its id, which collators of other packages cannot turn into a tensor."""
    if isinstance(feature, dict) and "sample_id" in feature:
        return {key: value for key, value in feature.items() if key != "sample_id"}
    return feature
