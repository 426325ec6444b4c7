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

from benchmarks.check_bars import goal_table
from benchmarks.quality_compare import Cells, domain_means, void_domains
from benchmarks.quality_corpus import is_published
from benchmarks.quality_costs import gain_at_64k
from benchmarks.quality_figures import draw_depths, draw_domains, draw_pareto, draw_thresholds
from benchmarks.quality_grids import STEPS
from benchmarks.quality_groups import Group, groups_of, twin_of
from benchmarks.quality_methods import METHODS
from benchmarks.quality_summary import (
    FEATURED,
    NOTHING,
    domain_table,
    far_table,
    featured_table,
    main_group,
    method_table,
    number,
    shown,
    with_error,
)
from lemo.measure.record import Record, read_records
from lemo.report.tables import markdown

RESULTS = Path(__file__).parent / "results"
_SWEPT = {"dense_all", "instruct_dense"}


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
                shown(method),
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


def void_note(group: Group) -> str:
    """Says which domains bars leave out."""
    void = void_domains(group.cells, group.protocol, list(group.of(group.dense, "dense").values()))
    if not void:
        return ""
    listed = ", ".join(f"{d} ({gain:.2f})" for d, gain in void.items())
    return f"\nVoid for bars, because dense LoRA improves them by less than 0.2 nats: {listed}.\n"


def retrieval_part(records: Sequence[Record], out: Path) -> str:
    """Accuracy by task and mode, newest Records, mean over seeds, and a figure by depth."""
    scored = [r for r in records if r.name.startswith("retrieval/") and r.name.count("/") == 3 and "cell" in r.setting]
    parts = []
    for key in sorted({(r.setting["window"], r.setting["steps"]) for r in scored}):
        same = [r for r in scored if (r.setting["window"], r.setting["steps"]) == key]
        tasks = list(dict.fromkeys(r.name.split("/")[2] for r in same))
        lines = list(dict.fromkeys((r.name.split("/")[1], r.name.split("/")[3]) for r in same))
        newest = {(r.name, r.seeds): r for r in sorted(same, key=lambda r: r.time)}
        rows = []
        for method, mode in lines:
            cells = [[r for (n, _), r in newest.items() if n == f"retrieval/{method}/{t}/{mode}"] for t in tasks]
            shares = [number(fmean(r.value for r in found) if found else None, ".3f") for found in cells]
            seeds = {min(map(len, filter(None, cells))), max(map(len, cells))}
            rows.append([shown(method), mode.replace("_", " "), " to ".join(map(str, sorted(seeds))), *shares])
        heads = ["method", "forward", "seeds", *(t.replace("_", " ") for t in tasks)]
        parts.append(f"### {key[0]:,} tokens, {key[1]} steps\n\n{markdown(heads, rows)}\n")
        picture = f"retrieval-{key[0]}-{key[1]}.png"
        if draw_depths([r for (n, _), r in newest.items() if n.endswith("/dense")], out / picture):
            parts.append(f"![accuracy by depth]({picture})\n")
    return "\n".join(parts)


def sweep_table(groups: Sequence[Group]) -> str:
    """Loss of dense LoRA, seed 0, by learning rate."""
    rows = []
    for group in groups:
        for method in sorted(_SWEPT & set(group.methods)):
            record = group.of(method, "dense").get(0)
            if record is not None:
                window = f"{group.protocol['window']:,}"
                rows.append([window, str(group.steps), shown(method), f"{group.rate:g}", number(record.value)])
    return markdown(["window", "steps", "method", "learning rate", "loss"], rows) if rows else ""


def equal_table(records: Sequence[Record]) -> str:
    """The default, and what it was before, against dense LoRA at equal FLOPs: mean over common seeds, worst domain."""
    cells = Cells([r for r in records if r.name.startswith("quality/")])
    rows = [
        row
        for protocol in cells.protocols()
        for method in ("balanced", "far_drawn")
        for row in _equal_rows(cells, protocol, method)
    ]
    heads = ["method", "dense steps", "its steps", "seeds", "over dense", "worst domain"]
    return markdown(heads, rows) if rows else ""


