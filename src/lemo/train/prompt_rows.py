"""PromptRows: where only answers are learned, some rows of the prompts carry a part of the loss, too.

Rows without gradient learn nothing: of a prompt that a sparse plan passes over, layers are not adapted to read it.
Dense training does adapt them, through what answers attend to. Rows of the prompt that carry a loss of their own take
its place (docs/decisions/0019-prompt-rows.md). Others call the weight of a single such row `prompt_loss_weight`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lemo.errors import ConfigError, LabelsError
from lemo.runtime.batch import LOCAL_ROWS
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


class PromptRows(RowDraw):
    """A collator that gives labels and a weight to drawn rows of prompts.

    Of each sample, runs of blocks without any answer are drawn; their rows predict the next token. A row of an answer
    weighs 1, a drawn row `weight` times the sample's answer rows over its drawn ones, but never more than 1; all times
    a factor that makes the weights of a batch add up to its rows with loss: the loss is the weighted mean. Where a step
    has several batches, `LemoTrainer` makes it the weighted mean of them all. The draw depends on (seed, sample id,
    epoch) only. During evaluation answers alone count.

    The batch has `loss_weights` (B, T), which only the segmented loss of an attached model knows. Samples whose rows
    all carry loss, as plain text, stay as they are.
    """

    def __init__(
        self,
        collator: Any,
        share: float,
        weight: float,
        *,
        seed: int = 0,
        block_size: int = 64,
        span: int = 1024,
        local: bool = False,
        weight_of: Literal["answers", "row"] = "answers",
    ) -> None:
        """Wraps a collator.

        Args:
            collator: makes a batch with `labels` from a list of samples.
            share: of a sample's blocks, those of the prompt that carry loss.
            weight: of a sample's drawn rows together; its answers weigh 1 together.
            seed: of the draw.
            block_size: rows per block; the plan's.
            span: rows of a run of drawn blocks, a multiple of `block_size`.
            local: drawn rows attend within the plan's `context_window`, forward and backward; else to all keys.
            weight_of: `row` gives every drawn row the weight itself, at most 1, however long the answers are.

        Raises:
            ConfigError: a value is out of range.
        """
        if weight_of not in ("answers", "row"):
            raise ConfigError(f"weight_of of prompt rows must be 'answers' or 'row', got {weight_of!r}")
        for name, value, most in (("share", share, 1), ("weight", weight, 1 if weight_of == "row" else math.inf)):
            number = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
            if not number or not 0 < value <= most:
                wanted = "be a number above 0" if most == math.inf else f"lie in (0, {most}]"
                raise ConfigError(f"{name} of prompt rows must {wanted}, got {value!r}")
        if span < 1 or span % block_size:
            raise ConfigError(f"span of prompt rows must be a multiple of the block size {block_size}, got {span!r}")
        self.collator, self.share, self.weight = collator, float(share), float(weight)
        self.seed, self.block_size, self.span_blocks, self.local = seed, block_size, span // block_size, local
        self.weight_of = weight_of

    def __call__(self, features: Sequence[Any]) -> Any:
        """A batch of the wrapped collator with labels and weights of drawn prompt rows.

        Raises:
            LabelsError: the batch has no labels, or no tokens to predict.
        """
        names = [sample_name(feature) for feature in features]
        batch = self.collator([without_name(feature) for feature in features])
        if not self.enabled:
            return batch
        if "labels" not in batch or "input_ids" not in batch:
            raise LabelsError("PromptRows needs batches with labels and input_ids")
        labels_BT, ids_BT = batch["labels"], batch["input_ids"]
        answers_BT = predicting(labels_BT != IGNORE)
        drawn_BT = self._draw(batch, answers_BT, names)
        learned_BT = answers_BT | drawn_BT
        weight_BT = torch.where(answers_BT, 1.0, self._row_weight(answers_BT, drawn_BT)) * learned_BT
        batch[WEIGHTS] = weight_BT * (learned_BT.sum() / weight_BT.sum().clamp_min(1e-9))
        if self.local:
            batch[LOCAL_ROWS] = drawn_BT
        batch["labels"] = torch.where(predicted(drawn_BT), ids_BT, labels_BT)
        return batch

    def _row_weight(self, answers_BT: Tensor, drawn_BT: Tensor) -> Tensor:
        """(B, 1) weight of a drawn row of each sample."""
        if self.weight_of == "row":
            return torch.full((len(answers_BT), 1), self.weight, device=answers_BT.device)
        per_row_B1 = answers_BT.sum(1, keepdim=True) / drawn_BT.sum(1, keepdim=True).clamp_min(1)
        return (self.weight * per_row_B1).clamp_max(1.0)

    def _draw(self, batch: Any, answers_BT: Tensor, names: Sequence[str]) -> Tensor:
        """(B, T) bool: rows of prompts that carry loss; the last row of a document predicts nothing."""
        rows, tokens = answers_BT.shape
        layout = self.layout(batch, answers_BT)
        sequence_K = layout.block_start_K // tokens
        drawn_K = torch.zeros(len(sequence_K), dtype=torch.bool)
        for b in range(rows):
            mine = (sequence_K == b).nonzero().squeeze(-1)
            free = mine[~layout.supervised_K[mine]]
            count = min(len(free), max(1, round(self.share * len(mine))))
            if count:
                generator = self.generator(names, b, rows)
                drawn_K[free[draw_runs(len(free), count, self.span_blocks, False, generator)]] = True
        document_BT = layout.document_of_row_N.cpu().reshape(rows, tokens)
        goes_on_BT = torch.zeros_like(document_BT, dtype=torch.bool)
        goes_on_BT[:, :-1] = document_BT[:, 1:] == document_BT[:, :-1]
        return of_rows(drawn_K, layout, answers_BT) & goes_on_BT.to(answers_BT.device)


def even_weights(batches: Sequence[Any], of_all: Callable[[Tensor], Tensor] = lambda sums: sums) -> None:
    """Makes the loss of several batches of `PromptRows` the weighted mean of their rows, in place.

    In a batch alone weights add up to its rows with loss. Divided by those of all batches, a batch with few answers
    among many drawn rows would count for its rows, not for its weights.

    Args:
        batches: of one optimizer step, with `labels` and `loss_weights` (B, T), whose largest is that of an answer.
        of_all: sums (2,) of this process to those of all that share the step.
    """
    weighted = [batch for batch in batches if WEIGHTS in batch]
    if not weighted:
        return
    # As drawn: 1 for an answer.
    drawn = [batch[WEIGHTS] / batch[WEIGHTS].max().clamp_min(1e-9) for batch in weighted]
    rows = torch.stack([(batch["labels"][:, 1:] != IGNORE).sum() for batch in weighted]).sum()
    weight, count = of_all(torch.stack([torch.stack([w.sum() for w in drawn]).sum(), rows.to(drawn[0])])).to(drawn[0])
    for batch, weights_BT in zip(weighted, drawn, strict=True):
        batch[WEIGHTS] = weights_BT * (count / weight.clamp_min(1e-9))
