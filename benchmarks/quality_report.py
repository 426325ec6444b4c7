"""Figures and docs/quality.md from Records of the quality and retrieval benchmarks, and from nothing else.

    python -m benchmarks.quality_report [--records FILE ...] [--out docs]

Gaps are paired by seed: mean over seeds, plus or minus the standard error of the paired differences. With one seed the
error is that over validation windows, marked `w`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.quality_compare import Cells, domain_means, void_domains
from benchmarks.quality_costs import gain_at_64k
from benchmarks.quality_grids import STEPS
from benchmarks.quality_methods import METHODS, dense_twin
from lemo.measure.record import Record, read_records
from lemo.measure.statistics import paired_standard_error
from lemo.report.tables import markdown

RESULTS = Path(__file__).parent / "results"
NOTHING = "–"
_SWEPT = {"dense_all", "instruct_dense"}
_FAMILIES = {"balanced": "#2563eb", "quality": "#2563eb", "fast": "#2563eb"}


class Group:
    """Cells that may be compared: one protocol, one number of steps asked for, one learning rate.

    Attributes:
        methods: those that have run.
        dense: dense LoRA, which learns from every row, or from every answer.
    """

    def __init__(self, cells: Cells, protocol: Mapping[str, Any], steps: int, rate: float) -> None:
        """Finds which methods have run."""
        self.cells, self.protocol, self.steps, self.rate = cells, dict(protocol), steps, rate
        self.dense = "dense_all" if protocol["data"] == "text" else "instruct_dense"
        names = {r.name.split("/")[1] for r in cells.records if r.name.endswith("/dense")}
        self.methods = [m for m in METHODS if m in names and self.of(m, "dense")]

    def of(self, method: str, metric: str) -> dict[int, Record]:
        """Newest Record of each seed."""
        wanted = {"asked_steps": self.steps, "learning_rate": self.rate, "flops_steps": None}
        return {r.seeds[0]: r for r in self.cells.of(method, metric, self.protocol, **wanted)}

    def mean(self, method: str, metric: str) -> float | None:
        """Mean over seeds."""
        found = self.of(method, metric)
        return fmean(r.value for r in found.values()) if found else None

    def gap(
        self, method: str, baseline: str, metric: str = "dense", of: str | None = None
    ) -> tuple[float, float, str] | None:
        """(mean, standard error, what the error is over) of method minus baseline; None without a common seed."""
        theirs, ours = self.of(baseline, of or metric), self.of(method, metric)
        seeds = sorted(theirs.keys() & ours.keys())
        if not seeds or (method == baseline and of is None):
            return None
        if len(seeds) == 1:
            pair = theirs[seeds[0]].samples, ours[seeds[0]].samples
            kind = "w"
        else:
            pair, kind = ([theirs[s].value for s in seeds], [ours[s].value for s in seeds]), ""
        if len(pair[0]) != len(pair[1]) or len(pair[0]) < 2:
            return None
        return fmean(pair[1]) - fmean(pair[0]), paired_standard_error(*pair), kind

    def domain_gaps(self, method: str, baseline: str) -> dict[str, float]:
        """Mean gap of each domain."""
        theirs, ours = self.of(baseline, "dense"), self.of(method, "dense")
        seeds = theirs.keys() & ours.keys()
        if not seeds or method == baseline:
            return {}
        pairs = [(domain_means(theirs[s]), domain_means(ours[s])) for s in seeds]
        return {d: fmean(o[d] - t[d] for t, o in pairs) for d in pairs[0][0]}


def groups_of(records: Sequence[Record]) -> list[Group]:
    """Groups in the order: published steps first, then by steps; longest protocol last."""
    cells = Cells([r for r in records if r.name.startswith("quality/")])
    found = []
    for protocol in cells.protocols():
        keys = {
            (r.setting["asked_steps"], r.setting["learning_rate"])
            for r in cells.records
            if all(r.setting[k] == v for k, v in protocol.items()) and r.setting["learning_rate"] > 0
        }
        found += [Group(cells, protocol, steps, rate) for steps, rate in keys]
    return sorted(found, key=lambda g: (g.protocol["data"] != "text", g.protocol["window"], -g.steps, g.rate))


def number(value: float | None, form: str = ".4f") -> str:
    """A number, or a dash."""
    return NOTHING if value is None else format(value, form)


def with_error(found: tuple[float, float, str] | None) -> str:
    """`+0.0123 ± 0.0012`, or a dash."""
    return NOTHING if found is None else f"{found[0]:+.4f} ± {found[1]:.4f}{found[2]}"


def twin_of(method: str) -> str | None:
    """Another method, dense, on the same loss rows."""
    twin = dense_twin(method)
    return None if twin == method else twin


def main_table(group: Group) -> str:
    """One line a method."""
    head = ["method", "seeds", "rows run", "ideal gain", "loss", "over dense, same loss rows", f"over {group.dense}"]
    head += ["last quarter, same loss rows", "sparse over dense forward", "worst domain, same loss rows"]
    rows = []
    for method in group.methods:
        gains = gain_at_64k(METHODS[method])
        twin = twin_of(method)
        gaps = {} if twin is None else group.domain_gaps(method, twin)
        worst = max(gaps, key=lambda d: gaps[d]) if gaps else None
        rows.append(
            [
                method.replace("_", " "),
                str(len(group.of(method, "dense"))),
                number(group.mean(method, "forward_share"), ".2f"),
                number(gains.get("llama-3-8b"), ".2f"),
                number(group.mean(method, "dense")),
                with_error(None if twin is None else group.gap(method, twin)),
                with_error(group.gap(method, group.dense)),
                with_error(None if twin is None else group.gap(method, twin, "last_quarter")),
                with_error(group.gap(method, method, "sparse", of="loss_rows")),
                NOTHING if worst is None else f"{gaps[worst]:+.4f} ({worst})",
            ]
        )
    return markdown(head, rows)


def domain_table(group: Group) -> str:
    """Loss of each domain."""
    found = {m: [domain_means(r) for r in group.of(m, "dense").values()] for m in group.methods}
    domains = list(next(iter(found.values()))[0])
    rows = [[m.replace("_", " "), *(number(fmean(x[d] for x in means)) for d in domains)] for m, means in found.items()]
    return markdown(["method", *domains], rows)


def void_note(group: Group) -> str:
    """Says which domains bars leave out."""
    void = void_domains(group.cells, group.protocol, list(group.of(group.dense, "dense").values()))
    if not void:
        return ""
    listed = ", ".join(f"{d} ({gain:.2f})" for d, gain in void.items())
    return f"\nVoid for bars, because dense LoRA improves them by less than 0.2 nats: {listed}.\n"


def retrieval_table(records: Sequence[Record]) -> str:
    """Accuracy by task and mode, newest Records, mean over seeds."""
    scored = [r for r in records if r.name.startswith("retrieval/") and r.name.count("/") == 3 and "cell" in r.setting]
    if not scored:
        return ""
    parts = []
    for key in sorted({(r.setting["window"], r.setting["steps"]) for r in scored}):
        same = [r for r in scored if (r.setting["window"], r.setting["steps"]) == key]
        tasks = list(dict.fromkeys(r.name.split("/")[2] for r in same))
        lines = list(dict.fromkeys((r.name.split("/")[1], r.name.split("/")[3]) for r in same))
        rows = []
        for method, mode in lines:
            cells = []
            for task in tasks:
                newest = {
                    r.seeds: r
                    for r in sorted(same, key=lambda r: r.time)
                    if r.name == f"retrieval/{method}/{task}/{mode}"
                }
                cells.append(number(fmean(r.value for r in newest.values()) if newest else None, ".3f"))
            rows.append([method.replace("_", " "), mode.replace("_", " "), *cells])
        heads = ["method", "forward", *(t.replace("_", " ") for t in tasks)]
        parts.append(f"### {key[0]:,} tokens, {key[1]} steps\n\n{markdown(heads, rows)}\n")
    return "\n".join(parts)


def sweep_table(groups: Sequence[Group]) -> str:
    """Loss of dense LoRA, seed 0, by learning rate."""
    rows = []
    for group in groups:
        for method in sorted(_SWEPT & set(group.methods)):
            record = group.of(method, "dense").get(0)
            if record is not None:
                window = f"{group.protocol['window']:,}"
                rows.append([window, str(group.steps), method, f"{group.rate:g}", number(record.value)])
    return markdown(["window", "steps", "method", "learning rate", "loss"], rows) if rows else ""


def equal_table(records: Sequence[Record]) -> str:
    """The default against dense LoRA at equal FLOPs: mean over the seeds that both have, worst domain."""
    cells = Cells([r for r in records if r.name.startswith("quality/")])
    rows = []
    for protocol in cells.protocols():
        ours = [r for r in cells.of("balanced", "dense", protocol) if r.setting["flops_steps"] is not None]
        for points in sorted({r.setting["flops_steps"] for r in ours}):
            mine = {r.seeds[0]: r for r in ours if r.setting["flops_steps"] == points}
            wanted = {"asked_steps": points, "flops_steps": None}
            dense = {
                r.seeds[0]: r
                for r in cells.of("dense_all", "dense", protocol, **wanted)
                if any(r.setting["learning_rate"] == m.setting["learning_rate"] for m in mine.values())
            }
            seeds = sorted(mine.keys() & dense.keys())
            if not seeds:
                continue
            means = [(domain_means(dense[s]), domain_means(mine[s])) for s in seeds]
            gaps = {d: fmean(o[d] - t[d] for t, o in means) for d in means[0][0]}
            worst = max(gaps, key=lambda d: gaps[d])
            steps = mine[seeds[0]].setting["steps"]
            cells_of_row = [str(points), str(steps), str(len(seeds)), number(fmean(gaps.values()), "+.4f")]
            rows.append([*cells_of_row, f"{gaps[worst]:+.4f} ({worst})"])
    heads = ["dense steps", "the default's steps", "seeds", "default over dense", "worst domain"]
    return markdown(heads, rows) if rows else ""


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return pyplot


def draw_pareto(group: Group, path: Path) -> bool:
    """Gaps against ideal gain: over dense LoRA on all rows, and on the method's own; false with nothing to draw.

    Named are presets and what nothing else beats in both.
    """
    rows = "loss on all rows" if group.dense == "dense_all" else "loss on answers alone"
    panels = {f"nats over dense LoRA, {rows}": [], "nats over dense LoRA on the same loss rows": []}
    for method in group.methods:
        gains = gain_at_64k(METHODS[method])
        if method == "no_context" or not gains:
            continue
        for points, baseline in zip(panels.values(), (group.dense, twin_of(method)), strict=True):
            gap = None if baseline is None else group.gap(method, baseline)
            if gap is not None:
                points.append((method, gains["llama-3-8b"], *gap[:2]))
    drawn = {title: points for title, points in panels.items() if points}
    if not drawn:
        return False
    pyplot = _pyplot()
    figure, grid = pyplot.subplots(1, len(drawn), figsize=(5.4 * len(drawn), 4.2), layout="constrained", squeeze=False)
    named: list[tuple[Any, str, float, float]] = []
    lines: list[tuple[Any, float, float, float]] = []
    for axes, (title, points) in zip(grid[0], drawn.items(), strict=True):
        for method, gain, gap, error in points:
            beaten = any(g >= gain and y <= gap and m != method for m, g, y, _ in points)
            colour = _FAMILIES.get(method, "#d1d5db" if beaten else "#6b7280")
            front = colour != "#d1d5db"
            axes.errorbar(gain, gap, yerr=error, fmt="o", color=colour, markersize=4, capsize=2, zorder=2 + front)
            if front:
                named.append((axes, method, gain, gap))
                lines.append((axes, gain, gap - error, gap + error))
        axes.axhline(0, color="#6b7280", linewidth=0.8)
        axes.set(xlabel="ideal gain at 64K, Llama-3-8B shape", ylabel=title)
    figure.suptitle(f"{group.steps} steps, {group.protocol['window']:,} tokens", x=0.01, ha="left", fontsize=10)
    _name_points(figure, named, lines)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


# Where a point's name may stand: points right and up from it, and which end of the text is there.
_PLACES = ((6, -3, "left"), (-6, -3, "right"), (6, 6, "left"), (6, -12, "left"), (-6, 7, "right"), (-6, -12, "right"))
_PLACES += ((6, 15, "left"), (6, -21, "left"), (-6, 16, "right"), (-6, -21, "right"))


def _name_points(
    figure: Any, points: Sequence[tuple[Any, str, float, float]], lines: Sequence[tuple[Any, float, float, float]]
) -> None:
    """Names beside their points, presets first; one that would lie on another, on a point or outside is left out.

    `lines`: axes, place and both ends of error bars, which names keep clear of, too, as they do of the zero line.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    # Around each named point too.
    taken = [
        Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in (a.transData.transform(p) for a, _, *p in points)
    ]
    for axes, place, low, high in lines:
        (x, bottom), (_, top) = (axes.transData.transform((place, y)) for y in (low, high))
        zero = axes.transData.transform((place, 0))[1]
        taken += [Bbox.from_extents(x - 1, bottom, x + 1, top)]
        taken += [Bbox.from_extents(axes.bbox.x0, zero - 1, axes.bbox.x1, zero + 1)]
    for axes, method, gain, gap in sorted(points, key=lambda point: point[1] not in _FAMILIES):
        style = {"fontsize": 7, "fontweight": "bold" if method in _FAMILIES else "normal", "zorder": 4}
        for right, up, end in _PLACES:
            place = {"xytext": (right, up), "textcoords": "offset points", "ha": end, "annotation_clip": False}
            text = axes.annotate(method.replace("_", " "), (gain, gap), **place, **style)
            text.set_in_layout(False)
            box = text.get_window_extent()
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
            if inside and not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()