def _equal_rows(cells: Cells, protocol: Mapping[str, Any], method: str) -> list[list[str]]:
    """A line for each number of dense steps whose FLOPs a method was trained for."""
    rows = []
    ours = [r for r in cells.of(method, "dense", protocol) if r.setting["flops_steps"] is not None]
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
        data = "" if is_published(protocol) else f" (data {protocol['corpus']})"
        found = [shown(method), f"{points}{data}", str(mine[seeds[0]].setting["steps"]), str(len(seeds))]
        rows.append([*found, number(fmean(gaps.values()), "+.4f"), f"{gaps[worst]:+.4f} ({worst})"])
    return rows


def summary_part(group: Group, pictures: Sequence[str]) -> list[str]:
    """Presets, nulls and rivals of a kind of data."""
    data = group.protocol["data"]
    title = "Plain text" if data == "text" else "Questions about documents, answers supervised"
    protocol = f"{group.protocol['window']:,} tokens, {group.steps} steps, learning rate {group.rate:g}"
    parts = [f"## {title}: presets and what they are measured against\n", f"{protocol}.\n"]
    parts.append(featured_table(group) + "\n")
    if data == "text":
        parts.append(domain_table(group, FEATURED[data]) + "\n")
    return [*parts, *pictures]


def draw_group(group: Group, out: Path) -> list[str]:
    """Draws a group's figures; the lines that show those for which there was enough."""
    stem = f"quality-{group.protocol['data']}-{group.protocol['window']}-{group.steps}-{group.rate:g}"
    stem += "" if is_published(group.protocol) else f"-{group.protocol['corpus']}"
    figures = (
        ("Gap to dense LoRA against ideal gain", f"{stem}-gains.png", draw_pareto),
        ("Gaps by domain", f"{stem}-domains.png", draw_domains),
        ("One threshold for all layers: loss by the rows that it leaves", f"{stem}-thresholds.png", draw_thresholds),
    )
    return [f"![{words}]({name})\n" for words, name, draw in figures if draw(group, out / name)]


def group_part(group: Group, pictures: Sequence[str]) -> list[str]:
    """Every method of a group."""
    kind = "answers" if group.protocol["data"] == "answers" else f"{group.protocol['window']:,} tokens"
    published = "" if group.steps >= STEPS else " (exploration: fewer steps than published figures have)"
    data = "" if is_published(group.protocol) else f", other data ({group.protocol['corpus']})"
    parts = [f"### {kind}, {group.steps} steps, learning rate {group.rate:g}{data}{published}\n"]
    parts += [main_table(group) + "\n", void_note(group)]
    if group.protocol["data"] == "text":
        parts.append(domain_table(group) + "\n")
    if far := far_table(group):
        parts += ["A copy of what stands near the start of a window, at its end:\n", far + "\n"]
    return [*parts, *pictures]


def write_page(records: Sequence[Record], out: Path) -> Path:
    """Writes quality.md and its figures into a folder; returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    parts = [_INTRODUCTION, "## Goals\n", goal_table(records, "B.") + "\n"]
    groups = groups_of(records)
    pictures = {id(group): draw_group(group, out) for group in groups if not set(group.methods) <= _SWEPT}
    for group in filter(None, (main_group(groups, data) for data in FEATURED)):
        parts += summary_part(group, pictures.pop(id(group), []))
    if equal := equal_table(records):
        parts += ["## Equal FLOPs\n", "The default trained for the FLOPs of N steps of dense LoRA.\n", equal + "\n"]
    if asked := retrieval_part(records, out):
        parts += ["## Retrieval\n", "Share of answers with every token right.\n", asked]
    tried = [g for g in groups if not set(g.methods) <= _SWEPT]
    if tried:
        parts += ["## Everything that was tried\n", "Methods in words stand at the end of the page.\n"]
    for group in tried:
        parts += group_part(group, pictures.get(id(group), []))
    if sweep := sweep_table([g for g in groups if set(g.methods) & _SWEPT]):
        parts += ["## Learning rate, on dense runs only\n", sweep + "\n"]
    if tried:
        parts += ["## Methods\n", method_table(tried) + "\n"]
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
