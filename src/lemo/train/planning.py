"""Which plan a run trains under: loaded, calibrated on its own data, uniform, or dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lemo.config import IN_RUNS, RunConfig
from lemo.core.plan import Plan
from lemo.errors import UnsupportedModelError
from lemo.runtime.batch import supervised_rows
from lemo.runtime.context import lacks_for_local_rows
from lemo.runtime.model import causal_model, decoder_layers, dense_only, why_dense
from lemo.train.block_losses import BlockLosses
from lemo.train.checks import check_local_rows
from lemo.train.costs import layer_cost
from lemo.train.data import LossRows, PromptRows, WindowCollator, WindowDataset, load_windows


def dense_plan(model: Any, block_size: int = 64) -> Plan:
    """Every row runs every layer: what a dense run attaches for the segmented loss."""
    return Plan.uniform(causal_model(model), forward_ratio=1.0, backward_ratio=1.0, block_size=block_size)


def skeleton_plan(model: Any, run: RunConfig) -> Plan:
    """A plan with the recipe's ratios and choices, before anything is fitted.

    Layers that can only run all rows, such as the recurrent ones of a hybrid, are dense in it.

    Raises:
        ConfigError: ratios, choices or dense layers that do not fit the model.
        UnsupportedModelError: no layer can skip rows.
    """
    sparsity, always_dense = run.sparsity, dense_only(model)
    plan = Plan.uniform(
        causal_model(model),
        forward_ratio=sparsity.forward_ratio,
        backward_ratio=sparsity.backward_ratio,
        dense_layers=(*sparsity.dense_layers, *always_dense),
        block_size=sparsity.block_size,
        scorer=run.scorer,  # type: ignore[arg-type]
        policy=sparsity.policy,
        kv=sparsity.kv,
        gradient=sparsity.gradient,
        mlp=sparsity.mlp,
        ratio_of=sparsity.ratio_of,
        context_window=run.context_window,
        far_share=sparsity.far_share,
        local_forward=run.local_forward or "near",
        seed=run.training.seed,
    )
    if len(always_dense) == len(plan.layers):
        layer, text = decoder_layers(model)[0], causal_model(model).config.get_text_config()
        raise UnsupportedModelError(f"no layer can skip rows: {type(layer).__name__} {why_dense(layer, 0, text)}")
    if sparsity.mlp == "own":
        for index, layer in enumerate(plan.layers):
            if not layer.is_dense:
                plan = plan.replace_layer(index, mlp_ratio=sparsity.mlp_ratio)
    return plan


def needs_calibration(run: RunConfig, skeleton: Plan | None = None) -> bool:
    """Whether the run's plan must be fitted: rows skip layers and others read them, or predictors rank its blocks.

    Without the `skeleton` of its plan no layer is taken to be one that can only run all rows.
    """
    sparsity = run.sparsity
    if not sparsity.enabled or sparsity.plan is not None or sparsity.backward_ratio == 1:
        return False
    if run.scorer == "predictor":
        return True
    if sparsity.forward_ratio == 1:
        return False
    return not leaves_rows_out(run) if skeleton is None else skeleton.needs_bypass


def leaves_rows_out(run: RunConfig) -> bool:
    """Whether rows that skip a layer skip all of them and nothing reads them: see `Plan.leaves_out`."""
    sparsity = run.sparsity
    names = ("forward_ratio", "backward_ratio", "block_size", "kv", "mlp", "policy")
    plan = Plan.uniform(1, scorer=run.scorer, **{name: getattr(sparsity, name) for name in names})
    return sparsity.enabled and sparsity.plan is None and not sparsity.dense_layers and plan.leaves_out


def make_plan(model: Any, run: RunConfig, tokenizer: Any, folder: str | Path | None, *, progress: bool = True) -> Plan:
    """The plan of a run.

    Args:
        model: the base model, no plan attached.
        run: the recipe.
        tokenizer: for the calibration text; None for pre-tokenised data.
        folder: keeps the stages of a calibration, so that it can be taken up again; None keeps nothing.
        progress: show the calibration's progress and report.

    Raises:
        PlanError: a plan that cannot be read.
        ConfigError: local loss rows under a plan that knows none.
        ConfigError, DataError: from calibration.
    """
    sparsity = run.sparsity
    if not sparsity.enabled:
        return dense_plan(model, sparsity.block_size)
    if sparsity.plan is not None:
        plan = Plan.load(sparsity.plan)
        check_local_rows(run, plan.context_window, plan.gradient)
        return plan
    skeleton = skeleton_plan(model, run)
    if not needs_calibration(run, skeleton):
        return skeleton
    from lemo.calibrate.session import calibrate

    batches = calibration_batches(run, tokenizer, causal_model(model))
    return calibrate(
        model,
        batches,
        replace(run.calibration, scorer=run.scorer),
        plan=skeleton,
        output_dir=folder,
        progress=progress,
        cost=layer_cost(causal_model(model), skeleton, run.data.window_tokens, run.lora.rank),
    )


def describe_plan(plan: Plan, window_tokens: int) -> list[str]:
    """What a run prints about its plan, for samples of at most `window_tokens`."""
    sparse = [layer for layer in plan.layers if not layer.is_dense]
    if not sparse:
        return ["plan: every layer dense"]
    forward = sum(layer.forward_ratio for layer in sparse) / len(sparse)
    backward = sum(layer.backward_ratio for layer in sparse) / len(sparse)
    skips = "leave the same rows out, which nothing reads" if plan.leaves_out else "skip rows"
    does = skips if forward < 1 else f"run every row forward, gradient {plan.gradient}"
    lines = [
        f"plan: {len(sparse)} of {len(plan.layers)} layers {does}; forward {forward:.2f}, "
        f"backward {backward:.2f}, blocks of {plan.block_size}, {plan.scorer} / {plan.policy}, kv {plan.kv}"
    ]
    chunk = plan.context_window
    if chunk is not None and window_tokens > 2 * chunk:
        rows = "rows without gradient and local loss rows see their chunk, the one before and the first block"
        wide = "; local loss rows see all rows in forward" if plan.local_forward == "all" else ""
        lines.append(f"  context window: in documents of more than {2 * chunk:,} rows, {rows}{wide}")
    elif chunk is not None:
        lines.append(
            f"  context window: no sample has more than {2 * chunk:,} rows, two chunks of {chunk:,}, so every row sees "
            "all rows before it, and local loss rows are far ones"
        )
    return lines


def calibration_batches(run: RunConfig, tokenizer: Any, model: Any) -> list[dict[str, Any]]:
    """Windows of the training data as calibration reads them, with loss rows drawn as in training.

    The held-out ones come last; they are other windows, and where there are several documents mostly other documents.
    """
    config = run.calibration
    dataset, _ = load_windows(
        run.data,
        tokenizer,
        "train",
        window_tokens=config.window_tokens,
        limit=config.windows + config.tune_windows,
        vocabulary=model.config.get_text_config().vocab_size,
    )
    collator = training_collator(run, tokenizer, model)
    device = model.get_input_embeddings().weight.device
    batches = []
    for index in range(len(dataset)):
        batch = collator([dataset[index]])
        found: dict[str, Any] = {k: v.to(device) for k, v in batch.items() if k in _READ}
        found["supervised"] = supervised_rows(batch).to(device)  # type: ignore[union-attr]
        found["domain"] = dataset.windows[index].sample_id.partition(":")[0].partition("#")[0]
        batches.append(found)
    return batches


_READ = ("input_ids", "attention_mask", "position_ids")


def training_collator(run: RunConfig, tokenizer: Any, model: Any = None, plan: Plan | None = None) -> Any:
    """The collator of a run. Loss rows are drawn on plain text only: answers always count, some rows of prompts may.

    Args:
        run: the recipe.
        tokenizer: for the token that pads; None for pre-tokenised data.
        model: tells how hard blocks are, for `loss_rows.placement: hardest`; its adapter, if any, is left out.
        plan: that the run trains under, where its `context_window` may be another than the recipe's.

    Raises:
        ConfigError: `hardest` without a model.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    collator = WindowCollator(pad_id=0 if pad is None else pad)
    rows = run.loss_rows
    if run.data.answer_only and rows.prompt_share:
        size = run.sparsity.block_size
        options: dict[str, Any] = {"seed": run.training.seed, "block_size": size, "span": rows.span or size}
        local = prompt_rows_are_local(run, plan)
        return PromptRows(collator, rows.prompt_share, rows.prompt_weight, local=local, **options)
    if run.data.answer_only or rows.share == 1:
        return collator
    losses = None
    if rows.placement == "hardest" and model is not None:
        losses = BlockLosses(model, collator, run.sparsity.block_size)
    window = run.context_window if plan is None else plan.context_window
    drawn = LossRows(
        collator,
        rows.share,
        rows.placement,
        seed=run.training.seed,
        block_size=run.sparsity.block_size,
        span=rows.span if rows.placement in IN_RUNS else None,
        reweight=rows.reweight,
        block_losses=losses,
        local_share=run.local_share,
        repeats_beyond=window if rows.far == "repeats" and run.local_share else None,
    )
    drawn.marks_local = run.sparsity.enabled
    return drawn


