"""LemoTrainer: Transformers' Trainer with lemo's logging; what it trains is what a plain Trainer would train."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from lemo.runtime.attach import Handle
from lemo.train.callback import LemoCallback
from lemo.train.guards import StepGuard, check_weights
from lemo.train.master import MasterWeights
from lemo.train.prompt_rows import PromptRows, even_weights
from lemo.train.row_draw import RowDraw


class LemoTrainer(Trainer):
    """A Trainer that logs lemo's numbers and guards its weights; the training loop is Transformers'.

    Evaluation computes its loss in segments without logits, and with the samples' own labels when the collator is a
    `LossRows` or `PromptRows`. `eval_loss` is a mean over tokens, whatever windows they are in.

    Attributes:
        handle: the attached plan, or None for a dense run.
        log_callback: where tokens, seconds and peak memory stand after training.
        guard: skips steps whose loss or gradient is not finite, and knows which they were.
    """

    def __init__(
        self,
        *args: Any,
        handle: Handle | None = None,
        metrics_path: str | Path | None = None,
        console: Any = None,
        master_weights: bool = False,
        **kwargs: Any,
    ) -> None:
        """Takes what Trainer takes, and four things more.

        Args:
            *args: of Trainer.
            handle: the attached plan.
            metrics_path: file that gets a JSON line per log entry.
            console: rich Console for the log lines; None for standard error.
            master_weights: an optimizer that this trainer makes keeps trained 16-bit parameters in fp32
                (`lemo.train.master`); not under FSDP or DeepSpeed, which have their own way.
            **kwargs: of Trainer.
        """
        super().__init__(*args, **kwargs)
        self.master_weights = master_weights
        self.handle = handle
        loss_rows = self.data_collator if isinstance(self.data_collator, RowDraw) else None
        self.log_callback = LemoCallback(
            handle, loss_rows=loss_rows, metrics_path=metrics_path, console=console, opens_evaluation=False
        )
        for noisy in (PrinterCallback, ProgressCallback):
            self.remove_callback(noisy)
        self.add_callback(self.log_callback)
        self.guard = StepGuard(lambda text: self.log_callback.say(text, markup=False), self._sample_ids)
        self.add_callback(self.guard)
        self._tallies: list[Tensor] | None = None
        self._masters: MasterWeights | None = None
        self._shown_loss: Tensor | None = None

    def create_optimizer(self, model: Any = None) -> Any:
        """As Trainer's; with fp32 copies of what is trained in 16 bits, if asked for."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if self.master_weights and not (given or self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._masters = MasterWeights(optimizer)
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        """As Trainer's; some optimizers do not say when they have loaded their state."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._masters is not None:
            self._masters.restore()

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's; what PEFT widens to fp32 when it loads an adapter gets its dtype back."""
        with _keeping_dtypes(self.model):
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        """As Trainer's; dtypes stay."""
        with _keeping_dtypes(self.model):
            super()._load_best_model()

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

    def take_up(self, checkpoint: str | Path) -> int:
        """Loads what training left behind in a checkpoint with nothing to train after it; returns its step."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        best = Path(state.best_model_checkpoint or checkpoint)
        # A run's folder may have been moved since.
        found = best if best.is_dir() else Path(checkpoint).parent / best.name
        self._load_from_checkpoint(str(found if self.args.load_best_model_at_end else checkpoint))
        self.log_callback.restore(checkpoint, self.args.process_index)
        self.state = state
        return state.global_step

    def end(self) -> list[str]:
        """What is worth saying of how training ended: that it stopped early, to which step's weights it went back."""
        state, lines = self.state, []
        if state.global_step < state.max_steps:
            lines.append(f"stopped early, after step {state.global_step} of {state.max_steps}")
        best = state.best_global_step
        if self.args.load_best_model_at_end and best and best != state.global_step:
            lines.append(
                f"the adapter is that of step {best}, whose validation loss was lowest: {state.best_metric:.4f}"
            )
        return lines

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; rows of prompts and of answers weigh the same in all batches of a step."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if items is not None and isinstance(self.data_collator, PromptRows):
            even_weights(batches, self._of_all_processes)
        return batches, items

    def _of_all_processes(self, sums_S: Tensor) -> Tensor:
        """Sums over the processes whose tokens make one mean."""
        if self.args.world_size == 1 or not self.args.average_tokens_across_devices:
            return sums_S
        return self.accelerator.gather(sums_S.to(self.args.device)[None]).sum(0)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's; the guard gets to see the loss.

        What is logged has the last finite loss in the place of one that is not: Trainer's sum would never lose it.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.guard.watch(loss, inputs)
        last = torch.zeros_like(loss) if self._shown_loss is None else self._shown_loss
        self._shown_loss = torch.where(torch.isfinite(loss), loss, last)
        return self._shown_loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's; lemo's figures are among those that trackers get."""
        if "loss" in logs and self.is_in_train:
            logs.update(self.log_callback.figures(self.args))
            if self.guard.skipped:
                logs["skipped_steps"] = len(self.guard.skipped)
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, for checkpoints too; weights that are not finite are not saved.

        Raises:
            DivergedError: they are not.
        """
        shards = self.is_fsdp_enabled or self.is_deepspeed_enabled
        check_weights(self.model, f"step {self.state.global_step}", self.args if shards else None)
        super().save_model(output_dir, *args, **kwargs)

    def _sample_ids(self, rows_T: Sequence[Tensor]) -> list[str]:
        """Ids of the training samples with these tokens, which may be padded; none where the dataset is not lemo's."""
        windows, found = getattr(self.train_dataset, "windows", ()), []
        for row in (row_T.cpu().numpy() for row_T in rows_T):
            same = (w for w in windows if np.array_equal(w.tokens_T, row[: len(w.tokens_T)]))
            found += [window.sample_id for window in same][:1]
        return found

    def _evaluate(self, trial: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's; a run that was asked to stop saves before, too: whoever stopped it may not wait for so long."""
        stops = self.control.should_training_stop and self.state.global_step < self.state.max_steps
        if stops and self.control.should_save:
            self._save_checkpoint(self.model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self.control.should_save = True
        return super()._evaluate(trial, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's, with the samples' own labels and no logits."""
        with self._evaluating():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, with the samples' own labels."""
        with self._evaluating(loss_only=False):
            return super().predict(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; the loss is a mean over tokens instead of one over batches."""
        self._tallies = []
        try:
            output = super().evaluation_loop(*args, **kwargs)
            tallies = [tally.cpu().double() for tally in self._tallies]
        finally:
            self._tallies = None
        loss_N, tokens_N = torch.cat(tallies).unbind(1) if tallies else torch.zeros(2, 1)
        key = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if key in output.metrics and tokens_N.sum() > 0:
            counted = tokens_N > 0
            output.metrics[key] = float((loss_N * tokens_N)[counted].sum() / tokens_N.sum())
        return output

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; remembers how many tokens the loss is of."""
        found = super().prediction_step(model, inputs, *args, **kwargs)
        labels_BT = inputs.get("labels")
        if (
            self._tallies is not None
            and found[0] is not None
            and isinstance(labels_BT, Tensor)
            and labels_BT.dim() == 2
        ):
            tokens_B = (labels_BT[:, 1:] != -100).sum(1).to(found[0])
            # As losses are gathered: of all processes, without samples that fill up the last batch.
            tally_B2 = torch.stack([found[0].expand_as(tokens_B), tokens_B], dim=1)
            self._tallies.append(self.gather_function(tally_B2.float()))
        return found

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """As Trainer's; in evaluation each batch's loss is its own mean, which `evaluation_loop` weighs."""
        items = num_items_in_batch if self._tallies is None else None
        return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=items, **kwargs)

    @contextmanager
    def _evaluating(self, *, loss_only: bool = True) -> Any:
        with ExitStack() as stack:
            if isinstance(self.data_collator, RowDraw):
                stack.enter_context(self.data_collator.all_labels())
            if self.handle is not None and loss_only and self.args.prediction_loss_only:
                stack.enter_context(self.handle.loss_only())
            yield


@contextmanager
def _keeping_dtypes(model: Any) -> Any:
    """Inside, parameters may be cast; behind it, those are as wide as before."""
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != before.get(name, parameter.dtype):
            parameter.data = parameter.data.to(before[name])
