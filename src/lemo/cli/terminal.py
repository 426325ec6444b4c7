"""What `lemo inspect` draws on the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

_SHADES = " ░▒▓█"


def show_map(found: Any, name: str = "", console: Any = None) -> None:
    """The heat map on the terminal: a line per layer, shades for the share of a block's rows that run."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    width = max(10, min(len(found.supervised_K), console.width - 16))
    console.print(f"{name}: blocks of {found.block_size} tokens whose rows run {found.rows}, by layer; ▼ carries loss")
    marks = ["▼" if share > 0 else " " for share in _resample([float(x) for x in found.supervised_K], width)]
    console.print(Text(" " * 10 + "".join(marks), style="yellow"), no_wrap=True)
    for layer, kept_K in enumerate(found.kept_LK):
        shades = "".join(_SHADES[round(share * (len(_SHADES) - 1))] for share in _resample(kept_K, width))
        share = sum(kept_K) / len(kept_K)
        console.print(Text(f"layer {layer:>3} {shades} {share:>4.0%}"), no_wrap=True)


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