def prompt_rows_are_local(run: RunConfig, plan: Plan | None = None) -> bool:
    """Whether drawn rows of prompts attend within the context window: under `plan`, or the recipe's own without one."""
    if not run.sparsity.enabled or plan is None:
        return run.sparsity.enabled and run.has_local_prompt_rows
    return run.data.answer_only and run.loss_rows.prompt_share > 0 and lacks_for_local_rows(plan) is None


def describe_rows(run: RunConfig) -> list[str]:
    """What a run prints about the rows of its training data that carry loss."""
    rows, sparsity, window = run.loss_rows, run.sparsity, run.context_window
    short = window is None or run.data.window_tokens <= 2 * window or not sparsity.enabled
    does = "attend" if run.local_forward == "near" else "pass gradient"
    near = "" if short else f" and {does} within chunks of {window}"
    if run.data.answer_only and rows.prompt_share:
        how = near if run.has_local_prompt_rows else ""
        if sparsity.enabled and sparsity.plan is not None:
            how = " and are local where the plan allows local loss rows"
        return [
            f"beside answers, {rows.prompt_share:.0%} of blocks, drawn among those of prompts, carry loss of "
            f"up to {rows.prompt_weight:g}x the answers' weight{how}"
        ]
    if run.data.answer_only or rows.share == 1:
        return []
    local = run.local_share
    more = f", {local:.0%} more carry loss{near}" if local else ""
    by = f", far ones by {rows.far}" if local and not short else ""
    return [f"of these rows, {rows.share:.0%} of blocks carry loss{more}, placement {rows.placement}{by}"]


def validation_batches(
    run: RunConfig, tokenizer: Any, dataset: WindowDataset, *, loss_rows: bool = False, model: Any = None
) -> Sequence[dict[str, Any]]:
    """Batches of one window each, with all labels, or with labels drawn as in training (`loss_rows`).

    Drawn rows are not weighed, none of them is local, and none is of a prompt: these batches are for evaluation.
    `model` is that of `training_collator`.
    """
    if not loss_rows:
        run = replace(run, loss_rows=replace(run.loss_rows, share=1.0, local_share=0.0))
    rows = replace(run.loss_rows, reweight=False, local_share=run.local_share, prompt_share=0.0)
    collator = training_collator(replace(run, loss_rows=rows), tokenizer, model)
    if isinstance(collator, LossRows):
        collator.marks_local = False
    return [collator([dataset[index]]) for index in range(len(dataset))]
