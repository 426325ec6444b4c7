"""LossRows: draws the rows of plain text that carry loss, by masking labels in the collator."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lemo.config import IN_RUNS
from lemo.core.layout import Layout
from lemo.errors import ConfigError, LabelsError
from lemo.runtime.batch import LOCAL_ROWS
from lemo.train.far_rows import block_scores, choose_far
from lemo.train.row_draw import (
    IGNORE,
    WEIGHTS,
    RowDraw,
    draw_runs,
    of_rows,
    predicted,
    predicting,
    sample_name,
    without_name,
)

_LOG = logging.getLogger("lemo")
PLACEMENTS = ("random", "spread", "tail", "hardest")
LEAST_SIZE = 0.25  # of the mean block loss: bounds the weight of easy blocks that are drawn by their loss


class LossRows(RowDraw):
    """A collator that keeps the labels of a share of blocks and masks the others.

    Rows that carry loss never skip a layer, so with loss on every token nothing could be skipped. Labels are masked in
    the collator because Transformers' Trainer counts `num_items_in_batch` from the batch: the loss stays a mean over
    the rows that are left.

    Row t predicts token t + 1: a block of rows [s, e) keeps labels[s+1 : e+1]. Blocks are those of `Layout`
    (`block_size` rows of one document from its first row), so a drawn block is exactly one forced block of the
    selection. The share is of the blocks of a sample that hold any supervised row, rounded to the nearest block, at
    least one. The draw depends on (seed, sample id, epoch) only, not on batch size, order or worker. Samples without a
    `sample_id` are named by a hash of their tokens.

    With a `span` drawn blocks come in runs of so many rows, so that rows with loss have rows with loss before them:
    under exact forward nothing of the gradient is lost between rows of a run. Runs lie on a circle, at drawn distances
    and from a drawn start, and one that reaches the end goes on at the beginning: every block has the same chance. The
    last run is shorter where the share says so.

    With `reweight` the batch has `loss_weights` (B, T): rows of a block that is drawn with probability p weigh 1/p,
    times the batch's share of rows that are left. Divided by the rows that are left, as the Trainer does, the weighted
    loss is then an unbiased estimate of the mean loss of all rows; exactly so for steps of one batch, and where the
    batches that a step accumulates keep the same share. `hardest` then draws blocks in proportion to their loss. Only
    the segmented loss of an attached model knows weights.

    With a `local_share` that share of blocks is drawn besides, among those that were not drawn: *local* loss rows,
    which attend as rows without gradient do under a plan's `context_window`. The batch then has `local_rows` (B, T),
    True for the rows of these blocks, and the attached model takes it from there. Which other rows are drawn does not
    depend on it. Documents with masked rows before learned ones, as where only answers are learned, have no local rows.
    With `repeats_beyond` the same rows carry loss, but which of them are far is not left to chance: see
    `lemo.train.far_rows`.

    During evaluation all labels count: `LemoTrainer` sees to it; with a plain Trainer pass this object to
    `LemoCallback`.
    """

    def __init__(
        self,
        collator: Any,
        share: float = 0.4,
        placement: str = "random",
        seed: int = 0,
        block_size: int = 64,
        *,
        span: int | None = None,
        reweight: bool = False,
        block_losses: Callable[[Any], Tensor] | None = None,
        local_share: float = 0.0,
        repeats_beyond: int | None = None,
    ) -> None:
        """Wraps a collator.

        Defaults here stay as they are, so that calls keep their meaning. What training does by default is said in
        `config.LossRowsConfig` alone; the README writes it out as a call.

        Args:
            collator: makes a batch with `labels` (or `shift_labels`) from a list of samples.
            share: share of blocks that carry loss; 1.0 masks nothing.
            placement: `random` blocks, `spread` evenly with a drawn offset, the `tail` of each document, or the
                `hardest`, those with the highest loss.
            seed: of the draw.
            block_size: rows per block; the plan's.
            span: rows of a run of drawn blocks, a multiple of `block_size`; None draws single blocks.
            reweight: weigh rows so that the loss estimates that of all rows without bias.
            block_losses: loss of each block of a sample, (blocks,), for `hardest`; `train.block_losses.BlockLosses`.
            local_share: share of blocks that carry loss and attend locally, besides `share`.
            repeats_beyond: the plan's `context_window`: far are then, of all drawn runs, those with the most rows that
                repeat what is only to be found beyond it. None leaves far those that were drawn first.

        Raises:
            ConfigError: a value is out of range, `hardest` without losses, `tail` with weights, a span with either, or
                a local share with any of them.
        """
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(f"share of loss rows must lie in (0, 1], got {share!r}")
        if placement not in PLACEMENTS:
            raise ConfigError(f"placement of loss rows must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
            raise ConfigError(f"block_size must be a positive integer, got {block_size!r}")
        if placement == "hardest" and block_losses is None:
            raise ConfigError("placement 'hardest' needs block_losses, an estimate of the loss of each block")
        if placement == "tail" and reweight:
            raise ConfigError("placement 'tail' cannot be reweighted: it never draws the blocks before")
        if span is not None and (isinstance(span, bool) or not isinstance(span, int) or span < 1 or span % block_size):
            raise ConfigError(f"span of loss rows must be a multiple of the block size {block_size}, got {span!r}")
        if span is not None and placement not in IN_RUNS:
            raise ConfigError(f"span of loss rows goes with placement random or spread, not with {placement!r}")
        check_local_share(local_share, share, placement, reweight)
        wrong = isinstance(repeats_beyond, bool) or not isinstance(repeats_beyond, int | None)
        if wrong or (repeats_beyond is not None and repeats_beyond < 1):
            raise ConfigError(f"repeats_beyond is a window of one row or more, or None; got {repeats_beyond!r}")
        self.repeats_beyond = repeats_beyond
        self.collator = collator
        self.span_blocks = 1 if span is None else span // block_size
        self.share, self.local_share = float(share), float(local_share)
        # A dense run on the same rows, and an evaluation, leave this off: nothing there tells loss rows apart.
        self.marks_local = True
        self.placement = placement
        self.seed = seed
        self.block_size = block_size
        self.reweight = reweight
        self.block_losses = block_losses
        self._told = False

    def __call__(self, features: Sequence[Any]) -> Any:
        """A batch of the wrapped collator with labels masked.

        Raises:
            LabelsError: the batch has no labels.
        """
        names = [sample_name(feature) for feature in features]
        batch = self.collator([without_name(feature) for feature in features])
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
            supervised_BT = predicting(supervised_BT)
        keep_BT, weight_BT, local_BT = self._draw(batch, supervised_BT, names, features)
        if self.local_share and self.marks_local:
            batch[LOCAL_ROWS] = local_BT
        if self.reweight:
            share = keep_BT.sum() / supervised_BT.sum().clamp_min(1)
            batch[WEIGHTS] = torch.where(keep_BT, weight_BT * share, 0.0)
        if not shifted:
            keep_BT = predicted(keep_BT)
        batch[key] = labels_BT.masked_fill(~keep_BT, IGNORE)
        return batch

    def _draw(
        self, batch: Any, supervised_BT: Tensor, names: Sequence[str], features: Sequence[Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T) bool, supervised rows in drawn blocks; fp32, one over their block's chance; bool, local rows."""
        rows, tokens = supervised_BT.shape
        layout = self.layout(batch, supervised_BT)
        candidates = layout.supervised_K.nonzero().squeeze(-1)
        sequence_K = layout.block_start_K // tokens
        drawn_K = torch.zeros(len(layout.block_start_K), dtype=torch.bool)
        local_K, plain_K = drawn_K.clone(), self._plain_blocks(layout)
        weight_K, score_K = torch.ones(len(drawn_K)), self._repeats(batch, layout)
        for b in range(rows):
            mine = candidates[sequence_K[candidates] == b]
            losses = None
            if self.placement == "hardest" and len(mine):
                own = (sequence_K == b).nonzero().squeeze(-1)
                alone = features[b : b + 1] if len(features) == rows else features
                losses = self._losses(alone, len(own))[mine - own[0]]
            generator = self.generator(names, b, rows)
            chosen, chance = self._choose(layout, mine, generator, losses)
            drawn_K[mine[chosen]] = True
            weight_K[mine] = (1 / chance).float()
            # Drawn after the others, which are then those that would be drawn without a local share.
            local = self._choose_local(mine[~drawn_K[mine] & plain_K[mine]], len(mine), len(chosen), generator)
            local_K[local] = True
            if score_K is not None and len(local):
                both = torch.cat([mine[chosen], local]).sort().values
                both = both[plain_K[both]]
                far = choose_far(both, score_K, int(drawn_K[both].sum()), self.span_blocks, generator)
                drawn_K[both], local_K[both] = False, True
                drawn_K[both[far]], local_K[both[far]] = True, False
        local_BT, loss_BT = (of_rows(x, layout, supervised_BT) & supervised_BT for x in (local_K, drawn_K | local_K))
        return loss_BT, of_rows(weight_K, layout, supervised_BT), local_BT

    def _repeats(self, batch: Any, layout: Layout) -> Tensor | None:
        """(K,) score by which far blocks are chosen among drawn ones; None where they are those drawn first."""
        if self.repeats_beyond is None or not self.local_share or not self.marks_local:
            return None
        if "input_ids" not in batch:
            raise LabelsError("LossRows(repeats_beyond=...) got a batch without input_ids: far rows are found in them")
        return block_scores(batch["input_ids"].reshape(-1), layout, self.repeats_beyond)

    def _plain_blocks(self, layout: Layout) -> Tensor:
        """(K,) bool: blocks of documents without a masked row before a learned one."""
        count = len(layout.document_start_D)
        document_S = torch.bucketize(layout.supervised_row_S, layout.document_start_D, right=True) - 1
        learned_D = torch.bincount(document_S, minlength=count)
        last_D = (layout.document_start_D - 1).scatter_reduce(0, document_S, layout.supervised_row_S, "amax")
        plain_D = learned_D == last_D - layout.document_start_D + 1
        if self.local_share and not self._told and not plain_D.any():
            _LOG.warning("no local loss rows are drawn where labels are masked already, as in answer-only samples")
            self._told = True
        return plain_D[layout.block_document_K]

    def _choose_local(self, blocks: Tensor, total: int, drawn: int, generator: np.random.Generator) -> Tensor:
        """Those of `blocks`, which were not drawn, that carry loss besides the `drawn` ones of `total`."""
        count = min(len(blocks), round((self.share + self.local_share) * total) - drawn)
        if not self.local_share or count < 1:
            return blocks[:0]
        return blocks[self._evenly(len(blocks), count, generator)]

    def _losses(self, features: Sequence[Any], blocks: int) -> Tensor:
        """Loss of every block of a sequence."""
        found = torch.cat([self.block_losses(feature).float().cpu() for feature in features])  # type: ignore[misc]
        if len(found) != blocks:
            raise ConfigError(f"block_losses gave {len(found)} losses for a sequence of {blocks} blocks")
        return found

    def _choose(
        self, layout: Layout, blocks: Tensor, generator: np.random.Generator, losses: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Indices into `blocks` of those that are drawn, and the chance of each block to be."""
        total = len(blocks)
        if total == 0:
            return torch.zeros(0, dtype=torch.int64), torch.ones(0)
        count = max(1, round(self.share * total))
        even = torch.full((total,), count / total, dtype=torch.float64)
        if self.placement == "tail":
            return _from_the_end(layout.block_document_K[blocks])[:count].sort().values, even
        if losses is not None and self.reweight:
            chance = draw_chances(losses, count)
            return draw_by_chance(chance, generator), chance
        if losses is not None:
            return losses.argsort(descending=True, stable=True)[:count].sort().values, even
        return self._evenly(total, count, generator), even

    def _evenly(self, total: int, count: int, generator: np.random.Generator) -> Tensor:
        """Ascending indices of `count` of `total` blocks, each with the same chance."""
        if self.span_blocks > 1:
            return draw_runs(total, count, self.span_blocks, self.placement == "spread", generator)
        if self.placement == "spread":
            return torch.from_numpy(np.floor((np.arange(count) + generator.random()) * total / count).astype(np.int64))
        return torch.from_numpy(np.sort(generator.permutation(total)[:count]))


def check_local_share(local_share: float, share: float, placement: str, reweight: bool) -> None:
    """Raises ConfigError unless so many blocks can be local loss rows besides `share`."""
    number = not isinstance(local_share, bool) and isinstance(local_share, int | float)
    if not number or not 0 <= local_share < 1:
        raise ConfigError(f"local_share of loss rows must lie in [0, 1), got {local_share!r}")
    if local_share == 0:
        return
    if share + local_share > 1 + 1e-9:
        raise ConfigError(f"share and local_share of loss rows add up to {share + local_share:g}, above 1")
    if placement not in IN_RUNS:
        raise ConfigError(f"local_share of loss rows goes with placement random or spread, not with {placement!r}")
    if reweight:
        raise ConfigError("local_share of loss rows cannot be reweighted: the two kinds of rows are drawn differently")


def draw_chances(losses_N: Tensor, count: int) -> Tensor:
    """Chances (N,) fp64 in (0, 1] that add up to `count`, in proportion to losses where these are not too far off.

    A block that would be drawn more than once is drawn for certain; one below a quarter of the mean counts as that.
    """
    size_N = losses_N.double()
    size_N = size_N.clamp_min(LEAST_SIZE * float(size_N.mean())).clamp_min(1e-9)
    certain_N = torch.zeros(len(size_N), dtype=torch.bool)
    while True:
        chance_N = (count - int(certain_N.sum())) * size_N / size_N[~certain_N].sum().clamp_min(1e-12)
        over_N = ~certain_N & (chance_N >= 1 - 1e-12)
        certain_N |= over_N
        if not over_N.any() or certain_N.sum() >= count:
            break
    chance_N[certain_N] = 1.0
    return chance_N


def draw_by_chance(chance_N: Tensor, generator: np.random.Generator) -> Tensor:
    """Ascending indices, as many as the chances add up to, each drawn with its own chance.

    Systematic sampling: blocks lie one after the other, in a drawn order, as stretches as long as their chance; a comb
    of distance 1 with a drawn offset falls on them.
    """
    order = torch.from_numpy(generator.permutation(len(chance_N)))
    ends = chance_N[order].cumsum(0)
    count = round(float(ends[-1]))
    comb = torch.arange(count, dtype=torch.float64) + float(generator.random())
    places = torch.searchsorted(ends, comb, right=True).clamp_max(len(order) - 1)
    return order[places].sort().values


def _from_the_end(document_N: Tensor) -> Tensor:
    """Indices ordered so that any number of first entries takes about the same share from each document's end."""
    _, size_N = torch.unique_consecutive(document_N, return_inverse=True)
    counts = torch.bincount(size_N)
    first = torch.cumsum(counts, 0) - counts
    place = torch.arange(len(document_N)) - first[size_N]
    distance = (counts[size_N] - 1 - place + 0.5) / counts[size_N]
    return torch.argsort(distance, stable=True)
