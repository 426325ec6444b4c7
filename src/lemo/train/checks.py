"""Checks of a run's ranges and combinations, before anything is loaded."""

from __future__ import annotations

from typing import Any

from lemo.calibrate.windows import check_thresholds
from lemo.config import LoraConfig, LossRowsConfig, RunConfig
from lemo.core.plan import check_context_window, check_far_share
from lemo.errors import ConfigError
from lemo.runtime.attach import Handle
from lemo.train.loss_rows import check_local_share


def check_run(run: RunConfig) -> None:
    """Checks ranges and combinations of a run; types are the recipe reader's business.

    Raises:
        ConfigError: a value is out of range or two values contradict each other; the message names the key.
    """
    if not run.model.path:
        raise ConfigError("model.path is empty: name a model folder, a hub name or package:NAME")
    for key in _POSITIVE:
        value = _lookup(run, key)
        if value is not None and not value > 0:
            raise ConfigError(f"{key} must be positive, got {value!r}")
    for key in _NOT_NEGATIVE:
        if not _lookup(run, key) >= 0:
            raise ConfigError(f"{key} must not be negative, got {_lookup(run, key)!r}")
    for key in _SHARES:
        value = _lookup(run, key)
        if value is not None and not 0 < value <= 1:
            raise ConfigError(f"{key} must lie in (0, 1], got {value!r}")
    for key in _PARTS:
        value = _lookup(run, key)
        if value is not None and not 0 <= value < 1:
            raise ConfigError(f"{key} must lie in [0, 1), got {value!r}")
    if run.data.validation and run.data.held_out_share:
        raise ConfigError(
            "data.held_out_share has no effect beside data.validation; remove one of them, or set data.held_out_share=0"
        )
    _check_stopping(run)
    if run.data.window_tokens < 2:
        raise ConfigError(f"data.window_tokens must be at least 2, got {run.data.window_tokens}")
    if run.training.max_steps == 0 or run.training.max_steps < -1:
        raise ConfigError(f"training.max_steps must be positive, or -1 for epochs, got {run.training.max_steps}")
    if run.training.offload and run.training.engine == "generic":
        raise ConfigError("training.offload moves what the fused engine saves; training.engine is generic")
    _check_lora(run)
    if run.model.context_length is not None and run.data.window_tokens > run.model.context_length:
        raise ConfigError(
            f"data.window_tokens ({run.data.window_tokens}) exceeds model.context_length ({run.model.context_length})"
        )
    if run.calibration.scorer not in (None, run.scorer):
        raise ConfigError(
            f"calibration.scorer is {run.calibration.scorer}, but the run's scorer is {run.scorer}: name it in "
            "sparsity.scorer alone"
        )
    if run.sparsity.plan is None:
        check_thresholds(run.scorer, run.sparsity.policy, run.calibration.tune_steps)
    for key in ("training.seed", "calibration.seed"):
        if _lookup(run, key) >= 2**32:
            raise ConfigError(f"{key} must be below 2^32, as NumPy's seeds are, got {_lookup(run, key)}")
    if run.calibration.allocate == "budget" and (run.sparsity.policy == "threshold" or run.calibration.tune_steps):
        raise ConfigError("calibration.allocate gives layers ratios, thresholds do too: drop tune_steps and threshold")
    _check_loss_rows(run)
    _check_sparsity(run)


def check_training(run: RunConfig) -> None:
    """Raises ConfigError for what a model may be loaded with, but not trained with."""
    if run.model.dtype == "float16":
        raise ConfigError(
            "model.dtype is float16, whose gradients overflow in training: set bfloat16, or float32 where the device "
            "has no bfloat16"
        )


def check_dropout(run: RunConfig, model: Any, handle: Handle) -> None:
    """Raises ConfigError where rows of exact forward, which run twice, would draw the adapter's dropout twice."""
    exact = any(layer.is_exact for layer in handle.plan.layers)
    generic = set(range(len(handle.plan.layers))) - set(handle.fused_layers())
    if run.lora.dropout > 0 and exact and generic:
        raise ConfigError(
            f"lora.dropout is {run.lora.dropout}, but {len(generic)} layers run in the generic engine, which draws "
            "another mask for a row's second run: set lora.dropout to 0, training.engine to fused, or "
            "sparsity.enabled to false"
        )


