"""Figures of the quality benchmark: gaps against ideal gains, and by domain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.quality_costs import gain_at_64k
from benchmarks.quality_groups import Group, twin_of
from benchmarks.quality_methods import INSTRUCT_DEFAULT, METHODS, THRESHOLDS
from lemo.measure.record import Record

# Presets, and what a recipe for documents with questions does.
_FAMILIES = dict.fromkeys(("balanced", "quality", "fast", INSTRUCT_DEFAULT), "#2563eb")
# Beyond so many nats an axis is logarithmic where it has to be: one failed method would press all others together.
_LINEAR, _WIDE = 0.05, 0.15


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return pyplot


def draw_pareto(group: Group, path: Path) -> bool:
    """Gaps against ideal gain: over dense LoRA on all rows, and on the method's own; false with fewer than two points.

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
    if max(map(len, panels.values())) < 2:
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
        wide = max(abs(gap) for _, _, gap, _ in points) > _WIDE
        if wide:
            _bend(axes)
        label = title + f"\n(linear up to {_LINEAR:g})" * wide
        axes.set(xlabel="ideal gain at 64K, Llama-3-8B shape", ylabel=label)
    figure.suptitle(f"{group.steps} steps, {group.protocol['window']:,} tokens", x=0.01, ha="left", fontsize=10)
    _name_points(figure, named, lines)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def _bend(axes: Any) -> None:
    """An axis of gaps that is linear in the middle and logarithmic outside."""
    axes.set_yscale("symlog", linthresh=_LINEAR, linscale=2)
    ticks = [-_LINEAR, -0.02, 0, 0.02, _LINEAR, 0.1, 0.2, 0.5, 1]
    low, high = axes.get_ylim()
    high *= 1.3
    axes.set_ylim(low, high)
    axes.set_yticks([t for t in ticks if low <= t <= high], [f"{t:g}" for t in ticks if low <= t <= high], minor=False)
    axes.minorticks_off()


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


# Lines that are named where accuracy is drawn by depth; others are grey.
_ASKED = {
    "words": ("window 1,024", "#93c5fd"),
    "balanced": ("rows before the answers", "#f59e0b"),
    "dense": ("dense LoRA", "#111827"),
    "words_window_2048": ("the default", "#2563eb"),
}


def draw_depths(records: Sequence[Record], path: Path) -> bool:
    """Accuracy by the depth of a fact in its prompt, of the task that dense LoRA finds hardest; false without it.

    Only tasks that others were asked, too, are looked at.

    Args:
        records: of one length and number of steps, dense forward, newest of each seed.
        path: of the picture.
    """
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        _, method, task, _ = record.name.split("/")
        found.setdefault((task, method), []).append(record)
    compared = {task for task, method in found if method != "dense"}
    dense = {task: fmean(r.value for r in found[task, "dense"]) for task in compared if (task, "dense") in found}
    if not dense:
        return False
    hardest = min(dense, key=lambda task: dense[task])
    lines = {method: same for (task, method), same in found.items() if task == hardest}
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for method, same in sorted(lines.items(), key=lambda item: item[0] in _ASKED):
        label, colour = _ASKED.get(method, (None, "#d1d5db"))
        bins = same[0].setting["depths"]
        by_bin = [fmean(x for r in same for x in _of_bin(r, i, bins)) for i in range(bins)]
        # Dense LoRA lies over the others, open: where all answers are right the lines are one.
        over = {"ls": "--", "ms": 7, "mfc": "none", "zorder": 3} if method == "dense" else {"ms": 3}
        axes.plot([(i + 0.5) / bins for i in range(bins)], by_bin, marker="o", color=colour, label=label, **over)
    axes.set(xlabel="depth of the fact in the prompt: 0 is the start", ylim=(0, 1.04))
    axes.set_ylabel(f"share of answers right: {hardest.replace('_', ' ')}")
    axes.legend(frameon=False, fontsize=8, ncols=len(_ASKED), loc="lower right", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def _of_bin(record: Record, number: int, bins: int) -> Sequence[float]:
    """Answers of one depth: they stand bin after bin."""
    size = len(record.samples) // bins
    return record.samples[number * size : (number + 1) * size]  # type: ignore[index]


def draw_thresholds(group: Group, path: Path) -> bool:
    """What one threshold for all layers costs, by the share of rows that it leaves: the sweep to the break point.

    False with fewer than three thresholds.
    """
    points = []
    for method in (m for m in group.methods if m in THRESHOLDS):
        share, gap = group.mean(method, "forward_share"), group.gap(method, group.dense)
        behind = group.gap(method, method, "sparse", of="loss_rows")
        if share is not None and gap is not None and behind is not None:
            points.append((share, gap[0], behind[0], f"{METHODS[method].plan.threshold:+g}"))  # type: ignore[union-attr]
    if len(points) < 3:
        return False
    points.sort()
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    shares = [100 * share for share, *_ in points]
    losses = [gap for _, gap, *_ in points]
    axes.plot(shares, losses, marker="o", ms=4, color="#2563eb", label="dense forward, over dense LoRA on all rows")
    behind_all = [behind for _, _, behind, _ in points]
    axes.plot(shares, behind_all, marker="s", ms=4, color="#f59e0b", label="forward under the plan, over dense")
    for share, loss, (*_, name) in zip(shares, losses, points, strict=True):
        axes.annotate(name, (share, loss), xytext=(0, -12), textcoords="offset points", ha="center", fontsize=7)
    axes.axhline(0, color="#6b7280", linewidth=0.8)
    if max(abs(y) for y in (*losses, *behind_all)) > _WIDE:
        _bend(axes)
    axes.set(xlabel="rows that run a layer, % (mean of all layers); by threshold", ylabel="nats")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


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
    least = min(min(found.values()) for found in gaps.values())
    most = max(max(found.values()) for found in gaps.values())
    wide = max(-least, most) > _LINEAR
    if wide:
        axes.set_xscale("symlog", linthresh=_LINEAR)
        axes.set_xlim(1.3 * min(least, -_LINEAR / 5), 1.3 * most)
        marks = (-0.01, 0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
        axes.set_xticks(marks := [x for x in marks if least - 0.01 <= x <= 1.3 * most], [f"{x:g}" for x in marks])
        axes.minorticks_off()
    axes.set(xlabel="nats over dense LoRA on the same loss rows" + f" (linear up to {_LINEAR:g})" * wide)
    axes.legend(frameon=False, fontsize=8, ncols=len(domains), loc="lower left", bbox_to_anchor=(0, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True
