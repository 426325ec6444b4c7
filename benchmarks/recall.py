"""Calibrates SmolLM2 on some domains and measures recall on them and on another one, pruning, and Algorithm 1.

    python benchmarks/recall.py --model MODEL --data DATA [--domains books,math,instruct] [--unseen code]

DATA holds pre-tokenised `<domain>-train.npz` and `<domain>-validation.npz` (benchmarks/prepare_data.py makes them).
Fits on train windows, measures on validation windows. Writes Records of recall, mass, predictor size, elastic pruning,
zero-shot loss of dense and sequential fit, and the gain of Algorithm 1 over one global threshold.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import lemo
from lemo.calibrate.tune import window_losses, with_thresholds
from lemo.calibrate.windows import Window
from lemo.config import CalibrationConfig, DataConfig, ModelConfig
from lemo.core.plan import Plan
from lemo.core.predictor import PatternPredictor
from lemo.core.target import TARGETS
from lemo.measure.record import Record
from lemo.measure.statistics import paired_standard_error
from lemo.runtime.batch import supervised_rows
from lemo.train.data import LossRows, WindowCollator, load_windows
from lemo.train.model import load_model

SCRIPT = "benchmarks/recall.py"
# Llama-3-8B: width, layers, query heads, parameters.
LARGE_SHAPE = (4096, 32, 32, 8_030_261_248)


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True)
    add("--data", type=Path, required=True)
    add("--out", type=Path, default=Path("benchmarks/results/recall.jsonl"))
    add("--work", type=Path, default=Path("runs/recall"), help="folder of the calibration; resumes from it")
    add("--domains", default="books,math,instruct")
    add("--unseen", default="code")
    add("--window", type=int, default=8192)
    add("--windows", type=int, default=8, help="train windows of each domain")
    add("--held-out", type=int, default=2, help="validation windows of each domain, the unseen one included")
    add("--gain-windows", type=int, default=4, help="further validation windows of each domain for Algorithm 1")
    add("--keep", type=float, default=0.5)
    add("--loss-share", type=float, default=0.4)
    add("--target", choices=tuple(TARGETS), default="attention_mass")
    add("--kv", choices=("all", "kept"), default="all")
    add("--steps", type=int, default=CalibrationConfig.predictor_steps)
    add("--tune-steps", type=int, default=2)
    add("--prune-to", type=float, default=0.65)
    add("--bypass-target", choices=("update", "dense_stream"), default=CalibrationConfig.bypass_target)
    add("--no-dense-fit", action="store_true")
    add("--dtype", default="bfloat16")
    add("--device", default="cuda")
    return parser.parse_args(arguments)


def read_windows(options: argparse.Namespace, domain: str, split: str, limit: int) -> list[dict[str, Any]]:
    """Batches of one window each as calibration reads them, loss rows drawn as in training."""
    files = (str(options.data / f"{domain}-{split}.npz"),)
    config = DataConfig(**{split: files}, window_tokens=options.window)
    dataset, _ = load_windows(config, None, split, limit=limit)
    collator = LossRows(WindowCollator(), options.loss_share, seed=0, block_size=64)
    batches = []
    for index in range(min(limit, len(dataset))):
        batch = collator([dataset[index]])
        batches.append({"input_ids": batch["input_ids"], "supervised": supervised_rows(batch), "domain": domain})
    return batches


def as_window(batch: Mapping[str, Any]) -> Window:
    """A batch as the tuning functions read it."""
    return Window(batch["input_ids"], batch["supervised"], None, None, batch["domain"], True)


class Results:
    """Writes and prints Records that share a setting."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Keeps the setting."""
        self.path = options.out
        kept = ("domains", "unseen", "window", "windows", "held_out", "gain_windows", "keep", "loss_share", "target")
        self.setting = {name: getattr(options, name) for name in (*kept, "kv", "steps", "tune_steps", "dtype")}
        self.setting["model"] = options.model.name

    def add(self, name: str, unit: str, samples: Any, *, bar: str | None = None, **more: Any) -> Record:
        """Measures, appends and prints one Record."""
        setting = {**self.setting, "statistic": "mean", **more}
        record = Record.measure(name, unit, samples, setting, script=SCRIPT, seeds=(0,), bar=bar)
        record.append(self.path)
        notes = {k: v for k, v in more.items() if isinstance(v, float | str | int)}
        print(f"{bar or '':22s} {name:44s} {record.value:9.4f} {unit}  {notes}", flush=True)
        return record


def record_recall(results: Results, rows: list[dict[str, Any]], seen: set[str], prefix: str) -> None:
    """Recall and mass at both budgets, beside random and position only, on seen domains and on the unseen one."""
    for place, bar in (("in_domain", "A.recall_in_domain"), ("shifted", "A.recall_shifted")):
        group = [r for r in rows if (r["domain"] in seen) == (place == "in_domain")]
        if not group:
            continue
        for share in ("0.15", "0.3"):
            layers: dict[int, list[float]] = {}
            for row in group:
                layers.setdefault(row["layer"], []).append(row[f"{prefix}recall_{share}"])
            worst = min(layers, key=lambda layer: fmean(layers[layer]))
            notes = {
                "worst_layer": worst,
                "worst_layer_recall": fmean(layers[worst]),
                "random": fmean(r[f"random_recall_{share}"] for r in group),
                "position_only": fmean(r[f"position_recall_{share}"] for r in group),
                "by_domain": {
                    d: fmean(r[f"{prefix}recall_{share}"] for r in group if r["domain"] == d)
                    for d in sorted({r["domain"] for r in group})
                },
            }
            samples = [r[f"{prefix}recall_{share}"] for r in group]
            chosen = bar if share == "0.3" else None
            results.add(f"predictor/recall/{place}/{share}", "share", samples, bar=chosen, budget=share, **notes)
            masses = {name: fmean(r[f"{name}_mass_{share}"] for r in group) for name in ("random", "position")}
            samples = [r[f"{prefix}mass_{share}"] for r in group]
            results.add(f"predictor/mass/{place}/{share}", "share", samples, budget=share, **masses)