def draw_domains(group: Group, path: Path) -> bool:
    """Gaps of presets, nulls and rivals by domain."""
    twins = {m: twin for m in group.methods if (twin := twin_of(m)) is not None}
    gaps = {m: group.domain_gaps(m, twin) for m, twin in twins.items()}
    gaps = {m: found for m, found in gaps.items() if found and m != "before"}
    if not gaps:
        return False
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7.5, 0.28 * len(gaps) + 1.4), layout="constrained")
    domains = list(next(iter(gaps.values())))
    for place, found in enumerate(gaps.values()):
        axes.plot([min(found.values()), max(found.values())], [place, place], color="#d1d5db", zorder=1)
    for index, domain in enumerate(domains):
        values = [found[domain] for found in gaps.values()]
        axes.scatter(values, range(len(gaps)), label=domain, s=16, color=f"C{index}", zorder=2)
    axes.set_yticks(range(len(gaps)), [m.replace("_", " ") for m in gaps])
    axes.invert_yaxis()
    axes.axvline(0, color="#6b7280", linewidth=0.8)
    wide = max(max(map(abs, found.values())) for found in gaps.values()) > 0.05
    if wide:
        axes.set_xscale("symlog", linthresh=0.05)
    axes.set(xlabel="nats over dense LoRA on the same loss rows" + (" (linear up to 0.05)" if wide else ""))
    axes.legend(frameon=False, fontsize=8, ncols=len(domains), loc="lower left", bbox_to_anchor=(0, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def write_page(records: Sequence[Record], out: Path) -> Path:
    """Writes quality.md and its figures into a folder; returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    parts = [_INTRODUCTION]
    groups = groups_of(records)
    for group in groups:
        if set(group.methods) <= _SWEPT:
            continue
        kind = "answers" if group.protocol["data"] == "answers" else f"{group.protocol['window']:,} tokens"
        published = "" if group.steps >= STEPS else " (exploration: fewer steps than published figures have)"
        parts.append(f"## {kind}, {group.steps} steps, learning rate {group.rate:g}{published}\n")
        parts.append(main_table(group) + "\n")
        parts.append(void_note(group))
        parts.append(domain_table(group) + "\n")
        name = f"quality-{group.protocol['data']}-{group.protocol['window']}-{group.steps}-{group.rate:g}"
        for what, draw in (("gains", draw_pareto), ("domains", draw_domains)):
            if draw(group, out / f"{name}-{what}.png"):
                parts.append(f"![{what}]({name}-{what}.png)\n")
    if sweep := sweep_table([g for g in groups if set(g.methods) & _SWEPT]):
        parts += ["## Learning rate, on dense runs only\n", sweep + "\n"]
    if equal := equal_table(records):
        parts += ["## Equal FLOPs\n", "The default trained for the FLOPs of N steps of dense LoRA.\n", equal + "\n"]
    if asked := retrieval_table(records):
        parts += ["## Retrieval\n", "Share of answers with every token right.\n", asked]
    newest = max(records, key=lambda r: r.time, default=None)
    if newest is not None:
        parts.append(f"{newest.device}, torch {newest.versions.get('torch', '?')}, {newest.time[:10]}.\n")
    page = out / "quality.md"
    page.write_text("\n".join(p for p in parts if p), encoding="utf-8")
    return page


_INTRODUCTION = """# Quality

Made by `python -m benchmarks.quality_report` from the Records of `benchmarks/quality.py` and `benchmarks/retrieval.py`;
the protocol and every method are described in `benchmarks/quality_study.py` and `benchmarks/quality_methods.py`. Losses
are nats of the dense model on validation windows, mean over five domains; gaps are paired by seed, with the standard
error over seeds (over windows where marked `w`, with one seed). A positive gap is worse than the baseline. Ideal gains
are arithmetic for 64K tokens at the Llama-3-8B shape over dense training with recomputation, with keys and values kept
on the host rather than computed again; sparse losses look ahead.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = [RESULTS / "quality.jsonl", RESULTS / "retrieval.jsonl"]
    parser.add_argument("--records", type=Path, nargs="*", default=files)
    parser.add_argument("--out", type=Path, default=RESULTS.parents[1] / "docs")
    options = parser.parse_args(arguments)
    records = read_records([file for file in options.records if file.exists()])
    if not records:
        print("error: no Records to report", file=sys.stderr)
        return 2
    print(write_page(records, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