def _check_lora(run: RunConfig) -> None:
    """What a new adapter needs, and what DoRA and a saved adapter cannot be had with."""
    lora, sparsity = run.lora, run.sparsity
    if not lora.targets and lora.adapter is None:
        raise ConfigError("lora.targets is empty: name modules, or all-linear")
    if lora.adapter is not None and lora.init_lora_weights != LoraConfig.init_lora_weights:
        raise ConfigError("lora.init_lora_weights is of a new adapter, but lora.adapter names one to go on from")
    if lora.adapter == "":
        raise ConfigError("lora.adapter is empty: name the folder of an adapter, or null for a new one")
    if not lora.use_dora:
        return
    if run.training.engine == "fused":
        raise ConfigError("lora.use_dora runs in the generic engine alone: set training.engine to auto or generic")
    if run.training.offload:
        raise ConfigError("training.offload moves what the fused engine saves; lora.use_dora runs in the generic one")
    exact = sparsity.enabled and sparsity.plan is None and sparsity.backward_ratio < sparsity.forward_ratio
    if lora.dropout > 0 and exact:
        raise ConfigError(
            f"lora.dropout is {lora.dropout}, but with lora.use_dora rows that run a second time would be dropped by "
            "another mask: set lora.dropout to 0, or sparsity.enabled to false"
        )


def _check_loss_rows(run: RunConfig) -> None:
    """Runs of blocks are whole blocks; weights need draws that leave no block out, and a loss that knows them."""
    span, block = run.loss_rows.span, run.sparsity.block_size
    if span is not None and (span < 1 or span % block):
        raise ConfigError(
            f"loss_rows.span must be a multiple of sparsity.block_size ({block}) or null for single blocks, got {span}"
        )
    _check_local_rows(run)
    _check_prompt_rows(run)
    if not run.loss_rows.reweight:
        return
    if run.loss_rows.placement == "tail":
        raise ConfigError("loss_rows.reweight cannot be had with placement tail: it never draws the blocks before")
    if run.training.loss == "model":
        raise ConfigError("loss_rows.reweight needs training.loss=segmented; the model's own loss knows no weights")


def _check_prompt_rows(run: RunConfig) -> None:
    """Rows of prompts are of samples with answers, and weigh in a loss that knows weights."""
    if not run.loss_rows.prompt_share:
        if run.loss_rows.prompt_weight != LossRowsConfig.prompt_weight:
            raise ConfigError("loss_rows.prompt_weight is of rows that loss_rows.prompt_share draws, which is 0")
        return
    if not run.data.answer_only:
        raise ConfigError("loss_rows.prompt_share is of samples whose answers alone carry loss: data.answer_only")
    if run.training.loss == "model":
        raise ConfigError("loss_rows.prompt_share needs training.loss=segmented; the model's own loss knows no weights")


def _check_local_rows(run: RunConfig) -> None:
    """Local loss rows are drawn beside others, and are rows of exact forward that attend within a window."""
    rows, sparsity = run.loss_rows, run.sparsity
    if run.local_share == 0:
        if sparsity.local_forward is not None and not run.has_local_prompt_rows:
            key = "prompt_share" if run.data.answer_only else "local_share"
            raise ConfigError(
                "sparsity.local_forward is of local loss rows, which this recipe does not have: leave it null, or set "
                f"loss_rows.{key}"
            )
        return
    check_local_share(run.local_share, rows.share, rows.placement, rows.reweight)
    if sparsity.plan is None:
        check_local_rows(run, run.context_window, sparsity.gradient)


def check_local_rows(run: RunConfig, context_window: int | None, gradient: str) -> None:
    """Raises ConfigError unless a plan of this window and gradient can train the recipe's local loss rows."""
    if run.local_share and (context_window is None or gradient != "keys"):
        raise ConfigError(
            "loss_rows.local_share needs sparsity.context_window, within which such rows attend, and sparsity.gradient "
            f"keys; the plan has {context_window} and {gradient}"
        )


