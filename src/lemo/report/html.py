"""A report as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #111827; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid #e5e7eb; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """An HTML page of finished parts."""
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    start = f"<!doctype html>\n<html lang='en'><head>{head}</head>\n<body><h1>{html.escape(title)}</h1>\n"
    return f"{start}{body}\n</body></html>\n"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def image(path: str | Path, alternative: str) -> str:
    """A PNG, embedded."""
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return f'<img alt="{html.escape(alternative, quote=True)}" src="data:image/png;base64,{data}">'


def table(markdown: str) -> str:
    """A Markdown table as `lemo.report.tables` writes it, and the text behind it, as HTML."""
    lines = markdown.strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("|")]
    rest = " ".join(line for line in lines if not line.startswith("|")).strip("* ")
    if len(rows) < 2:
        return paragraph(rest)
    header, rule, *body = rows
    number = [cell.endswith(":") for cell in rule]
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    out = [f"<table><thead><tr>{head}</tr></thead><tbody>"]
    for row in body:
        cells = zip(row, number, strict=True)
        out.append(
            "<tr>"
            + "".join(f"<td{' class=number' if n else ''}>{html.escape(cell)}</td>" for cell, n in cells)
            + "</tr>"
        )
    out.append("</tbody></table>")
    return "\n".join(out) + (paragraph(rest) if rest else "")
