"""One HTML page about one or several runs, from what `lemo train` left in their folders."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lemo.errors import DataError
from lemo.measure.memory import GIB
from lemo.report import charts, html

_UNSET = "–"


@dataclass(frozen=True)
class RunLog:
    """What a run left behind.

    Attributes:
        name: of the run on the page.
        entries: lines of metrics.jsonl.
        recipe: the resolved recipe, nested.
        summary: the result; empty while the run is not finished.
        before: evaluations before training, by name; empty where there were none.
        calibration: the calibration's report; empty where there was none.
    """

    name: str
    entries: tuple[Mapping[str, Any], ...]
    recipe: Mapping[str, Any]
    summary: Mapping[str, Any] = field(default_factory=dict)
    before: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def points(self, key: str, scale: float = 1.0) -> list[tuple[float, float]]:
        """(step, value) of one figure of the log."""
        return [
            (entry["step"], float(entry[key]) * scale)
            for entry in self.entries
            if isinstance(entry.get(key), int | float) and math.isfinite(entry[key])
        ]


def read_run(folder: str | Path, recipe: Mapping[str, Any], name: str) -> RunLog:
    """Reads the log of a run; a run that is not finished counts as far as it came.

    A last line that was cut off in writing is left out.

    Raises:
        DataError: the folder has no log, or a file cannot be read.
    """
    folder = Path(folder)
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise DataError(f"{folder}: holds no metrics.jsonl, so there is nothing to report")
    entries = []
    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    for row, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            entry["step"]
        except (ValueError, KeyError, TypeError) as error:
            if row == len(lines) and isinstance(error, ValueError):
                break  # cut off in writing
            raise DataError(f"{metrics}, row {row}: no log entry; repair or remove that line") from error
        entries.append(entry)
    found = {key: _read_json(folder / file) for key, file in _FILES.items()}
    return RunLog(name, tuple(entries), recipe, **found)


_FILES = {
    "summary": "summary.json",
    "before": "before.json",
    "calibration": "calibration/calibration-report.json",
}


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def run_page(runs: Sequence[RunLog], title: str | None = None) -> str:
    """The page: results, curves, rows per layer, what calibration found, and how the recipes differ."""
    title = title or (f"Training run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs")
    parts = [
        "<h2>Results</h2>",
        _results(runs),
        '<div class="grid2">',
        *_curves(runs),
        "</div>",
        *_layers(runs),
        *_calibrations(runs),
        *_recipes(runs),
    ]
    return html.page(title, [part for part in parts if part], style=charts.STYLE)


def _results(runs: Sequence[RunLog]) -> str:
    """A column per run."""
    rows: dict[str, list[str]] = {}

    def add(name: str, values: Iterable[str]) -> None:
        found = list(values)
        if any(value != _UNSET for value in found):
            rows[name] = found

    names = list(dict.fromkeys(loss for run in runs for loss in _losses(run)))
    add("state", (_state(run) for run in runs))
    for name in names:
        add(f"validation loss, {name} training", (_number(_losses(run).get(name), "{:.4f}") for run in runs))
    add("last training loss", (_number(_last(run, "loss"), "{:.4f}") for run in runs))
    add("tokens/s", (_number(run.summary.get("tokens_per_s") or _last(run, "tokens_per_s"), "{:,.0f}") for run in runs))
    add("peak memory, GiB", (_number(_peak(run), "{:.2f}") for run in runs))
    add("seconds of training", (_number(run.summary.get("seconds"), "{:,.0f}") for run in runs))
    add("rows forward / backward", (_ratios(run) for run in runs))
    add("batches that ran densely", (_number(run.summary.get("dense_batches"), "{:,}") for run in runs))
    add("device", (str(run.summary.get("device", _UNSET)) for run in runs))
    text = html.rows(
        ["", *(run.name for run in runs)], [[name, *values] for name, values in rows.items()], numbers=True
    )
    looks = any("sparse" in name for name in names)
    note = "Sparse losses are look-ahead: selection sees later tokens, so they are no causal model's losses."
    notes = [f"{run.name}: {note}" for run in runs for note in run.summary.get("notes", ())]
    return text + "".join(map(html.paragraph, [*([note] if looks else []), *notes]))


def _losses(run: RunLog) -> dict[str, float]:
    """Validation losses by name, `dense before` and so on."""
    return run.summary.get("losses") or {name: report["nats"] for name, report in run.before.items()}


def _state(run: RunLog) -> str:
    steps = run.summary.get("steps") or max((entry["step"] for entry in run.entries), default=0)
    return f"{steps:,} steps" if run.summary else f"not finished, {steps:,} steps"


def _last(run: RunLog, key: str) -> float | None:
    points = run.points(key)
    return points[-1][1] if points else None


def _peak(run: RunLog) -> float | None:
    peak = run.summary.get("peak_memory_bytes") or max((y for _, y in run.points("peak_memory_bytes")), default=0)
    return peak / GIB if peak else None


def _ratios(run: RunLog) -> str:
    forward, backward = _last(run, "forward_ratio"), _last(run, "backward_ratio")
    return _UNSET if forward is None or backward is None else f"{forward:.0%} / {backward:.0%}"


def _number(value: Any, form: str) -> str:
    return _UNSET if value is None else form.format(value)


def _curves(runs: Sequence[RunLog]) -> list[str]:
    """Charts over the steps."""

    def chart(title: str, key: str, unit: str, scale: float = 1.0, *, from_zero: bool = True) -> str:
        series = {run.name: run.points(key, scale) for run in runs if run.points(key)}
        return charts.line_chart(title, series, x_label="step", y_label=unit, from_zero=from_zero)

    memory: dict[str, charts.Points] = {}
    rows: dict[str, charts.Points] = {}
    for run in runs:
        label = f"{run.name}, " if len(runs) > 1 else ""
        memory[f"{label}after the step"] = run.points("memory_bytes", 1 / GIB)
        memory[f"{label}peak so far"] = run.points("peak_memory_bytes", 1 / GIB)
        rows[f"{label}forward"] = run.points("forward_ratio")
        rows[f"{label}backward"] = run.points("backward_ratio")
    return [
        chart("Training loss", "loss", "nats", from_zero=False),
        chart("Validation loss", "eval_loss", "nats", from_zero=False),
        chart("Throughput", "tokens_per_s", "tokens/s"),
        charts.line_chart("Memory", memory, x_label="step", y_label="GiB", from_zero=True),
        charts.line_chart(
            "Share of rows that run, mean over layers", rows, x_label="step", y_label="share", from_zero=True
        ),
        chart("Recall of the predictors while training", "predictor_recall", "recall", from_zero=False),
        chart("Learning rate", "learning_rate", "rate"),
        chart("Gradient norm", "grad_norm", "norm"),
    ]


def _layers(runs: Sequence[RunLog]) -> list[str]:
    """Rows per layer: by layer in the last step, and by group of layers over the steps."""
    last: dict[str, charts.Points] = {}
    parts = []
    for run in runs:
        logged = [entry for entry in run.entries if entry.get("layer_ratios")]
        if not logged:
            continue
        ratios = {int(layer): pair for layer, pair in logged[-1]["layer_ratios"].items()}
        for index, way in enumerate(("forward", "backward")):
            last[f"{run.name}, {way}"] = [(layer, ratios[layer][index]) for layer in sorted(ratios)]
        groups = {
            f"layers {group[0]} to {group[-1]}": [(entry["step"], _mean_ratio(entry, group)) for entry in logged]
            for group in _groups(sorted(ratios))
        }
        title = f"Rows that pass gradient, by group of layers: {run.name}"
        parts.append(charts.line_chart(title, groups, x_label="step", y_label="share", from_zero=True))
    if not last:
        return []
    title = "Share of rows in the last step, by layer"
    chart = charts.line_chart(title, last, x_label="layer", y_label="share", from_zero=True)
    return ["<h2>Rows by layer</h2>", '<div class="grid2">', chart, *parts, "</div>"]


def _groups(layers: Sequence[int], count: int = 4) -> list[Sequence[int]]:
    """Consecutive layers in at most `count` groups."""
    edges = [round(i * len(layers) / count) for i in range(count + 1)]
    return [layers[a:b] for a, b in itertools.pairwise(edges) if b > a]


def _mean_ratio(entry: Mapping[str, Any], group: Sequence[int]) -> float:
    """Mean backward share of a group; a layer that is not there ran every row."""
    found = entry["layer_ratios"]
    return sum(found.get(str(layer), (1.0, 1.0))[1] for layer in group) / len(group)


def _calibrations(runs: Sequence[RunLog]) -> list[str]:
    """What calibration found, by layer."""
    from lemo.calibrate.report import curves

    panels: dict[str, dict[str, charts.Points]] = {"recall": {}, "explained": {}}
    for run in runs:
        if run.calibration.get("fits"):
            for panel, lines in curves(run.calibration).items():
                for name, layers in lines.items():
                    label = f"{run.name}: {name}" if len(runs) > 1 else name
                    panels[panel][label] = sorted(layers.items())
    titles = {
        "recall": ("Predictors: recall of the best 0.3 of competing blocks, held out", "recall"),
        "explained": ("Bypass: share of the update that it explains, held out", "share"),
    }
    drawn = [
        charts.line_chart(title, panels[panel], x_label="layer", y_label=unit)
        for panel, (title, unit) in titles.items()
    ]
    return ["<h2>Calibration</h2>", '<div class="grid2">', *drawn, "</div>"] if any(drawn) else []


def _recipes(runs: Sequence[RunLog]) -> list[str]:
    """The recipe of one run, or the keys in which several differ."""
    flat = [flatten(run.recipe) for run in runs]
    keys = list(dict.fromkeys(key for each in flat for key in each))
    if len(runs) > 1:
        keys = [key for key in keys if len({json.dumps(each.get(key)) for each in flat}) > 1]
    title = "Recipe" if len(runs) == 1 else "Where the recipes differ"
    body = [[key, *(_value(each[key]) if key in each else _UNSET for each in flat)] for key in keys]
    table = html.rows(["key", *(run.name for run in runs)], body)
    return [f"<details{' open' if len(runs) > 1 else ''}><summary>{title}</summary>", table, "</details>"]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
