"""A recipe's training section as Transformers' arguments and callbacks, tried out before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from lemo.config import RunConfig, TrainingConfig
from lemo.errors import ConfigError, first_line
from lemo.train.distributed import Processes
from lemo.train.master import MasterWeights

# What libraries raise that are missing, too old, or not told enough.
_REFUSALS = (ImportError, ValueError, TypeError, RuntimeError, AttributeError, KeyError, NotImplementedError)
# Schedules that follow the validation loss, so that Trainer knows a best checkpoint.
_BY_LOSS = ("reduce_lr_on_plateau", "greedy")
# They train other weights than they save unless told, or step inside backward, before a bad gradient is seen.
_UNFIT = ("schedule_free", "lomo", "adalomo")


def training_arguments(run: RunConfig, checkpoints: Path, processes: Processes | None = None) -> Any:
    """Transformers' TrainingArguments of a run, on every supported version.

    Args:
        run: the recipe.
        checkpoints: folder for the Trainer's checkpoints.
        processes: those of the run; None for a single one.

    Raises:
        ConfigError: an optimizer, schedule or tracker that Transformers does not know.
    """
    import torch
    from transformers import TrainingArguments

    training = run.training
    values: dict[str, Any] = {
        "output_dir": str(checkpoints),
        **_checkpointing(TrainingArguments, training.gradient_checkpointing),
        "learning_rate": training.learning_rate,
        "max_steps": training.max_steps,
        "num_train_epochs": training.epochs,
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "warmup_steps": training.warmup_steps,
        "lr_scheduler_type": training.lr_scheduler,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": training.optimizer,
        "logging_steps": training.logging_steps,
        "eval_strategy": "steps" if training.eval_steps and run.data.validation_sources else "no",
        "eval_steps": training.eval_steps,
        "save_strategy": "steps" if training.save_steps else "no",
        "save_steps": training.save_steps or 500,
        "save_total_limit": _limit(training),
        **_keeping_best(training),
        "seed": training.seed,
        "report_to": list(training.report_to) or "none",
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "label_names": ["labels"],
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **(processes or Processes()).trainer_arguments(),
    }
    try:
        return TrainingArguments(**values)
    except ValueError as error:
        raise ConfigError(f"training: {_reason(error)}") from error


def try_arguments(arguments: Any, run: RunConfig) -> None:
    """Makes trackers, optimizer and schedule once, on a parameter of nothing, as the Trainer will after loading.

    Raises:
        ConfigError: one of them cannot be made: a package is missing, or it needs options that recipes do not have.
    """
    import torch
    from transformers import Trainer, get_scheduler
    from transformers.integrations import get_reporting_integration_callbacks

    training = run.training
    for tracker in training.report_to:
        try:
            for callback in get_reporting_integration_callbacks([tracker]):
                callback()
        except _REFUSALS as error:
            raise ConfigError(
                f"training.report_to: {tracker} cannot be used ({_reason(error)}); install it or leave it out"
            ) from error
    if training.optimizer.startswith(_UNFIT):
        raise ConfigError(
            f"training.optimizer: recipes do not train with {training.optimizer}, whose steps or weights are not those "
            "that are checked and saved; name another, such as adamw_torch"
        )
    model = torch.nn.Linear(8, 8, bias=False, device=arguments.device, dtype=getattr(torch, run.model.dtype))
    try:
        made, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        # A class of optimizers takes parameters; what else there is wants a whole model.
        is_class = isinstance(made, type) and issubclass(made, torch.optim.Optimizer)
        plain = is_class and not {"params", "model", "optimizer_dict"} & set(options)
        optimizer = made(model.parameters(), **options) if plain else torch.optim.SGD(model.parameters())
        _step_once(optimizer, model.weight)
    except _REFUSALS as error:
        raise ConfigError(
            f"training.optimizer: {training.optimizer} cannot be used ({_reason(error)}); install what it needs "
            "or name another, such as adamw_torch"
        ) from error
    steps = training.max_steps if training.max_steps > 0 else training.warmup_steps + 1
    options = getattr(arguments, "lr_scheduler_kwargs", None) or {}
    try:
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=training.warmup_steps,
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(options),
        )
    except _REFUSALS as error:
        raise ConfigError(
            f"training.lr_scheduler: {training.lr_scheduler} cannot be used ({_reason(error)}); recipes give "
            "schedules no options of their own: name another, such as cosine or linear"
        ) from error


def _step_once(optimizer: Any, weight: Any) -> None:
    """One step with fp32 copies, and the state that a checkpoint would have."""
    import torch

    MasterWeights(optimizer)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


def stopping(run: RunConfig, resume_from: Path | None = None) -> list[Any]:
    """The callback that ends a run whose validation loss no longer falls, where the recipe asks for it.

    Args:
        run: the recipe.
        resume_from: checkpoint that is taken up, with its count of evaluations without a lower loss.
    """
    from transformers import EarlyStoppingCallback

    if run.training.early_stopping_evals is None:
        return []
    callback = EarlyStoppingCallback(early_stopping_patience=run.training.early_stopping_evals)
    if resume_from is not None:
        callback.early_stopping_patience_counter = _idle_evaluations(_state_of(resume_from))
    return [callback]


def is_trained(run: RunConfig, checkpoint: Path) -> bool:
    """Whether nothing is left to train after a checkpoint: its step is the last, or early stopping ended the run."""
    state = _state_of(checkpoint)
    patience = run.training.early_stopping_evals
    stopped = patience is not None and _idle_evaluations(state) >= patience
    return stopped or 0 < state.get("max_steps", 0) <= state.get("global_step", 0)


def _state_of(checkpoint: Path) -> dict[str, Any]:
    """The Trainer's state in a checkpoint, which was found whole."""
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def _idle_evaluations(state: dict[str, Any]) -> int:
    """Evaluations in a row, up to a state, that did not lower the loss."""
    stored = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", {})
    stored = stored[-1] if isinstance(stored, list) else stored
    return int(stored.get("attributes", {}).get("early_stopping_patience_counter", 0))


def _limit(training: TrainingConfig) -> int | None:
    """Checkpoints to keep. With 1 Trainer keeps the best alone, and deletes what an interrupted run has just saved."""
    keeps_best = training.early_stopping_evals is not None or training.lr_scheduler in _BY_LOSS
    return 2 if keeps_best and training.save_total_limit == 1 else training.save_total_limit


def _keeping_best(training: TrainingConfig) -> dict[str, Any]:
    """Keywords that keep the adapter of the lowest validation loss; they save at each evaluation."""
    if training.early_stopping_evals is None:
        return {}
    return {
        "save_strategy": "steps",
        "save_steps": training.eval_steps,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
    }


def _checkpointing(arguments: type, on: bool) -> dict[str, Any]:
    """Keywords for gradient checkpointing: Transformers 5.23 renamed them, 5.17 has the old names only."""
    names = {f.name for f in dataclasses.fields(arguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: on, f"{name}_kwargs": {"use_reentrant": False}}


def _reason(error: Exception) -> str:
    """What an error says, to be put into a sentence."""
    return first_line(error).rstrip(".")
