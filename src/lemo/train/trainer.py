"""LemoTrainer: Transformers' Trainer with lemo's logging; what it trains is what a plain Trainer would train."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from lemo.runtime.attach import Handle
from lemo.train.callback import LemoCallback
from lemo.train.row_draw import RowDraw


class LemoTrainer(Trainer):
    """A Trainer that logs lemo's numbers. Adds logging only; the training loop is Transformers'.

    Evaluation computes its loss in segments without logits, and with the samples' own labels when the collator is a
    `LossRows` or `PromptRows`.

    Attributes:
        handle: the attached plan, or None for a dense run.
        log_callback: where tokens, seconds and peak memory stand after training.
    """

    def __init__(
        self,
        *args: Any,
        handle: Handle | None = None,
        metrics_path: str | Path | None = None,
        console: Any = None,
        **kwargs: Any,
    ) -> None:
        """Takes what Trainer takes, and three things more.

        Args:
            *args: of Trainer.
            handle: the attached plan.
            metrics_path: file that gets a JSON line per log entry.
            console: rich Console for the log lines; None for standard error.
            **kwargs: of Trainer.
        """
        super().__init__(*args, **kwargs)
        self.handle = handle
        loss_rows = self.data_collator if isinstance(self.data_collator, RowDraw) else None
        self.log_callback = LemoCallback(
            handle, loss_rows=loss_rows, metrics_path=metrics_path, console=console, opens_evaluation=False
        )
        for noisy in (PrinterCallback, ProgressCallback):
            self.remove_callback(noisy)
        self.add_callback(self.log_callback)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As Trainer's; hooks and memory tracking end also when it raises."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            self.log_callback.restore(resume_from_checkpoint, self.args.process_index)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.log_callback.close()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's, with the samples' own labels and no logits."""
        with self._evaluating():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, with the samples' own labels."""
        with self._evaluating(loss_only=False):
            return super().predict(*args, **kwargs)

    @contextmanager
    def _evaluating(self, *, loss_only: bool = True) -> Any:
        with ExitStack() as stack:
            if isinstance(self.data_collator, RowDraw):
                stack.enter_context(self.data_collator.all_labels())
            if self.handle is not None and loss_only and self.args.prediction_loss_only:
                stack.enter_context(self.handle.loss_only())
            yield
