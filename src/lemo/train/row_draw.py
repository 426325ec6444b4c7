"""What collators that draw rows have in common: samples' names, epochs, runs of blocks, and labels without any draw."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lemo.core.layout import Layout
from lemo.errors import DataError, LabelsError
from lemo.runtime.batch import RunDense, read_layout

IGNORE = -100
WEIGHTS = "loss_weights"


class RowDraw:
    """A collator that changes which rows carry loss, drawn anew in each epoch, while training only.

    Attributes:
        seed: of the draw.
        block_size: rows per block; the plan's.
        epoch: of the draw.
        enabled: false leaves labels as the wrapped collator makes them, as evaluation wants them.
    """

    seed: int
    block_size: int
    enabled: bool = True
    _epoch_1: Tensor

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Puts the epoch where a DataLoader's workers see it change, however long they live."""
        draw = super().__new__(cls)
        draw._epoch_1 = torch.zeros(1, dtype=torch.int64)
        with suppress(RuntimeError):  # no shared memory: workers know the epoch in which they were started
            draw._epoch_1.share_memory_()
        return draw

    @property
    def epoch(self) -> int:
        """Of the draw."""
        return int(self._epoch_1)

    def set_epoch(self, epoch: int) -> None:
        """Makes the following batches draw anew; call it before the epoch's first batch."""
        self._epoch_1.fill_(int(epoch))

    @contextmanager
    def all_labels(self) -> Iterator[None]:
        """Changes no label inside; for evaluation."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def layout(self, batch: Any, supervised_BT: Tensor) -> Layout:
        """Blocks of a batch.

        Raises:
            LabelsError: the batch cannot be cut into blocks.
        """
        try:
            return read_layout(batch, supervised_BT, self.block_size)
        except RunDense as error:
            raise LabelsError(f"{type(self).__name__} cannot cut this batch into blocks: {error}") from error

    def generator(self, names: Sequence[str], sequence: int, sequences: int) -> np.random.Generator:
        """Of the draws for one sequence of a batch: of one sample, the same in whatever batch it is.

        A padding-free batch is one sequence of several samples: its draw depends on all of their names.
        """
        name = names[sequence] if len(names) == sequences else "+".join(names)
        digest = hashlib.sha256(f"{self.seed}|{name}|{self.epoch}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def predicting(labelled_BT: Tensor) -> Tensor:
    """(B, T) bool: rows t that predict a labelled token, which stands at t + 1."""
    return torch.cat([labelled_BT[:, 1:], torch.zeros_like(labelled_BT[:, :1])], dim=1)


def predicted(rows_BT: Tensor) -> Tensor:
    """(B, T) bool: tokens t + 1 that rows t predict."""
    return torch.cat([torch.zeros_like(rows_BT[:, :1]), rows_BT[:, :-1]], dim=1)


def of_rows(value_K: Tensor, layout: Layout, like_BT: Tensor) -> Tensor:
    """(B, T) value of each row's block, False or 0 for padding, on the device of `like_BT`."""
    block_of_row = layout.block_of_row_N.cpu()
    found_N = value_K[block_of_row.clamp(min=0)] * (block_of_row >= 0)
    return found_N.reshape(like_BT.shape).to(like_BT.device)


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
    """The sample's id, or a hash of its tokens.

    Raises:
        DataError: it has neither.
    """
    tokens = feature
    if isinstance(feature, Mapping):
        if feature.get("sample_id") is not None:
            return str(feature["sample_id"])
        tokens = feature.get("input_ids")
        if tokens is None:
            known = ", ".join(map(str, feature)) or "none"
            raise DataError(f"a sample has no 'input_ids' (keys: {known})")
    try:
        return hashlib.sha256(np.asarray(tokens, dtype=np.int64).tobytes()).hexdigest()
    except (TypeError, ValueError) as error:
        raise DataError(f"'input_ids' of a sample must be a list of tokens ({error})") from error


def without_name(feature: Any) -> Any:
    """The sample without its id, which collators of other packages cannot turn into a tensor."""
    if isinstance(feature, Mapping) and "sample_id" in feature:
        return {key: value for key, value in feature.items() if key != "sample_id"}
    return feature
