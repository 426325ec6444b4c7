"""What `lemo inspect` draws on the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

_SHADES = " ░▒▓█"
_DOES = {"forward": "run", "backward": "pass gradient"}


def show_map(found: Any, name: str = "", console: Any = None) -> None:
    """The heat map on the terminal: a line per layer, shades for the share of a block's rows that run.

    Layers behind each other of the same rows share a line.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    runs = _equal_runs(found.kept_LK)
    names = [f"layer {first}" if first == last else f"layers {first}-{last}" for first, last in runs]
    edge = max(map(len, names)) + 1
    width = max(10, min(len(found.supervised_K), console.width - edge - 6))
    does = _DOES[found.rows]
    title = f"{name}: blocks of {found.block_size} tokens whose rows {does}, by layer; ▼ carries loss"
    console.print(title, markup=False, soft_wrap=True)
    marks = ["▼" if share > 0 else " " for share in _resample([float(x) for x in found.supervised_K], width)]
    console.print(Text(" " * edge + "".join(marks), style="yellow"), no_wrap=True)
    for label, (first, _) in zip(names, runs, strict=True):
        kept_K = found.kept_LK[first]
        shades = "".join(_SHADES[round(share * (len(_SHADES) - 1))] for share in _resample(kept_K, width))
        share = sum(kept_K) / len(kept_K)
        console.print(Text(f"{label:<{edge}}{shades} {share:>4.0%}"), no_wrap=True)


def _equal_runs(rows: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """First and last number of each run of equal rows."""
    groups = (list(group) for _, group in itertools.groupby(range(len(rows)), key=lambda index: list(rows[index])))
    return [(group[0], group[-1]) for group in groups]


def _resample(values: list[float], width: int) -> list[float]:
    """Means over `width` equal parts; the values themselves where there are no more of them than that."""
    count = len(values)
    if count <= width:
        return values
    edges = [round(i * count / width) for i in range(width + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def show_pieces(pieces: Sequence[tuple[str, bool]], title: str, console: Any = None) -> None:
    """Text; pieces that carry loss stand out."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    shown = Text()
    for text, learned in pieces:
        shown.append(f"⟦{text}⟧" if learned else text, style="bold green" if learned else "dim")
    console.print(title, markup=False)
    console.print(shown)


def cut_pieces(
    tokenizer: Any, ids: Sequence[int], learned: Sequence[bool], start: int = 0, end: int | None = None
) -> list[tuple[str, bool]]:
    """Text of the tokens [start, end) in runs of equal mask.

    Runs are decoded as wholes, because single tokens may be parts of a letter.
    """
    span = list(zip(ids, learned, strict=True))[start:end]
    runs = ((flag, [token for token, _ in run]) for flag, run in itertools.groupby(span, key=lambda pair: pair[1]))
    return [(tokenizer.decode(run, clean_up_tokenization_spaces=False), flag) for flag, run in runs]
