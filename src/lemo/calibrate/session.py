"""One calibration from tokens to plan: collect, fit, tune and report, each resumable."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lemo.calibrate.budget import LayerCost, allocate_once
from lemo.calibrate.collect import HiddenStore, LayerCollector, PartStatistics, mlp_ratio_of
from lemo.calibrate.fit import PartFit, fit_part, standardise
from lemo.calibrate.report import SHARES, print_report, recall, recall_row, summarise, write_report
from lemo.calibrate.shards import Shards, fingerprint_run
from lemo.calibrate.streams import advance, open_stream, stored
from lemo.calibrate.tune import (
    ScoreProfile,
    expected_ratios,
    project,
    tune_thresholds,
    window_losses,
    with_ratios,
    with_thresholds,
)
from lemo.calibrate.windows import Window, read_windows, settled
from lemo.config import CalibrationConfig
from lemo.core.layout import Layout
from lemo.core.plan import LayerPlan, Plan
from lemo.errors import ConfigError
from lemo.runtime.model import fingerprint
from lemo.runtime.stream import LayerStream


@dataclass
class Calibration:
    """State of one calibration.

    Attributes:
        model: in eval mode for as long as the calibration runs.
        windows: fitted-on first, held-out after.
        config: options.
        skeleton: plan whose ratios and choices the result takes over.
        shards: what is kept on disk.
        progress: shows progress bars.
        cost: of a layer, where ratios are allocated.
    """

    model: nn.Module
    windows: list[Window]
    config: CalibrationConfig
    skeleton: Plan
    shards: Shards
    progress: bool
    cost: LayerCost | None = None

    def run(self) -> tuple[Plan, dict[str, Any]]:
        """The calibrated plan and its report."""
        target = replace(self.skeleton, scorer=self.config.scorer, policy="topk")
        fits: dict[str, dict[str, Any]] = {}
        plans: dict[str, Plan] = {}
        if self.config.compare_dense_fit:
            self.collect_dense(target)
            plans["dense"], fits["dense"] = self.fit_dense(target)
        plans["sequential"], fits["sequential"] = self.fit_sequential(target)
        losses = self.measure_losses(plans)
        plan = plans["sequential"]
        tuning: dict[str, Any] | None = None
        if self.skeleton.policy == "threshold" or self.config.tune_steps > 0:
            plan, tuning = self.tune(plan, fits["sequential"])
        allocation: dict[str, Any] | None = None
        if self.config.allocate == "budget":
            held = self._tuning_windows()
            layouts = [open_stream(self.model, w, self.skeleton.block_size).layout for w in held]
            plan, allocation = allocate_once(self.model, plan, (held, layouts), self.cost, self.shards, self.progress)
        for stage in fits.values():
            stage.pop("scores")
        report = {"fits": fits, "losses": losses, "tuning": tuning, "allocation": allocation}
        report |= {"config": dataclasses.asdict(self.config)}
        provenance = {
            "config": dataclasses.asdict(self.config),
            "domains": sorted({w.domain for w in self.windows if not w.held_out}),
            "windows": sum(not w.held_out for w in self.windows),
            "recall": {name: stage["recall"] for name, stage in fits.items()},
            "losses": losses,
        }
        plan = replace(plan, fingerprint=fingerprint(self.model), provenance=provenance)
        return plan, report

    def collect_dense(self, plan: Plan) -> None:
        """Stage `collect`: statistics of every layer on the dense stream, as shards.

        Without an output folder nothing can be kept; `fit_dense` then collects as it goes.
        """
        if self.shards.folder is None:
            return
        missing = [i for i in self._layers(plan) if self.shards.load_statistics(i, torch.device("cpu")) is None]
        if not missing:
            return
        for layer, parts in self._dense_statistics(plan, "collect"):
            if layer in missing:
                self.shards.save_statistics(layer, parts)

    def fit_dense(self, plan: Plan) -> tuple[Plan, dict[str, Any]]:
        """Stage `fit`, dense: every layer from statistics of the dense stream. For comparison only."""
        stage: dict[str, Any] = {"rows": [], "explained": {}, "scores": {}}
        found = {i: self.shards.load_layer("dense", i) for i in self._layers(plan)}
        if any(x is None for x in found.values()):
            streams = self._open()
            layouts = [s.layout for s in streams]
            for layer, parts in self._stored_statistics(plan):
                fitted, record = self._fit_layer(layer, parts, layouts, plan.layers[layer])
                self.shards.save_layer("dense", layer, fitted, record)
                found[layer] = (fitted, record)
        for layer, (fitted, record) in sorted(found.items()):
            plan = _take(plan, layer, fitted)
            _note(stage, layer, record)
        stage["recall"] = summarise(stage["rows"])
        return plan, stage

    def fit_sequential(self, plan: Plan) -> tuple[Plan, dict[str, Any]]:
        """Stage `fit`: layer by layer on the stream that the layers before make with their rows skipped.

        An interrupted fit runs the finished layers again (sparse and cheap) and goes on with the next.
        """
        stage: dict[str, Any] = {"rows": [], "explained": {}, "scores": {}}
        chosen = self._layers(plan)
        finished = {i: self.shards.load_layer("sequential", i) for i in chosen}
        if all(x is not None for x in finished.values()):
            for layer in chosen:
                plan = _take(plan, layer, finished[layer][0])
                _note(stage, layer, finished[layer][1])
            stage["recall"] = summarise(stage["rows"])
            return plan, stage
        with self._streams() as (streams, store), self._dense_store() as dense:
            collector = LayerCollector(streams, self.windows, store, plan, self.config, dense)
            layouts = [s.layout for s in streams]
            for layer in _track(range(streams[0].layers), "fit, layer by layer", self.progress):
                if dense is not None:
                    advance(streams, dense, layer)
                if layer in chosen:
                    if finished[layer] is None:
                        parts = collector.collect(layer, keep_output=False)
                        finished[layer] = self._fit_layer(layer, parts, layouts, plan.layers[layer])
                        self.shards.save_layer("sequential", layer, *finished[layer])
                    plan = _take(plan, layer, finished[layer][0])
                    _note(stage, layer, finished[layer][1])
                if layer + 1 < streams[0].layers:
                    advance(streams, store, layer, plan)
        stage["recall"] = summarise(stage["rows"])
        return plan, stage

    def measure_losses(self, plans: Mapping[str, Plan]) -> dict[str, list[float]]:
        """Zero-shot loss of held-out windows: dense, and sparse under each fit. Empty without held-out windows."""
        found = self.shards.load_json("losses")
        if found is not None:
            return found
        held = [w for w in self.windows if w.held_out]
        losses: dict[str, list[float]] = {}
        if held and any(x.forward_ratio < 1 for x in self.skeleton.layers):
            losses["dense"] = window_losses(self.model, None, held)
            for name, plan in plans.items():
                losses[f"sparse, {name} fit"] = window_losses(self.model, plan, held)
        self.shards.save_json("losses", losses)
        return losses

    def tune(self, plan: Plan, stage: Mapping[str, Any]) -> tuple[Plan, dict[str, Any]]:
        """Stage `tune`: thresholds, or ratios per layer when the plan's policy is `topk`.

        Raises:
            ConfigError: no held-out windows, or exact forward, whose loss no threshold changes.
        """
        layouts = [s.layout for s, w in zip(self._open(), self.windows, strict=True) if not w.held_out]
        held = self._tuning_windows()
        sparse = [i for i in self._layers(plan) if plan.layers[i].forward_ratio < 1]
        if not sparse:
            raise ConfigError("thresholds cannot be tuned on exact forward (forward_ratio 1): its loss ignores them")
        if plan.ratio_of != "all":
            raise ConfigError("thresholds are tuned to a ratio of all rows; set sparsity.ratio_of to all")
        if not held:
            raise ConfigError("thresholds are tuned on held-out windows; give held_out, or tune_windows above 0")
        scores = {i: [torch.tensor(x) for x in stage["scores"][i]] for i in sparse}
        profiles = {i: ScoreProfile.of(scores[i], layouts) for i in sparse}
        ratio = sum(plan.layers[i].forward_ratio for i in sparse) / len(sparse)
        found = self.shards.load_json("tune")
        if found is None:
            found = self._tune(plan, profiles, held, ratio)
            self.shards.save_json("tune", found)
        thresholds = {int(i): t for i, t in found["thresholds"].items()}
        finish = with_thresholds if self.skeleton.policy == "threshold" else with_ratios
        return finish(plan, thresholds, expected_ratios(thresholds, profiles)), found

    def _tune(
        self, plan: Plan, profiles: Mapping[int, ScoreProfile], held: list[Window], ratio: float
    ) -> dict[str, Any]:
        """Runs Algorithm 1 and keeps its history."""
        history: list[dict[str, Any]] = []

        def quality(thresholds: Mapping[int, float]) -> float:
            tried = with_thresholds(plan, thresholds, expected_ratios(thresholds, profiles))
            losses = window_losses(self.model, tried, held)
            return -sum(losses) / len(losses)

        def note(step: int, thresholds: dict[int, float], value: float) -> None:
            ratios = expected_ratios(thresholds, profiles)
            history.append({"step": step, "loss": -value, "thresholds": dict(thresholds), "ratios": ratios})
            if self.progress:
                print(f"tune: step {step}, held-out sparse loss {-value:.4f}", flush=True)

        thresholds = tune_thresholds(quality, profiles, ratio, self.config.tune_steps, note)
        common = project(dict.fromkeys(thresholds, 0.0), profiles, ratio)
        rivals = {"thresholds": common, "ratios": expected_ratios(common, profiles)}
        result = {"thresholds": thresholds, "ratios": expected_ratios(thresholds, profiles), "ratio": ratio}
        return {**result, "one_global_threshold": rivals, "history": history}

    def _unpruned(self, fit: PartFit, statistics: PartStatistics, index: int, layout: Layout) -> dict[str, float]:
        """Recall of the predictor before pruning, beside that of the pruned one."""
        features = standardise(fit.unpruned, statistics.features[index])
        scores_K = fit.unpruned.scores_of_features(features, layout)
        found = {share: recall(scores_K, statistics.targets[index], layout, share) for share in SHARES}
        return {
            f"unpruned_{name}_{share}": value
            for share, pair in found.items()
            for name, value in zip(("recall", "mass"), pair or (1.0, 1.0), strict=True)
        }

    def _tuning_windows(self) -> list[Window]:
        """Held-out windows of the domains that are fitted on; all held-out ones when there are none of these."""
        held = [w for w in self.windows if w.held_out]
        known = {w.domain for w in self.windows if not w.held_out}
        return [w for w in held if w.domain in known] or held

    def _layers(self, plan: Plan) -> list[int]:
        """Layers that skip anything."""
        return [i for i, layer in enumerate(plan.layers) if not layer.is_dense]

    def _open(self) -> list[LayerStream]:
        """Every window at the first layer."""
        return [open_stream(self.model, w, self.skeleton.block_size) for w in self.windows]

    @contextmanager
    def _streams(self) -> Iterator[tuple[list[LayerStream], HiddenStore]]:
        """Streams of all windows at the first layer, their residual streams in a store."""
        streams = self._open()
        with stored([s.hidden_BTM for s in streams], self.config.memory_limit_gib, self.shards.scratch()) as store:
            for stream in streams:
                del stream.hidden_BTM
            yield streams, store

    @contextmanager
    def _dense_store(self) -> Iterator[HiddenStore | None]:
        """Residual streams that will skip nothing, where the bypass aims at them."""
        if self.config.bypass_target != "dense_stream":
            yield None
            return
        scratch = self.shards.scratch()
        folder = None if scratch is None else scratch.with_name("dense-streams")
        with stored([s.hidden_BTM for s in self._open()], self.config.memory_limit_gib, folder) as store:
            yield store

    def _dense_statistics(self, plan: Plan, title: str) -> Iterator[tuple[int, dict[str, PartStatistics]]]:
        """Statistics of the layers that skip, on the dense stream."""
        with self._streams() as (streams, store):
            collector = LayerCollector(streams, self.windows, store, plan, self.config)
            wanted = self._layers(plan)
            for layer in _track(range(max(wanted, default=-1) + 1), title, self.progress):
                if layer in wanted:
                    yield layer, collector.collect(layer, keep_output=True)
                else:
                    for index, stream in enumerate(streams):
                        x_BTM = store.get(index, stream.layout.device)
                        store.put(index, stream.dense(layer, x_BTM).output_BTM)
                store.advance()

    def _stored_statistics(self, plan: Plan) -> Iterator[tuple[int, dict[str, PartStatistics]]]:
        """The same from shards, or collected now when there is no folder."""
        if self.shards.folder is None:
            yield from self._dense_statistics(plan, "collect and fit, dense")
            return
        device = next(self.model.parameters()).device
        for layer in _track(self._layers(plan), "fit, dense", self.progress):
            parts = self.shards.load_statistics(layer, device)
            if parts is None:
                raise ConfigError(f"the collected statistics of layer {layer} are missing; remove the folder")
            yield layer, parts

    def _fit_layer(
        self, layer: int, parts: Mapping[str, PartStatistics], layouts: list[Layout], planned: LayerPlan
    ) -> tuple[LayerPlan, dict[str, Any]]:
        """Fits the parts of a layer, and measures recall on held-out windows."""
        fitted_on = [i for i, w in enumerate(self.windows) if not w.held_out]
        changes: dict[str, Any] = {}
        record: dict[str, Any] = {"rows": [], "explained": {}, "scores": []}
        for name, statistics in parts.items():
            fit = fit_part(statistics, layouts, fitted_on, self.config)
            prefix = "" if name == "rows" else "mlp_"
            scores = [_scores(fit, raw, layouts[i]) for i, raw in enumerate(statistics.features)]
            changes |= {f"{prefix}predictor": fit.predictor, f"{prefix}bypass": fit.bypass}
            record["explained"][name] = fit.explained
            for index, window in enumerate(self.windows):
                if scores and window.held_out:
                    row = recall_row(scores[index], statistics.targets[index], layouts[index], layer, self.config.seed)
                    if row and fit.unpruned is not fit.predictor:
                        row |= self._unpruned(fit, statistics, index, layouts[index])
                    if row:
                        record["rows"].append(
                            {"layer": layer, "part": name, "domain": window.domain, "window": index, **row}
                        )
            if name == "rows":
                record["scores"] = [scores[i].cpu().tolist() for i in fitted_on if scores]
        if "mlp" in parts:
            changes["mlp_ratio"] = mlp_ratio_of(planned)
        return replace(planned, **changes), record


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    config: CalibrationConfig | None = None,
    *,
    plan: Plan,
    output_dir: str | Path | None = None,
    progress: bool = True,
    held_out: Iterable[Mapping[str, Any]] | None = None,
    cost: LayerCost | None = None,
) -> Plan:
    """Fits predictors, bypasses and thresholds of a model on batches of tokens.

    Args:
        model: a Transformers causal language model without a plan attached; not changed.
        batches: dicts with `input_ids` (B, T), and optionally `attention_mask`, `position_ids`, `supervised` (B, T)
            bool, and `domain`.
        config: options; the defaults when None.
        plan: a skeleton that gives ratios, K/V, policy and block size.
        output_dir: keeps shards, the report and the plan there, and resumes from them.
        progress: show progress bars and print the report.
        held_out: batches for recall, zero-shot loss and thresholds. None takes the last `tune_windows` batches that
            leave at least one to fit on.
        cost: of a layer, for `allocate`; `lemo.train.costs.layer_cost` counts FLOPs.

    Returns:
        The calibrated plan; its `provenance` holds the report's summary.

    Raises:
        ConfigError: options that do not fit, statistics over the memory limit without a folder, or a folder of
            another calibration.
        DataError: batches that cannot be used.
    """
    config = config or CalibrationConfig()
    batches = list(batches)
    if held_out is None:
        count = min(config.tune_windows, len(batches) - 1)
        batches, held_out = (batches[:-count], batches[-count:]) if count > 0 else (batches, [])
    windows = read_windows(batches, held_out)
    config = settled(config, plan.policy, windows)
    folder = None if output_dir is None else Path(output_dir)
    was_training = model.training
    model.eval()
    try:
        shards = Shards(folder, fingerprint_run(model, windows, config, plan))
        result, report = Calibration(model, windows, config, plan, shards, progress, cost).run()
    finally:
        model.train(was_training)
    if folder is not None:
        result.save(folder / "plan")
        write_report(report, folder)
    if progress:
        print_report(report)
    return result


def _scores(fit: PartFit, raw_KF: Tensor, layout: Layout) -> Tensor:
    """Scores of a window's blocks from the raw features of the predictor before pruning."""
    return fit.predictor.scores_of_features(standardise(fit.predictor, raw_KF[:, fit.inputs]), layout)


def _take(plan: Plan, layer: int, fitted: LayerPlan) -> Plan:
    """The plan with a layer's fitted parts."""
    names = ("predictor", "bypass", "mlp_predictor", "mlp_bypass", "mlp_ratio")
    return plan.replace_layer(layer, **{name: getattr(fitted, name) for name in names})


def _note(stage: dict[str, Any], layer: int, record: Mapping[str, Any]) -> None:
    """Adds a layer's record to a stage's."""
    stage["rows"].extend(record["rows"])
    stage["explained"][layer] = record["explained"].get("rows")
    stage["scores"][layer] = record["scores"]


def _track(layers: Iterable[int], title: str, progress: bool) -> Iterable[int]:
    """Layers with a progress bar."""
    if not progress:
        return layers
    from rich.progress import track

    return track(list(layers), description=title)
