"""HTML pages that show training samples with their loss, and which blocks of texts run in which layer."""

from __future__ import annotations

import html as markup
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from lemo.eval.keep_map import KeepMap
from lemo.report import charts, html

Pieces = Sequence[tuple[str, bool]]

_STYLE = (
    charts.STYLE
    + """
.text { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.block { background: color-mix(in srgb, var(--c0) calc(var(--kept) * 32%), transparent);
  border-left: 1px solid var(--line); }
.block:target { outline: 2px solid var(--c1); }
mark { background: none; color: inherit; text-decoration: underline 2px var(--c1); text-underline-offset: 3px; }
svg a { cursor: pointer; }
"""
)


@dataclass(frozen=True)
class ShownText:
    """One text on a page.

    Attributes:
        name: of the sample.
        found: which blocks run.
        blocks: text of each block in pieces; of each piece, whether it carries loss. Empty for data without text.
    """

    name: str
    found: KeepMap
    blocks: Sequence[Pieces]


def keep_page(
    texts: Sequence[ShownText], places: Sequence[Sequence[int]], tokens: Sequence[Sequence[tuple[str, int]]]
) -> str:
    """Maps of texts side by side with the text beneath, and what layers never drop.

    Args:
        texts: at least one.
        places: per layer, places of blocks that are never dropped.
        tokens: per layer, (token, occurrences) that never stood in a dropped block.
    """
    first = texts[0].found
    about = (
        f"Rows are chosen by blocks of {first.block_size} tokens. A row of a map is a layer, a column a block; blue "
        f"blocks run the layer ({first.rows} rows). A dot marks blocks that carry loss, which never skip. In the "
        "text, the deeper the blue the more layers run a block; underlined tokens carry loss."
    )
    columns = []
    for number, text in enumerate(texts):
        link = f"t{number}b"
        chart = charts.heat_map(text.name, text.found.kept_LK, text.found.supervised_K, link=link)
        columns.append(f"<section>{chart}<div class='text'>{''.join(_blocks(text, link))}</div></section>")
    said = {
        layer: (
            span(places[layer]) or "–",
            "  ".join(f"{token!r} ({count})" for token, count in tokens[layer]) or "–",
        )
        for layer in range(len(places))
        if any(min(text.found.kept_LK[layer]) < 1 for text in texts)
    }
    rows = [[span(layers), *said[layers[0]]] for layers in (list(same) for _, same in groupby(said, key=said.get))]
    head = ["layers", "blocks, by place in their document", "tokens (times seen)"]
    return html.page(
        "Which blocks run",
        [
            html.paragraph(about),
            '<div class="grid2">',
            *columns,
            "</div>",
            "<h2>What layers never drop</h2>",
            html.paragraph("Over the samples that were looked at; blocks that carry loss are left out of the count."),
            html.rows(head, rows),
        ],
        style=_STYLE,
    )


def samples_page(samples: Sequence[tuple[str, Pieces]], about: Sequence[str]) -> str:
    """Training samples as the model gets them; tokens that carry loss are underlined.

    Args:
        samples: name and text in pieces of each.
        about: lines on the data.
    """
    parts = [html.paragraph(line) for line in about]
    for name, pieces in samples:
        parts += [f"<h2>{markup.escape(name)}</h2>", f"<div class='text'>{_marked(pieces)}</div>"]
    return html.page("Training samples", parts, style=_STYLE)


def span(numbers: Iterable[int]) -> str:
    """Ascending numbers as ranges: `0 to 2, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)


def _blocks(text: ShownText, link: str) -> Iterable[str]:
    """The text, block by block."""
    layers = len(text.found.kept_LK)
    for block, pieces in enumerate(text.blocks):
        shares = [row[block] for row in text.found.kept_LK]
        running = [layer for layer, share in enumerate(shares) if share > 0]
        start, length = text.found.starts_K[block], text.found.lengths_K[block]
        title = (
            f"block {block}, tokens {start} to {start + length - 1}: runs in {len(running)} of {layers} layers: "
            f"{span(running)}"
        )
        style = f"--kept: {sum(shares) / layers:.3f}"
        yield f'<span class="block" id="{link}{block}" style="{style}" title="{title}">{_marked(pieces)}</span>'


def _marked(pieces: Pieces) -> str:
    escaped = ((markup.escape(text), learned) for text, learned in pieces)
    return "".join(f"<mark>{text}</mark>" if learned else text for text, learned in escaped)
