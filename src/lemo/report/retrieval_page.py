"""Accuracy of retrieval over depth and length as a picture and as an HTML page."""

from __future__ import annotations

import html as markup
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lemo.eval.retrieval import RetrievalReport
from lemo.report import charts, html, plots

_STYLE = (
    charts.STYLE
    + """
td.share { background: color-mix(in srgb, var(--c0) calc(var(--share) * 55%), transparent); text-align: center;
  font-variant-numeric: tabular-nums; }
"""
)


def retrieval_page(reports: Mapping[str, RetrievalReport], title: str) -> str:
    """A table per report and task: a row per length, a column per depth, bluer where more answers are right.

    Args:
        reports: by name; at least one.
        title: of the page.
    """
    first = next(iter(reports.values()))
    about = (
        "A fact is buried in meaningless text of a length, at a depth from 0% (start) to 100% (end), and asked for at "
        "the end. A cell is the share of prompts whose answer was right in every token. "
        f"Prompts follow from seed {first.seed}, so that models and modes are asked the same."
    )
    parts = [html.paragraph(about)]
    for name, report in reports.items():
        parts.append(f"<h2>{markup.escape(name)}</h2>")
        for task in dict.fromkeys(task for task, _ in report.rows):
            parts.append(f"<h3>{markup.escape(task)}</h3>{_table(report, task)}")
    return html.page(title, parts, style=_STYLE)


def _table(report: RetrievalReport, task: str) -> str:
    head = "".join(f"<th>{depth:.0%}</th>" for depth in report.depths)
    out = [f"<table><thead><tr><th>tokens</th>{head}<th>all</th><th>prompts</th></tr></thead><tbody>"]
    for (mine, length), cells in report.rows.items():
        if mine != task:
            continue
        shares = [cell.accuracy for cell in cells]
        right = [r for cell in cells for r in cell.right]
        coloured = "".join(f'<td class="share" style="--share: {s:.3f}">{s:.0%}</td>' for s in shares)
        out.append(
            f'<tr><td class="number">{length:,}</td>{coloured}<td class="number">{sum(right) / len(right):.0%}</td>'
            f'<td class="number">{len(right)}</td></tr>'
        )
    return "".join([*out, "</tbody></table>"])


def plot_retrieval(reports: Mapping[str, RetrievalReport], path: str | Path) -> Path:
    """A PNG with a map per report (row) and task (column): depth across, length downwards.

    Args:
        reports: by name; at least one.
        path: PNG to write.
    """
    tasks = list(dict.fromkeys(task for report in reports.values() for task, _ in report.rows))
    first = next(iter(reports.values()))
    count = len({length for _, length in first.rows})
    size = (max(3.6, 0.5 * len(first.depths) + 1.4) * len(tasks), (1.5 + 0.4 * count) * len(reports))
    figure, axes = plots.new_figure(len(reports), len(tasks), size)
    for row, (name, report) in zip(axes, reports.items(), strict=True):
        for each, task in zip(row, tasks, strict=True):
            _draw(each, report, task, f"{task.replace('_', ' ')}, {name}")
    return plots.save_figure(figure, path)


def _draw(axes: Any, report: RetrievalReport, task: str, title: str) -> None:
    rows = {length: [cell.accuracy for cell in cells] for (mine, length), cells in report.rows.items() if mine == task}
    values = list(rows.values())
    axes.imshow(values, aspect="auto", cmap="Blues", vmin=0, vmax=1.25)
    for y, shares in enumerate(values):
        for x, share in enumerate(shares):
            axes.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=8, color="white" if share > 0.6 else "k")
    axes.set_xticks(range(len(report.depths)), [f"{depth:.0%}" for depth in report.depths])
    axes.set_yticks(range(len(rows)), [f"{length:,}" for length in rows])
    axes.set(title=title, xlabel="depth of the fact", ylabel="tokens")
    axes.grid(False)