def _check_stopping(run: RunConfig) -> None:
    """Early stopping compares evaluations, and keeps the checkpoint of the best."""
    training = run.training
    if training.early_stopping_evals is None:
        return
    if not run.data.validation_sources or not training.eval_steps:
        raise ConfigError("training.early_stopping_evals needs validation data and training.eval_steps")
    if training.save_steps not in (None, training.eval_steps):
        raise ConfigError("training.early_stopping_evals saves at each evaluation: set training.save_steps to null")


def _check_sparsity(run: RunConfig) -> None:
    """Combinations of ratios, bypass and MLP rows."""
    sparsity = run.sparsity
    if sparsity.backward_ratio > sparsity.forward_ratio:
        raise ConfigError(
            f"sparsity.backward_ratio ({sparsity.backward_ratio}) must not exceed sparsity.forward_ratio "
            f"({sparsity.forward_ratio}): a row passes gradient only through layers that it ran"
        )
    check_context_window(run.context_window, sparsity.block_size)
    if run.context_window is not None and sparsity.backward_ratio == sparsity.forward_ratio:
        raise ConfigError(
            "sparsity.context_window is for rows that run forward only, but sparsity.backward_ratio equals "
            "sparsity.forward_ratio: it would have no effect"
        )
    check_far_share(sparsity.far_share, sparsity.gradient)
    if sparsity.far_share < 1 and sparsity.backward_ratio == sparsity.forward_ratio:
        raise ConfigError(
            "sparsity.far_share is of exact forward, but sparsity.backward_ratio equals sparsity.forward_ratio: it "
            "would have no effect"
        )
    calibrates = sparsity.enabled and sparsity.plan is None and sparsity.forward_ratio < 1
    if calibrates and run.calibration.bypass_rank == 0:
        raise ConfigError(
            f"sparsity.forward_ratio is {sparsity.forward_ratio} and calibration.bypass_rank is 0: rows that skip "
            "layers without a bypass ruin the model; set a rank, or forward_ratio to 1"
        )
    if sparsity.mlp_ratio is not None and sparsity.mlp == "shared":
        raise ConfigError("sparsity.mlp_ratio needs sparsity.mlp=own; with shared rows it would have no effect")
    if sparsity.mlp == "own" and sparsity.mlp_ratio is None:
        raise ConfigError("sparsity.mlp is own: set sparsity.mlp_ratio, the share of rows that run the MLP")


_POSITIVE = (
    "model.context_length",
    "data.max_windows",
    "data.validation_windows",
    "loss_rows.prompt_weight",
    "sparsity.block_size",
    "calibration.window_tokens",
    "calibration.windows",
    "calibration.query_stride",
    "calibration.pooled_features",
    "calibration.predictor_width",
    "calibration.predictor_rank",
    "calibration.predictor_steps",
    "calibration.tune_windows",
    "calibration.memory_limit_gib",
    "lora.rank",
    "lora.alpha",
    "training.learning_rate",
    "training.epochs",
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "training.segment_rows",
    "training.logging_steps",
    "training.eval_steps",
    "training.save_steps",
    "training.save_total_limit",
    "training.refit_steps",
    "training.recall_steps",
    "training.early_stopping_evals",
)
_NOT_NEGATIVE = (
    "calibration.bypass_rank",
    "calibration.bypass_ridge",
    "calibration.seed",
    "calibration.tune_steps",
    "training.seed",
    "training.warmup_steps",
    "training.weight_decay",
    "training.max_grad_norm",
)
_PARTS = ("data.held_out_share", "lora.dropout", "loss_rows.local_share", "loss_rows.prompt_share")
_SHARES = (
    "loss_rows.share",
    "sparsity.forward_ratio",
    "sparsity.backward_ratio",
    "sparsity.mlp_ratio",
    "calibration.prune_to",
)


# Ranges as JSON Schema has them.
RANGES: tuple[tuple[dict[str, float], tuple[str, ...]], ...] = (
    ({"exclusiveMinimum": 0}, _POSITIVE),
    ({"minimum": 0}, _NOT_NEGATIVE),
    ({"minimum": 0, "exclusiveMaximum": 1}, _PARTS),
    ({"exclusiveMinimum": 0, "maximum": 1}, _SHARES),
)


def _lookup(run: RunConfig, key: str) -> Any:
    """Value of a dotted key."""
    value: Any = run
    for part in key.split("."):
        value = getattr(value, part)
    return value
