"""A report as one HTML file that needs nothing beside it and follows the reader's light or dark."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; --ink: #111827; --soft: #4b5563; --line: #e5e7eb; --paper: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --soft: #a3acba; --line: #2f3947; --paper: #11161f; }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper); }
h2 { margin-top: 2rem; font-size: 1.2rem; }
table { border-collapse: collapse; margin: 1rem 0; max-width: 100%; display: block; overflow-x: auto; }
th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
img { max-width: 100%; }
summary { cursor: pointer; font-weight: 600; }
.grid2 { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 2rem; }
"""


def page(title: str, parts: Sequence[str], *, style: str = "") -> str:
    """An HTML page of finished parts, with further style rules."""
    body = "\n".join(parts)
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}{style}</style>"
    )
    start = f"<!doctype html>\n<html lang='en'><head>{head}</head>\n<body><h1>{html.escape(title)}</h1>\n"
    return f"{start}{body}\n</body></html>\n"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def image(path: str | Path, alternative: str) -> str:
    """A PNG, embedded."""
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return f'<img alt="{html.escape(alternative, quote=True)}" src="data:image/png;base64,{data}">'


def rows(header: Sequence[str], body: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """A table of plain texts. With `numbers`, cells that begin with a digit or sign are set to the right."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    out = [f"<table><thead><tr>{head}</tr></thead><tbody>"]
    for row in body:
        right = [numbers and i > 0 and re.match(r"[-+–\d]", cell) for i, cell in enumerate(row)]
        cells = zip(row, right, strict=True)
        out.append(
            "<tr>"
            + "".join(f"<td{' class=number' if n else ''}>{html.escape(cell)}</td>" for cell, n in cells)
            + "</tr>"
        )
    out.append("</tbody></table>")
    return "\n".join(out)


def table(markdown: str) -> str:
    """A Markdown table as `lemo.report.tables` writes it, and the text behind it, as HTML."""
    lines = markdown.strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("|")]
    rest = " ".join(line for line in lines if not line.startswith("|")).strip("* ")
    if len(cells) < 2:
        return paragraph(rest)
    header, _, *body = cells
    return rows(header, body, numbers=True) + (paragraph(rest) if rest else "")