def record_sizes(results: Results, plan: Plan, model: Any, rows: list[dict[str, Any]], seen: set[str]) -> None:
    """Predictor parameters over the model's, and the size and recall after elastic pruning."""
    config = CalibrationConfig()
    layers = [layer.predictor for layer in plan.layers if layer.predictor is not None]
    heads = model.config.num_attention_heads
    width, hidden = model.config.hidden_size, (config.predictor_width, config.predictor_width)

    def size(width: int, heads: int) -> int:
        with torch.device("meta"):
            shape = {"query_widths": hidden, "key_widths": hidden, "rank": config.predictor_rank}
            features = min(config.pooled_features, heads)
            return PatternPredictor(width, pooled_features=features, **shape).parameter_count()

    total = sum(p.numel() for p in model.parameters())
    full = size(width, heads)
    share = full * model.config.num_hidden_layers / total
    results.add("predictor/parameters", "share", [share], bar="A.predictor_share/smollm2-135m", goal=0.05)
    large_width, large_layers, large_heads, large_total = LARGE_SHAPE
    share = size(large_width, large_heads) * large_layers / large_total
    results.add("predictor/parameters", "share", [share], bar="A.predictor_share/llama-3-8b", goal=0.005)
    group = [r for r in rows if r["domain"] in seen and "unpruned_recall_0.3" in r]
    if group:
        loss = 100 * fmean(r["unpruned_recall_0.3"] - r["recall_0.3"] for r in group)
        samples = [p.parameter_count() / full for p in layers]
        results.add("predictor/elastic_size", "share", samples, bar="A.elastic_size", recall_loss_points=loss)


def record_losses(results: Results, losses: Mapping[str, Sequence[float]]) -> None:
    """Zero-shot loss under the plan, for dense and sequential fit, against the dense forward."""
    for name, values in losses.items():
        if name != "dense":
            samples = {"baseline": losses["dense"], "lemo": values}
            error = paired_standard_error(losses["dense"], values)
            title = f"calibration/zero_shot_gap/{name.replace(', ', '/').replace(' ', '_')}"
            results.add(title, "nats", samples, statistic="difference_of_means", standard_error=error)


def record_threshold_gain(
    results: Results, model: Any, plan: Plan, tuning: Mapping[str, Any], windows: Sequence[Window]
) -> None:
    """Algorithm 1 against one global threshold at equal mean ratio, on windows that neither has seen."""
    losses: dict[str, list[float]] = {}
    kept: dict[str, list[float]] = {}
    for name, found in (("baseline", tuning["one_global_threshold"]), ("lemo", tuning)):
        thresholds = {int(i): t for i, t in found["thresholds"].items()}
        ratios = {int(i): r for i, r in found["ratios"].items()}
        kept[name] = []
        losses[name] = window_losses(model, with_thresholds(plan, thresholds, ratios), windows, kept[name])
    notes = {f"kept_{name}": fmean(values) for name, values in kept.items()}
    error = paired_standard_error(losses["baseline"], losses["lemo"])
    results.add(
        "calibration/threshold_gain",
        "nats",
        losses,
        bar="A.threshold_gain",
        statistic="reduction_of_means",
        standard_error=error,
        **notes,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs everything and writes Records."""
    options = read_options(arguments)
    start = time.perf_counter()
    domains = options.domains.split(",")
    model = load_model(ModelConfig(path=str(options.model), dtype=options.dtype), device=torch.device(options.device))
    model.eval()
    batches = [b for d in domains for b in read_windows(options, d, "train", options.windows)]
    held, gain = [], []
    for domain in domains:
        read = read_windows(options, domain, "validation", options.held_out + options.gain_windows)
        held += read[: options.held_out]
        gain += [as_window(b) for b in read[options.held_out :]]
    held += read_windows(options, options.unseen, "validation", options.held_out)
    print(f"{len(batches)} windows to fit on, {len(held)} held out, {len(gain)} for thresholds", flush=True)

    skeleton = Plan.uniform(
        model,
        forward_ratio=options.keep,
        backward_ratio=options.keep,
        dense_layers=(0, -1),
        kv=options.kv,
        policy="threshold" if options.tune_steps else "topk",
    )
    config = CalibrationConfig(
        target=options.target,
        predictor_steps=options.steps,
        prune_to=options.prune_to,
        bypass_target=options.bypass_target,
        tune_steps=options.tune_steps,
        compare_dense_fit=not options.no_dense_fit,
        memory_limit_gib=16.0,
    )
    plan = lemo.calibrate(model, batches, config, plan=skeleton, held_out=held, output_dir=options.work)
    print(f"calibrated in {time.perf_counter() - start:.0f} s", flush=True)

    report = json.loads((options.work / "calibration-report.json").read_text(encoding="utf-8"))
    rows = [r for r in report["fits"]["sequential"]["rows"] if r["part"] == "rows"]
    results, seen = Results(options), set(domains)
    record_recall(results, rows, seen, "unpruned_" if options.prune_to < 1 else "")
    record_sizes(results, plan, model, rows, seen)
    record_losses(results, report["losses"])
    if report["tuning"] is not None:
        record_threshold_gain(results, model, plan, report["tuning"], gain)
    print(f"done in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
