"""RefitCallback: keeps bypasses at the weights that train, and watches whether predictors still find their blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from lemo.calibrate.refit import predictor_recall, refit_bypass
from lemo.calibrate.windows import Window
from lemo.config import CalibrationConfig, RunConfig
from lemo.errors import ConfigError
from lemo.runtime.attach import Handle
from lemo.runtime.batch import supervised_rows

METRIC = "predictor_recall"


class RefitCallback(TrainerCallback):
    """Every so many steps, fits bypasses anew on the last training batch and measures recall on windows held out.

    Both are off unless asked for. The plan of the handle is replaced between steps; `handle.plan` is the one in force.
    Recall is added to the Trainer's next log entry as `predictor_recall`, so put this callback before those that write
    entries (`LemoTrainer` does).

    Attributes:
        recalls: (step, mean over layers and windows), the first before any step.
        explained: of the last refit, by layer: share of the update's energy that the bypass explains.
    """

    def __init__(
        self,
        handle: Handle,
        *,
        refit_steps: int | None = None,
        recall_steps: int | None = None,
        recall_windows: Sequence[Window] = (),
        config: CalibrationConfig | None = None,
        plan_folder: str | Path | None = None,
    ) -> None:
        """Makes a callback for one Trainer.

        Args:
            handle: the attached plan.
            refit_steps: steps between refits; None for never.
            recall_steps: steps between measurements of recall; None for never.
            recall_windows: held-out windows for recall; one or two are enough.
            config: options that the plan was calibrated with.
            plan_folder: where the plan is saved anew with each checkpoint and in the end, if it was refitted.

        Raises:
            ConfigError: steps below 1, or recall without windows or predictors.
        """
        for name, steps in (("refit_steps", refit_steps), ("recall_steps", recall_steps)):
            if steps is not None and steps < 1:
                raise ConfigError(f"{name} must be positive, got {steps}")
        if recall_steps is not None:
            if not recall_windows:
                raise ConfigError("recall_steps needs recall_windows to measure on")
            if all(layer.predictor is None for layer in handle.plan.layers):
                raise ConfigError("recall_steps needs a plan with predictors")
        self.handle = handle
        self.refit_steps, self.recall_steps = refit_steps, recall_steps
        self.recall_windows = tuple(recall_windows)
        self.config = config or CalibrationConfig()
        self.plan_folder = plan_folder
        self.recalls: list[tuple[int, float]] = []
        self.explained: dict[int, float] = {}
        self._batch: Window | None = None
        self._hook: Any = None
        self._unsaid: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Watches batches; measures recall before the first step.

        Raises:
            ConfigError: several processes train, each of which would fit bypasses of its own.
        """
        if self.refit_steps is not None and args.world_size > 1:
            raise ConfigError("bypasses cannot be refitted by several processes: each would fit its own")
        self._hook = model.register_forward_pre_hook(self._keep, with_kwargs=True)
        if self.recall_steps is not None:
            self._measure(model, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Refits and measures when it is time."""
        step = state.global_step
        if self.refit_steps is not None and step % self.refit_steps == 0 and self._batch is not None:
            self.handle.plan, self.explained = refit_bypass(
                model, self.handle.plan, [self._batch], aim=self.config.bypass_target
            )
        if self.recall_steps is not None and step % self.recall_steps == 0:
            self._measure(model, step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Adds what was measured since the last entry."""
        if logs is not None and "loss" in logs and self._unsaid is not None:
            logs[METRIC], self._unsaid = self._unsaid, None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The saved plan is the one in force, so that a resumed run goes on with it."""
        if self.plan_folder is not None and self.explained:
            self.handle.plan.save(self.plan_folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops watching."""
        self.on_save(args, state, control)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _measure(self, model: Any, step: int) -> None:
        found = predictor_recall(model, self.handle.plan, self.recall_windows, self.config)
        if found:
            self._unsaid = fmean(found.values())
            self.recalls.append((step, self._unsaid))

    def _keep(self, module: Any, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the model: remembers the last training batch."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if self.refit_steps is None or not module.training or not torch.is_grad_enabled() or ids is None:
            return
        mask, positions = (_first(kwargs.get(name), ids) for name in ("attention_mask", "position_ids"))
        supervised = supervised_rows(kwargs)
        self._batch = Window(ids[:1], None if supervised is None else supervised[:1], mask, positions, "train", False)


def refitting(
    run: RunConfig, tokenizer: Any, model: Any, handle: Handle, plan_folder: str | Path | None = None
) -> list[RefitCallback]:
    """The callback that a recipe asks for by `training.refit_steps` and `training.recall_steps`, if any.

    Recall is measured on the last of the windows that calibration holds out.
    """
    training = run.training
    sparse = any(layer.forward_ratio < 1 and layer.bypass is not None for layer in handle.plan.layers)
    predicts = any(layer.predictor is not None for layer in handle.plan.layers)
    refit_steps = training.refit_steps if sparse else None
    recall_steps = training.recall_steps if predicts else None
    if refit_steps is None and recall_steps is None:
        return []
    from lemo.calibrate.windows import read_windows
    from lemo.runtime.model import causal_model
    from lemo.train.planning import calibration_batches

    windows: list[Window] = []
    if recall_steps is not None:
        small = replace(run.calibration, tune_windows=max(1, run.calibration.tune_windows))
        batches = calibration_batches(replace(run, calibration=small), tokenizer, causal_model(model))
        windows = read_windows(batches[-1:], None)
    return [
        RefitCallback(
            handle,
            refit_steps=refit_steps,
            recall_steps=recall_steps,
            recall_windows=windows,
            config=run.calibration,
            plan_folder=plan_folder,
        )
    ]


def _first(mask: Any, ids: Tensor) -> Tensor | None:
    """The first sequence's part of a (B, T) or (1, T) tensor; None for anything else."""
    fits = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == ids.shape[1]
    return mask[:1] if fits else None
