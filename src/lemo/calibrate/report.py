"""Report of a calibration: recall per layer and domain, energy that bypasses explain, zero-shot sparse loss."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lemo.core.layout import Layout
from lemo.core.score import Position, Random, Recent, ScoreInputs

SHARES = (0.15, 0.3)
RIVALS = ("random", "position", "recent")


def recall(scores_K: Tensor, target_K: Tensor, layout: Layout, share: float) -> tuple[float, float] | None:
    """How well scores find the blocks that a target ranks highest, among competing blocks only.

    Guards and supervised blocks are kept whatever their score, so they do not compete. Per document the best
    round(share · competing) blocks (at least one) are compared; documents with fewer than two competing blocks, where
    nothing is chosen, do not count. Other documents count by the blocks that they choose.

    Returns:
        (share of the target's best blocks that are among the scores' best, target mass of the scores' best over that
        of the target's best), or None when no document counts.
    """
    scores_K, target_K = scores_K.detach().float().cpu(), target_K.detach().float().cpu()
    hits = chosen = 0
    mass = best_mass = 0.0
    for document in range(len(layout.document_start_D)):
        blocks = ((layout.block_document_K == document) & ~layout.forced_K).nonzero().squeeze(-1)
        if len(blocks) < 2:
            continue
        count = max(1, round(share * len(blocks)))
        found = blocks[scores_K[blocks].topk(count).indices]
        best = blocks[target_K[blocks].topk(count).indices]
        hits += int(torch.isin(found, best).sum())
        chosen += count
        mass += float(target_K[found].sum())
        best_mass += float(target_K[best].sum())
    return (hits / chosen, mass / best_mass if best_mass > 0 else 1.0) if chosen else None


def recall_row(scores_K: Tensor, target_K: Tensor, layout: Layout, layer: int, seed: int) -> dict[str, float]:
    """Recall and mass at every share, of the scores and of ranks that need no predictor; {} for none.

    These are random ones, the place alone, and how shortly before a block with loss a block stands.
    """
    inputs = ScoreInputs(layout, layer=layer)
    random_K = Random(seed).scores(inputs).to(layout.device)
    ranks = {"": scores_K, "random_": random_K}
    ranks |= {"position_": Position().scores(inputs), "recent_": Recent().scores(inputs)}
    row: dict[str, float] = {}
    for prefix, ranked_K in ranks.items():
        for share in SHARES:
            result = recall(ranked_K, target_K, layout, share)
            if result is None:
                return {}
            row[f"{prefix}recall_{share}"], row[f"{prefix}mass_{share}"] = result
    return row


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per domain: mean over layers and windows of every figure, and recall of the worst layer.

    Args:
        rows: one per (layer, held-out window), with `layer`, `domain` and the figures of `recall_row`.
    """
    domains: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        domains[str(row["domain"])].append(row)
    result: dict[str, dict[str, Any]] = {}
    for domain, group in sorted(domains.items()):
        figures = [name for name in group[0] if name not in ("layer", "domain", "part", "window")]
        result[domain] = {name: fmean(float(row[name]) for row in group) for name in figures}
        for share in SHARES:
            by_layer: dict[int, list[float]] = defaultdict(list)
            for row in group:
                by_layer[int(row["layer"])].append(float(row[f"recall_{share}"]))
            worst = min(by_layer, key=lambda layer: fmean(by_layer[layer]))
            result[domain][f"worst_recall_{share}"] = fmean(by_layer[worst])
            result[domain][f"worst_layer_{share}"] = worst
    return result


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Writes calibration-report.json into `folder`."""
    (folder / "calibration-report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def print_report(report: Mapping[str, Any]) -> None:
    """Prints the report as tables on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for fit, stage in report["fits"].items():
        table = Table(title=f"Predictors, {fit} fit: recall of the best 0.3 of competing blocks, held-out windows")
        for column in ("domain", "recall", "worst layer", "mass", "random", "position only", "before loss"):
            table.add_column(column, justify="left" if column == "domain" else "right")
        for domain, row in stage["recall"].items():
            worst = f"{row['worst_recall_0.3']:.3f} (layer {row['worst_layer_0.3']})"
            names = ["recall_0.3", "mass_0.3", *(f"{rival}_recall_0.3" for rival in RIVALS)]
            found, *others = (f"{row[name]:.3f}" if name in row else "–" for name in names)
            table.add_row(domain, found, worst, *others)
        if stage["recall"]:
            console.print(table)
    losses = Table(title="Zero-shot loss on held-out windows (nats per supervised token)")
    losses.add_column("forward")
    losses.add_column("loss", justify="right")
    for name, value in report["losses"].items():
        losses.add_row(name, f"{fmean(value):.4f}")
    if report["losses"]:
        console.print(losses)


def curves(report: Mapping[str, Any]) -> dict[str, dict[str, dict[int, float]]]:
    """What a plot of a report shows: {panel: {line: {layer: value}}}.

    Panels are `recall` (at 0.3 of the competing blocks; a line per domain and fit) and `explained` (share of the
    update's energy that the bypass explains; a line per fit).
    """
    panels: dict[str, dict[str, dict[int, float]]] = {"recall": {}, "explained": {}}
    for fit, stage in report["fits"].items():
        points: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in stage["rows"]:
            if row["part"] == "rows":
                points[row["domain"]][int(row["layer"])].append(row["recall_0.3"])
        for domain, layers in points.items():
            panels["recall"][f"{domain}, {fit}"] = {layer: fmean(layers[layer]) for layer in sorted(layers)}
        explained = {int(layer): share for layer, share in stage["explained"].items() if share is not None}
        panels["explained"][fit] = dict(sorted(explained.items()))
    return panels
