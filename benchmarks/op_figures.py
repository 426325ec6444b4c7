"""The table and the roofline of ops, for benchmarks/performance.py. From Records only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lemo.ops
from lemo.measure.record import Record
from lemo.report.tables import NOT_MEASURED, markdown
from lemo.testing import OpSpec, specs_in

FIGURE = "performance-ops-roofline.png"
_MEASURES = {
    "share_of_copy_rate": "share of the copy rate",
    "gain_over_naive": "over naive",
    "gain_over_compiled": "over torch.compile",
    "gain_over_reference": "over reference",
}
_EXPLAINED = """\
NVIDIA H200, bf16. GB/s are the bytes that an op must read and write over its time; the copy, of 1 GiB, ran in the same
turns. `over` is how many times as long the other takes: the naive way is indexing, computing and scattering with whole
tensors. In the figure the slanted line is that copy, and the level one the forward pass of the vendor's causal
attention of all rows. Operations are nominal: six an element for an activation, four for a norm."""
_ATTENTION = "attention/kept_on_all/"


@dataclass(frozen=True)
class Point:
    """An op on the roofline.

    Attributes:
        label: what is shown beside it.
        intensity: operations for each byte that must move.
        rate: TFLOP/s.
        moves: whether a copy is its ceiling.
    """

    label: str
    intensity: float
    rate: float
    moves: bool


def newest(records: Sequence[Record], prefix: str) -> dict[str, Record]:
    """Newest Record of each name."""
    return {r.name: r for r in sorted(records, key=lambda r: r.time) if r.name.startswith(prefix)}


def op_section(records: Sequence[Record], figures: Sequence[str]) -> list[str]:
    """Paragraphs of the page."""
    found = newest(records, "ops/")
    parts = ["## Ops"]
    if not found:
        return [*parts, NOT_MEASURED]
    cells: dict[tuple[str, str], dict[str, Record]] = {}
    rest: list[list[str]] = []
    for name, record in sorted(found.items()):
        measure = next((m for m in _MEASURES if f"/{m}" in name), None)
        if measure is None:
            rest.append([f"`{name.removeprefix('ops/')}`", f"{record.value:.4g}", record.unit])
            continue
        op, _, shape = name.removeprefix("ops/").partition(f"/{measure}")
        cells.setdefault((op, shape.removeprefix("/")), {})[measure] = record
    rows = [
        [f"`{op}`", shape, _rate(each.get("share_of_copy_rate")), *(_ratio(each.get(m)) for m in _MEASURES)]
        for (op, shape), each in cells.items()
    ]
    parts += [_EXPLAINED, markdown(["op", "size", "GB/s", *_MEASURES.values()], rows)]
    parts += [f"![{name}]({name})" for name in figures if name == FIGURE]
    return [*parts, markdown(["measure", "value", "unit"], rest)] if rest else parts


def _rate(record: Record | None) -> str:
    if record is None or not isinstance(record.samples, dict) or "bytes_moved" not in record.setting:
        return "–"
    return f"{record.setting['bytes_moved'] / median(record.samples['lemo']) / 1e6:,.0f}"


def _ratio(record: Record | None) -> str:
    return "–" if record is None else f"{record.value:.2f}"


def read_points(records: Sequence[Record]) -> tuple[list[Point], float, float]:
    """Ops, the copy's rate in TB/s, and the vendor's attention in TFLOP/s; rates are 0 where nothing was measured."""
    points, copies, vendor = [], [], 0.0
    specs = {spec.name: spec for spec in specs_in(lemo.ops)}
    for record in newest(records, "ops/").values():
        spec = specs.get(record.setting.get("op", ""))
        flops = None if spec is None else _flops(spec, record.setting["shape"])
        if "/share_of_copy_rate" not in record.name or not flops or not isinstance(record.samples, dict):
            continue
        moved, ms = record.setting["bytes_moved"], median(record.samples["lemo"])
        copies.append(moved / median(record.samples["baseline"]) / 1e9)
        label = f"{record.setting['op']}, {record.setting['shape']}"
        points.append(Point(label, flops / moved, flops / ms / 1e9, moves=True))
    for name, record in newest(records, _ATTENTION).items():
        setting, samples = record.setting, record.samples
        if setting["keys"] != 65536 or setting["key_heads"] == setting["heads"] or not isinstance(samples, dict):
            continue
        vendor = max(vendor, median(samples["baseline"]))
        flops, moved = _attention(setting)
        label = f"attention, {setting['keep']:.0%} of rows, {name.split('/')[2]}"
        points.append(Point(label, flops / moved, median(samples["lemo"]), moves=False))
    return points, max(copies, default=0.0), vendor


def _flops(spec: OpSpec, shape: str) -> int | None:
    """Operations of a benchmark shape, from tensors without memory; None where that shape is no longer timed."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = next((case for case in spec.benchmark_shapes if case.name == shape), None)
    if case is None:
        return None
    with FakeTensorMode():
        inputs = case.inputs(0, torch.bfloat16)
        return spec.flops(spec.prepare(inputs) if spec.prepare else inputs)


def _attention(setting: dict[str, Any]) -> tuple[float, float]:
    """Operations and bytes of kept queries against all keys, causal, evenly spread."""
    rows, heads, groups, size = setting["keys"], setting["heads"], setting["key_heads"], setting["head_dim"]
    kept, back = setting["keep"] * rows, setting["pass"] == "backward"
    pairs = kept * rows / 2
    # Forward reads queries, keys and values and writes outputs; backward reads them and a gradient, and writes three.
    moved = size * 2 * (kept * heads * (4 if back else 2) + rows * groups * (4 if back else 2))
    return (10 if back else 4) * size * heads * pairs, moved


def draw_roofline(records: Sequence[Record], folder: Path) -> list[str]:
    """Rate against intensity under the card's ceilings; returns the file's name, or nothing without Records."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points, copy_tb, vendor = read_points(records)
    if not points or not copy_tb or not vendor:
        return []
    figure, axes = pyplot.subplots(figsize=(11, 5.2))
    low, high = 0.5 * min(p.intensity for p in points), 2 * max(p.intensity for p in points)
    knee = vendor / copy_tb
    axes.plot([low, knee, high], [low * copy_tb, vendor, vendor], color="#6b7280", linewidth=1.2)
    ordered = sorted(points, key=lambda p: (p.intensity, p.label))
    for number, point in enumerate(ordered, start=1):
        ceiling = min(vendor, copy_tb * point.intensity)
        colour = "#2563eb" if point.moves else "#d97706"
        text = f"{number}  {point.label}: {point.rate / ceiling:.2f} of its ceiling"
        axes.plot(point.intensity, point.rate, "o", ms=5, color=colour, label=text)
        beside = (5, -9) if number % 2 else (-4, 7)
        axes.annotate(str(number), (point.intensity, point.rate), beside, textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s", xlim=(low, high))
    words: dict[str, Any] = {"fontsize": 8, "color": "#374151", "textcoords": "offset points"}
    at = knee / 4, copy_tb * knee / 4
    axes.annotate(f"copy, {copy_tb:.2f} TB/s", at, (-8, 0), ha="right", **words)
    axes.annotate(f"vendor's attention, {vendor:.0f} TFLOP/s", (knee, vendor), (0, 5), **words)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    figure.savefig(folder / FIGURE, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return [FIGURE]
