"""Writes docs/performance.md and its figures from the Records of the benchmarks.

    python -m benchmarks.performance [benchmarks/results/*.jsonl] [--docs docs]

Nothing on that page is typed by hand: run it again after measuring.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.check_bars import BARS, Bar
from benchmarks.op_figures import draw_roofline, op_section
from benchmarks.peers.peer import parse_method
from benchmarks.saved_figures import draw_saved, saved_section
from lemo.measure.record import Record, read_records
from lemo.measure.statistics import value_of
from lemo.report.method_names import name_method
from lemo.report.tables import NOT_MEASURED, markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
INTRODUCTION = """\
Made by `python -m benchmarks.performance` from the Records in `benchmarks/results/`, where every figure has its raw
samples. One process for each turn of a method, turns in the order A-B-A-B, medians of timed steps; a step is forward,
backward, AdamW and clearing gradients; memory is the most that torch's allocator held. Batch 1, random weights and
tokens of the real shape, LoRA rank 8, bf16. Ratios are baseline over lemo, against the strongest baseline that ran in
the same command. Selection by a predictor and the bypass are in lemo's steps."""
PHASES = ("forward", "backward", "optimizer")
_COLOURS = ("#6b7280", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#be185d")
_LEMO = ("#2563eb", "#60a5fa", "#1e3a8a", "#38bdf8", "#818cf8", "#312e81")


@dataclass(frozen=True)
class Scene:
    """What one table is about."""

    shape: str
    lora: str
    layers: int | None


@dataclass
class Methods:
    """Newest Records of a scene: method -> tokens -> what -> Record."""

    found: dict[str, dict[int, dict[str, Record]]] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        """Keeps the newest of each name."""
        what = record.name.rpartition("/")[2]
        setting = record.setting
        cell = self.found.setdefault(setting["method"], {}).setdefault(setting["tokens"], {})
        if what not in cell or cell[what].time <= record.time:
            cell[what] = record

    def lengths(self) -> list[int]:
        """All lengths that some method ran."""
        return sorted({tokens for cells in self.found.values() for tokens in cells})

    def series(self, method: str, what: str) -> dict[int, float]:
        """Value by length."""
        return {n: cell[what].value for n, cell in sorted(self.found[method].items()) if what in cell}


def read_scenes(records: Sequence[Record]) -> dict[Scene, Methods]:
    """The training Records by scene, in the order in which they were measured."""
    scenes: dict[Scene, Methods] = {}
    for record in sorted(records, key=lambda r: r.time):
        if record.name.startswith("training/") and "method" in record.setting and record.name.count("/") >= 5:
            setting = record.setting
            scene = Scene(setting["shape"], setting["lora"], setting["layers"])
            scenes.setdefault(scene, Methods()).add(record)
    return scenes


def method_table(methods: Methods) -> str:
    """Milliseconds and GiB of every method at every length."""
    lengths = methods.lengths()
    rows = []
    for method, cells in methods.found.items():
        row = [name_method(method)]
        for tokens in lengths:
            cell = cells.get(tokens, {})
            if "step_time" in cell:
                row.append(f"{cell['step_time'].value * 1e3:,.0f} ms, {cell['peak_memory'].value:.1f} GiB")
            else:
                row.append("out of memory" if "out_of_memory" in cell else "–")
        if any(text != "–" for text in row[1:]):
            rows.append(row)
    return markdown(["method", *(f"{tokens:,} tokens" for tokens in lengths)], rows)


def gain_table(methods: Methods) -> str:
    """Every ratio with the baseline that it is over."""
    rows = []
    for method, cells in methods.found.items():
        for tokens, cell in sorted(cells.items()):
            for what in ("speedup", "memory_ratio"):
                if (record := cell.get(what)) is not None:
                    shares = f"{record.setting['supervised_share']:g} / {record.setting['baseline_supervised_share']:g}"
                    rows.append(
                        [
                            name_method(method),
                            f"{tokens:,}",
                            what.replace("_", " "),
                            f"{record.value:.2f}",
                            name_method(record.setting["baseline"]),
                            shares,
                        ]
                    )
    if not rows:
        return NOT_MEASURED
    return markdown(["method", "tokens", "what", "times", "over", "supervised share, lemo / baseline"], rows)


def refusals(scenes: dict[Scene, Methods]) -> list[str]:
    """What could not run, and why; one line a reason."""
    found = {}
    for methods in scenes.values():
        for method, cells in methods.found.items():
            for cell in cells.values():
                if (record := cell.get("unsupported")) is not None and "step_time" not in cell:
                    found[f"- {name_method(method)}: {record.setting['reason']}"] = None
    return list(found)


def bar_table(records: Sequence[Record], prefix: str = "C.") -> str:
    """Every bar of the engine with its goal and the newest value of each shape."""
    newest = {r.bar: r for r in sorted(records, key=lambda r: r.time) if r.bar and r.bar.startswith(prefix)}
    rows = []
    for bar in BARS:
        if not bar.id.startswith(prefix):
            continue
        mine = {name: record for name, record in newest.items() if name.partition("/")[0] == bar.id}
        rows += [_bar_row(bar, name, record) for name, record in sorted(mine.items())]
        if not mine:
            rows.append([f"`{bar.id}`", bar.what, _goals(bar), "–", bar.unit, "not measured"])
    return markdown(["bar", "what", "goal", "value", "unit", "status"], rows)


def _goals(bar: Bar) -> str:
    goals = sorted(bar.goals.values()) if bar.goals else [bar.goal]
    return f"{bar.comparison} " + " / ".join(f"{goal:g}" for goal in goals if goal is not None)


def _bar_row(bar: Bar, name: str, record: Record) -> list[str]:
    value = value_of(record.samples, record.setting["statistic"])
    goal = bar.goals[name.split("/")[1]] if bar.goals else bar.goal
    assert goal is not None
    met = value <= goal if bar.comparison == "<=" else value >= goal
    status = "met" if met else "**missed**"
    return [f"`{name}`", bar.what, f"{bar.comparison} {goal:g}", _shown(value, goal, met), record.unit, status]


def _shown(value: float, goal: float, met: bool) -> str:
    """Three digits, and more where these would hide a miss."""
    texts = [f"{value:.{digits}g}" for digits in (3, 4, 5, 6)]
    return next((text for text in texts if met or float(text) != goal), texts[-1])


def page(records: Sequence[Record], figures: Sequence[str]) -> str:
    """The whole page."""
    scenes = read_scenes(records)
    parts = [
        "# Performance",
        INTRODUCTION,
        "## Goals",
        bar_table(records),
    ]
    if not scenes:
        parts += ["## Training steps", NOT_MEASURED]
    for scene, methods in scenes.items():
        layers = "" if scene.layers is None else f", {scene.layers} layers only"
        linears = "q, k, v and o" if scene.lora == "qkvo" else "all linear maps"
        newest = max((r for c in methods.found.values() for x in c.values() for r in x.values()), key=lambda r: r.time)
        torch, transformers = (newest.versions.get(name, "?") for name in ("torch", "transformers"))
        parts += [f"## {scene.shape}{layers}, LoRA on {linears}", method_table(methods), gain_table(methods)]
        parts += [f"{newest.device}, torch {torch}, transformers {transformers}, {newest.time[:10]}."]
        parts += [f"![{name}]({name})" for name in figures if name.startswith(f"performance-{_stem(scene)}-")]
    parts += saved_section(records, figures)
    named = {name_method(m): m for methods in scenes.values() for m in methods.found}
    if named:
        rows = [[words, f"`{method}`"] for words, method in named.items()]
        parts += ["## Methods, as `benchmarks/training.py` takes them", markdown(["method", "name"], rows)]
    if lines := refusals(scenes):
        parts += ["## What could not run", "\n".join(lines)]
    return "\n\n".join([*parts, *op_section(records, figures)]) + "\n"


def _stem(scene: Scene) -> str:
    return f"{scene.shape}-{scene.lora}" + ("" if scene.layers is None else f"-{scene.layers}")


def draw(scenes: dict[Scene, Methods], folder: Path) -> list[str]:
    """Figures of each scene; returns their file names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    for scene, methods in scenes.items():
        for what, draw_one in (("length", _draw_lengths), ("phases", _draw_phases), ("held", _draw_held)):
            figure, axes = pyplot.subplots(1, 2 if what == "length" else 1, figsize=(11, 4.2), squeeze=False)
            if draw_one(list(axes[0]), methods):
                rows = 0 if what != "length" else -(-len(axes[0][0].get_legend_handles_labels()[1]) // 2)
                figure.tight_layout(rect=(0, 0.05 * rows, 1, 1))
                made.append(f"performance-{_stem(scene)}-{what}.png")
                figure.savefig(folder / made[-1], dpi=120, metadata={"Software": None})
            pyplot.close(figure)
    return made


# What follows the length, or is the stronger of two ways to run a tool: a line has the fastest.
_FREE = ("recompute", "offload", "adapter")
# Comparisons of lemo with itself.
_APART = ("engine=generic", "last=all")


def _lines(methods: Methods) -> dict[str, dict[int, str]]:
    """Lines of the figure: for each method, whatever it recomputed or took to the host, the fastest at each length.

    Those that ran at three lengths or more: two points are no line.
    """
    found: dict[str, dict[int, str]] = {}
    for method in methods.found:
        if any(text in method for text in _APART):
            continue
        line = found.setdefault(_without(method, _FREE), {})
        for tokens, seconds in methods.series(method, "step_time").items():
            if tokens not in line or seconds < methods.series(line[tokens], "step_time")[tokens]:
                line[tokens] = method
    chosen = [dict(sorted(line.items())) for line in found.values() if len(line) >= 3]
    return {_without(line[max(line)], _FREE[:2]): line for line in chosen}


def _without(method: str, names: tuple[str, ...]) -> str:
    """The method but for some of its options."""
    name, options = parse_method(method)
    kept = ",".join(f"{key}={value}" for key, value in options.items() if key not in names)
    return f"{name}:{kept}" if kept else name


def _draw_lengths(axes: list[Any], methods: Methods) -> bool:
    """Time and peak memory against length, of methods that ran at several lengths."""
    from matplotlib import ticker

    lines = _lines(methods)
    lengths = sorted({tokens for line in lines.values() for tokens in line})
    ours, others = iter(_LEMO), iter(_COLOURS)
    for name, line in lines.items():
        colour = next(ours if name.startswith("lemo") else others, "#9ca3af")
        for axis, what in zip(axes, ("step_time", "peak_memory"), strict=True):
            values = [methods.series(method, what)[tokens] for tokens, method in line.items()]
            axis.plot(list(line), values, marker="o", ms=3, color=colour, label=name_method(name))
    for axis, label in zip(axes, ("s a step", "peak GiB"), strict=True):
        axis.set(xlabel="tokens", ylabel=label, xscale="log", yscale="log" if axis is axes[0] else "linear")
        axis.set_xticks(lengths, [f"{tokens // 1024}K" for tokens in lengths], minor=False)
        axis.minorticks_off()
    axes[1].set_ylim(bottom=0)
    axes[0].yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes[0].yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes[0].grid(axis="y", color="#e5e7eb", linewidth=0.6)
    if lines:
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(handles, labels, loc="lower center", ncols=2, fontsize=8, frameon=False)
    return bool(lines)


def _draw_phases(axes: list[Any], methods: Methods) -> bool:
    """Seconds by phase at the greatest length with two methods or more."""
    for tokens in reversed(methods.lengths()):
        cells = {m: c[tokens] for m, c in methods.found.items() if "forward_time" in c.get(tokens, {})}
        if len(cells) < 2:
            continue
        left = [0.0] * len(cells)
        for phase, colour in zip(PHASES, ("#93c5fd", "#2563eb", "#1e3a8a"), strict=True):
            width = [cell[f"{phase}_time"].value for cell in cells.values()]
            axes[0].barh([name_method(m) for m in cells], width, left=left, color=colour, label=phase)
            left = [a + b for a, b in zip(left, width, strict=True)]
        axes[0].set(xlabel=f"s a step, {tokens:,} tokens")
        axes[0].tick_params(axis="y", labelsize=7)
        axes[0].invert_yaxis()
        axes[0].legend(frameon=False)
        return True
    return False


def _draw_held(axes: list[Any], methods: Methods) -> bool:
    """What lives only in the step: held between forward and backward, and what backward needs on top of it."""
    for tokens in reversed(methods.lengths()):
        cells = {m: c[tokens] for m, c in methods.found.items() if "held_bytes" in c.get(tokens, {})}
        if len(cells) < 2:
            continue
        held = [cell["held_bytes"].value / 2**30 for cell in cells.values()]
        rest = [cell["peak_memory"].value - x for cell, x in zip(cells.values(), held, strict=True)]
        axes[0].barh([name_method(m) for m in cells], held, color="#2563eb", label="held between forward and backward")
        axes[0].barh(
            [name_method(m) for m in cells],
            rest,
            left=held,
            color="#d1d5db",
            label="weights and what else is alive at the peak",
        )
        axes[0].set(xlabel=f"GiB, {tokens:,} tokens")
        axes[0].tick_params(axis="y", labelsize=7)
        axes[0].invert_yaxis()
        axes[0].legend(frameon=False)
        return True
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args(arguments)
    files = options.files or default_files()
    records = read_records(files)
    folder = options.docs
    figures = draw(read_scenes(records), folder) + draw_saved(records, folder) + draw_roofline(records, folder)
    (options.docs / "performance.md").write_text(page(records, figures), encoding="utf-8")
    print(f"{len(records)} Records, {len(figures)} figures: {options.docs / 'performance.md'}")
    return 0


def default_files() -> list[Path]:
    """The results that the page is made from."""
    return sorted(RESULTS.glob("*.jsonl"))


if __name__ == "__main__":
    sys.exit(main())
