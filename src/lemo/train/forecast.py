"""From a recipe to what estimates need: sizes and setting of its steps, what its data will gain, and one real step."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lemo.config import IN_RUNS, RunConfig
from lemo.core.plan import Plan
from lemo.errors import ConfigError
from lemo.measure.memory import track_peak
from lemo.measure.profile import StepTimer
from lemo.measure.sizes import ModelSizes
from lemo.measure.step_memory import StepSetting
from lemo.runtime.batch import LOCAL_ROWS
from lemo.train.four_bits import check_installed, pack_linear
from lemo.train.lora import adapter_like, check_targets
from lemo.train.master import MasterWeights
from lemo.train.model import extend_context, load_settings, resolve_path
from lemo.train.planning import leaves_rows_out, prompt_rows_are_local
from lemo.train.rehearsal import SHAPES, check_causal, random_batch, random_model, random_plan, shape_config
from lemo.train.run_sizes import run_sizes
from lemo.train.start_adapter import describe_start

ANSWER_SHARE = 0.1  # of rows, where only answers carry loss and nobody has looked at the data
ASSUMED = f"answers are taken to be {ANSWER_SHARE:.0%} of the rows"


@dataclass(frozen=True)
class Forecast:
    """What a recipe's steps are like.

    Attributes:
        sizes: of model and adapter.
        setting: of a step of the longest window.
        settings: the model's configuration.
        notes: what had to be assumed.
    """

    sizes: ModelSizes
    setting: StepSetting
    settings: Any
    notes: tuple[str, ...] = ()


def model_settings(run: RunConfig) -> Any:
    """Configuration of the recipe's model, of a known shape, or of a file `config.json`.

    Raises:
        ConfigError: none can be read.
    """
    path = run.model.path
    if path in SHAPES:
        return shape_config(path, tokens=run.data.window_tokens)
    if Path(path).name == "config.json":
        path = str(Path(path).parent)
    if (Path(resolve_path(path)) / "config.json").is_file():
        return shape_config(resolve_path(path), tokens=run.data.window_tokens)
    settings = load_settings(run.model)
    check_causal(settings, path)
    extend_context(settings, run.model)
    return settings


def forecast(run: RunConfig) -> Forecast:
    """Sizes and setting of a recipe's steps, from configuration files alone.

    Raises:
        ConfigError: the model's configuration cannot be read, or the recipe's numbers make no step.
    """
    settings = model_settings(run)
    sizes, notes = run_sizes(run, settings), []
    engine = _engine(run, sizes)
    if run.lora.use_dora:
        notes.append("lora.use_dora: the generic engine runs, and the time of DoRA's own products is not counted")
    elif engine == "generic":
        notes.append("the fused engine does not know this model; its own layers run on rows")
    notes += describe_start(run.lora, run.model, resolve_path(run.model.path))
    plan = Plan.load(run.sparsity.plan) if run.sparsity.enabled and run.sparsity.plan is not None else None
    share, local = _loss_shares(run, plan)
    if run.data.answer_only:
        notes.append(f"{ASSUMED}; --data counts them")
    if run.training.offload and engine != "fused":
        notes.append("training.offload has no effect without the fused engine")
    checkpoints = run.training.gradient_checkpointing
    level = run.training.recompute or ("lin" if checkpoints else "none")
    if engine != "fused":
        level = "layer" if checkpoints else "none"
    setting = StepSetting(
        tokens=run.data.window_tokens,
        loss_share=share,
        local_share=local,
        batch=run.training.batch_size,
        engine=engine,  # type: ignore[arg-type]
        recompute=level,  # type: ignore[arg-type]
        segmented=run.training.loss == "segmented",
        segment_rows=run.training.segment_rows,
        offload=run.training.offload if engine == "fused" else False,
        span=None if run.data.answer_only or run.loss_rows.placement not in IN_RUNS else run.loss_rows.span,
        pooled_features=run.calibration.pooled_features,
        **_ratios(run, plan, sizes.shape.layers),
    )
    return Forecast(sizes, setting, settings, tuple(notes))


def _engine(run: RunConfig, sizes: ModelSizes) -> str:
    if not run.sparsity.enabled and run.training.engine != "fused":
        return "plain"
    if run.training.engine == "fused" and not sizes.fused:
        raise ConfigError("training.engine is fused, but no family file names the parts of this model's layers")
    return "fused" if sizes.fused and run.training.engine != "generic" else "generic"


def _loss_shares(run: RunConfig, plan: Plan | None) -> tuple[float, float]:
    """Shares of rows that carry loss: those that attend to all keys, and local ones; they are apart."""
    share, local = run.loss_rows.share, run.local_share
    if run.data.answer_only:
        prompts = min(run.loss_rows.prompt_share, 1.0 - ANSWER_SHARE)  # they are drawn beside answers
        return (ANSWER_SHARE, prompts) if prompt_rows_are_local(run, plan) else (ANSWER_SHARE + prompts, 0.0)
    if not run.sparsity.enabled:
        return min(1.0, share + local), 0.0  # a dense step tells the two kinds from each other nowhere
    return share, local


def _ratios(run: RunConfig, plan: Plan | None, layers: int) -> dict[str, Any]:
    """Ratios and choices of the recipe, or of the plan that it names: the mean of the layers that skip."""
    sparsity = run.sparsity
    if not sparsity.enabled:
        return {
            "forward_ratio": 1.0,
            "backward_ratio": 1.0,
            "dense_layers": layers,
            "predictor": False,
            "bypass_rank": 0,
        }
    if plan is None:
        return {
            "forward_ratio": sparsity.forward_ratio,
            "backward_ratio": sparsity.backward_ratio,
            "kv": sparsity.kv,
            "gradient": sparsity.gradient,
            "block_size": sparsity.block_size,
            "dense_layers": len({i % layers for i in sparsity.dense_layers}),
            "predictor": run.scorer == "predictor",
            "bypass_rank": 0 if sparsity.forward_ratio == 1 or leaves_rows_out(run) else run.calibration.bypass_rank,
            "context_window": run.context_window,
            "far_share": sparsity.far_share,
            "local_forward": run.local_forward or "near",
        }
    skipping = [layer for layer in plan.layers if not layer.is_dense]
    ranks = [layer.bypass.rank for layer in skipping if layer.bypass is not None]
    return {
        "forward_ratio": statistics.fmean([x.forward_ratio for x in skipping]) if skipping else 1.0,
        "backward_ratio": statistics.fmean([x.backward_ratio for x in skipping]) if skipping else 1.0,
        "kv": plan.kv,
        "gradient": plan.gradient,
        "block_size": plan.block_size,
        "dense_layers": len(plan.layers) - len(skipping),
        "predictor": plan.scorer == "predictor",
        "bypass_rank": max(ranks, default=0),
        "context_window": plan.context_window,
        "far_share": plan.far_share,
        "local_forward": plan.local_forward,
    }


@dataclass(frozen=True)
class Probe:
    """What one real step took.

    Attributes:
        peak_bytes: most memory; on a CPU the resident size of the process.
        seconds: of the step, after one to warm up.
        source: `cuda` or `resident`.
    """

    peak_bytes: int
    seconds: float
    source: str


def probe_step(run: RunConfig, found: Forecast, *, layers: int | None = None) -> Probe:
    """Runs two steps of the longest window with random weights and a random plan, on this machine.

    Args:
        run: the recipe.
        found: its forecast.
        layers: run only so many layers; None for all.

    Raises:
        ConfigError: it does not fit, or the adapter's targets are not there.
    """
    from lemo.runtime.attach import attach

    device, setting = "cuda" if torch.cuda.is_available() else "cpu", found.setting
    settings = found.settings
    text = settings.get_text_config()
    text.use_cache = False
    if layers is not None:
        text.num_hidden_layers = min(layers, text.num_hidden_layers)
    try:
        model = random_model(settings, dtype=getattr(torch, run.model.dtype), device=device)
        if found.sizes.packed:
            check_installed()
            pack_linear(model)
        if run.lora.adapter is None:  # of one that is there `forecast` has found that it fits
            check_targets(model, run.lora)
        plan = random_plan(
            settings,
            forward_ratio=setting.forward_ratio,
            backward_ratio=setting.backward_ratio,
            kv=setting.kv,
            gradient=setting.gradient,
            dense_layers=run.sparsity.dense_layers,
            block_size=setting.block_size,
            bypass_rank=setting.bypass_rank,
            context_window=setting.context_window,
            far_share=setting.far_share,
            local_forward=setting.local_forward,
        )
        model = adapter_like(model, run.lora)
        if setting.engine != "fused" and setting.recompute == "layer":
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        how: dict[str, Any] = {"engine": "generic"}
        if setting.engine == "fused":
            how = {"engine": "fused", "recompute": setting.recompute, "offload": setting.offload}
        loss = "segmented" if setting.segmented else "model"
        with attach(
            model, plan, loss=loss, segment_rows=setting.segment_rows, self_test=False, unsafe_no_bypass=True, **how
        ):
            return _two_steps(model, setting, found.sizes.shape.vocabulary, device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"--probe: the step does not fit ({str(error).splitlines()[0]})") from error


def _two_steps(model: Any, setting: StepSetting, vocabulary: int, device: str) -> Probe:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    MasterWeights(optimizer)
    made = [
        random_batch(
            vocabulary,
            setting.tokens,
            share=setting.loss_share,
            seed=i,
            block_size=setting.block_size,
            local_share=setting.local_share,
        )
        for i in range(setting.batch)
    ]
    names = [name for name in ("input_ids", "labels", LOCAL_ROWS) if name in made[0]]
    batch = {name: torch.cat([one[name] for one in made]).to(device) for name in names}
    timer, peaks = StepTimer(device), []
    for _ in range(2):
        with track_peak(device) as peak, timer.step():
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        peaks.append(peak)
    return Probe(peaks[-1].peak_bytes, timer.seconds[-1], peaks[-1].source)
