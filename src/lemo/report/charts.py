"""Charts as SVG text for HTML pages: no script, no files beside the page, colours that follow light and dark."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

Points = Sequence[tuple[float, float]]
COLOURS = 7
_WIDTH, _HEIGHT = 520, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 10, 38
_SMOOTHED_FROM = 60

# The same hues in both: darker on white, lighter on black.
STYLE = """
:root { --c0: #2563eb; --c1: #c2410c; --c2: #047857; --c3: #9333ea; --c4: #be123c; --c5: #0e7490; --c6: #6b7280; }
@media (prefers-color-scheme: dark) {
  :root { --c0: #7cacff; --c1: #fb923c; --c2: #34d399; --c3: #c48bff; --c4: #fb7185; --c5: #38cfe8; --c6: #a3acba; }
}
figure { margin: 0; }
figcaption { font-weight: 600; margin-bottom: .2rem; }
figure svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .raw { fill: none; stroke-width: 1; opacity: .35; }
svg .curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; color: var(--soft); }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .35rem; }
"""


def line_chart(
    title: str,
    series: Mapping[str, Points],
    *,
    x_label: str,
    y_label: str,
    from_zero: bool = False,
    text: Callable[[float], str] | None = None,
) -> str:
    """A figure with one line per series; empty text when no series has a point.

    Long series are drawn faintly with their running mean on top.

    Args:
        title: above the chart.
        series: (x, y) points by name, ascending in x.
        x_label: unit of x.
        y_label: unit of y.
        from_zero: the scale of y begins at zero.
        text: writes a value of y; a short number when None.
    """
    shown = {name: _finite(points) for name, points in series.items()}
    every = [point for points in shown.values() for point in points]
    if not every:
        return ""
    text = text or short
    x_ticks = ticks(min(x for x, _ in every), max(x for x, _ in every))
    low = 0.0 if from_zero else min(y for _, y in every)
    y_ticks = ticks(low, max(y for _, y in every))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_axes(x_ticks, y_ticks, place, text, x_label, y_label)]
    for index, (name, points) in enumerate(shown.items()):
        parts.append(_curve(name, points, index, place, text))
    return _figure(title, "".join(parts), f"{title}: {', '.join(shown)}", legend(list(shown)) if len(shown) > 1 else "")


def heat_map(
    title: str, values_LK: Sequence[Sequence[float]], marks_K: Sequence[bool], *, link: str, most_columns: int = 256
) -> str:
    """A figure with a row per layer and a column per block, darker where more rows run; a click leads to the text.

    Args:
        title: above the map.
        values_LK: (L, K) shares, 0 to 1.
        marks_K: (K,) columns with a mark on top.
        link: anchors of the columns are `link` and the block's number.
        most_columns: columns are means over neighbours beyond this.
    """
    layers, blocks = len(values_LK), len(marks_K)
    columns = min(blocks, most_columns)
    edges = [round(i * blocks / columns) for i in range(columns + 1)]
    wide, high = (_WIDTH - 30) / columns, max(4.0, min(14.0, 420 / layers))
    out = []
    for layer, values_K in enumerate(values_LK):
        top = 12 + layer * high
        shares = [sum(values_K[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
        at = 0
        for share, run in itertools.groupby(round(share, 2) for share in shares):  # equal neighbours are one shape
            length = len(list(run))
            if share:
                size = f'width="{length * wide:.2f}" height="{high - 0.5:.1f}"'
                out.append(
                    f'<rect x="{30 + at * wide:.2f}" y="{top:.1f}" {size} fill="var(--c0)" fill-opacity="{share:g}"/>'
                )
            at += length
        if layer % max(1, layers // 12) == 0:
            out.append(f'<text x="26" y="{top + high - 1:.1f}" text-anchor="end">{layer}</text>')
    for column, (a, b) in enumerate(itertools.pairwise(edges)):
        across = 30 + column * wide
        if any(marks_K[a:b]):
            out.append(f'<circle cx="{across + wide / 2:.1f}" cy="6" r="{min(3.0, wide / 2):.1f}" fill="var(--c1)"/>')
        kept = sum(row[k] for row in values_LK for k in range(a, b)) / (layers * (b - a))
        label = f"block {a}" if b == a + 1 else f"blocks {a} to {b - 1}"
        out.append(
            f'<a href="#{link}{a}"><rect x="{across:.2f}" y="0" width="{wide:.2f}" height="{12 + layers * high:.1f}" '
            f'fill="transparent"><title>{label}: rows run in {kept:.0%} of the layers</title></rect></a>'
        )
    described = f"{title}: {layers} layers, {blocks} blocks"
    return _figure(title, "".join(out), described, height=math.ceil(14 + layers * high))


def legend(names: Sequence[str]) -> str:
    """Names with their colours."""
    items = (
        f'<span><i style="background: var(--c{index % COLOURS})"></i>{html.escape(name)}</span>'
        for index, name in enumerate(names)
    )
    return f'<div class="legend">{"".join(items)}</div>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    if max(abs(low), abs(high)) < 1e-300:  # a step between denormals would be zero
        low = high = 0.0
    span = high - low
    if span <= 1e-9 * max(abs(low), abs(high)):
        span = abs(high) or 1.0
        low, high = (low - span / 2, high + span / 2) if high else (0.0, 1.0)
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, max(last, first + 1) + 1)]


def short(value: float) -> str:
    """A number in a few characters."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _axes(x_ticks: list[float], y_ticks: list[float], place: Callable, text: Callable, x: str, y: str) -> str:
    """Grid, numbers and units."""
    out = []
    for tick in y_ticks:
        left, up = place(x_ticks[0], tick)
        out.append(f'<line class="grid" x1="{left:.1f}" x2="{_WIDTH - _RIGHT}" y1="{up:.1f}" y2="{up:.1f}"/>')
        out.append(f'<text x="{left - 6:.1f}" y="{up + 4:.1f}" text-anchor="end">{html.escape(text(tick))}</text>')
    for tick in x_ticks:
        across, down = place(tick, y_ticks[0])
        out.append(f'<text x="{across:.1f}" y="{down + 15:.1f}" text-anchor="middle">{short(tick)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    out.append(f'<text x="{middle:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">{html.escape(x)}</text>')
    turned = (_HEIGHT - _BOTTOM + _TOP) / 2
    out.append(
        f'<text x="12" y="{turned:.0f}" text-anchor="middle" transform="rotate(-90 12 {turned:.0f})">'
        f"{html.escape(y)}</text>"
    )
    return "".join(out)


def _curve(name: str, points: list[tuple[float, float]], index: int, place: Callable, text: Callable) -> str:
    """One series; every second one is dashed, so that one on top of another shows both."""
    if not points:
        return ""
    colour, dash = f"var(--c{index % COLOURS})", ' stroke-dasharray="7 5"' if index % 2 else ""
    out = []
    drawn = points
    if len(points) >= _SMOOTHED_FROM:
        out.append(f'<path class="raw" stroke="{colour}" d="{_path(points, place)}"/>')
        drawn = running_mean(points, len(points) // 30)
    if len(drawn) > 1:
        out.append(f'<path class="curve" stroke="{colour}"{dash} d="{_path(drawn, place)}"/>')
    if len(points) <= 200:  # a label under the pointer for each
        for x, y in points:
            across, up = place(x, y)
            label = html.escape(f"{name}: {text(y)} at {short(x)}")
            size = 2.5 if len(points) <= 40 else 1.5
            out.append(
                f'<circle cx="{across:.1f}" cy="{up:.1f}" r="{size}" fill="{colour}"><title>{label}</title></circle>'
            )
    return "".join(out)


def _path(points: Points, place: Callable) -> str:
    placed = (place(x, y) for x, y in points)
    return "M" + "L".join(f"{across:.1f} {up:.1f}" for across, up in placed)


def running_mean(points: Points, width: int) -> list[tuple[float, float]]:
    """Each y as the mean of the `width` points up to it."""
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    return [
        (x, (sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, max(1, width))) for i, (x, _) in enumerate(points)
    ]


def _figure(title: str, body: str, described: str, below: str = "", height: int = _HEIGHT) -> str:
    """A captioned SVG."""
    label = html.escape(described, quote=True)
    return (
        f'<figure><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{label}">{body}</svg>{below}</figure>'
    )
