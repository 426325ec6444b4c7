"""Lengths and counts of the recipe of `lemo init`, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lemo.errors import ConfigError
from lemo.train.survey import DataFacts, MachineFacts, ModelFacts
from lemo.train.windows import share_windows

HELD_OUT = 0.1
STEP_TOKENS = 32_768
CPU_TOKENS, CPU_STEP_TOKENS = 1024, 4096
_SHORTEST, _FEW = 128, 0.05


@dataclass(frozen=True)
class Wish:
    """What the user said.

    Attributes:
        train: files or folders.
        validation: the same; empty holds a share of the training data out.
        output: folder of the run.
        preset: name of a set of options.
        window_tokens: asked-for length of a sample; None finds one.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    output: str = "run"
    preset: str = "balanced"
    window_tokens: int | None = None


@dataclass(frozen=True)
class Shape:
    """Lengths and counts that follow from model, data and machine.

    Attributes:
        window_tokens: of a sample.
        why: where that comes from.
        rope_scaling: `none` within the model's own context.
        packing: short documents share windows.
        truncate: samples that are longer are shortened, because the model's context cannot be extended.
        dropped: samples, about, that are left out, because few are longer than the model's context.
        windows: training windows, about.
        accumulation: batches per optimizer step.
        steps: optimizer steps of one pass, about.
    """

    window_tokens: int
    why: str
    rope_scaling: str
    packing: bool
    truncate: bool
    dropped: int
    windows: int
    accumulation: int
    steps: int


def find_shape(wish: Wish, model: ModelFacts, data: DataFacts, machine: MachineFacts) -> Shape:
    """Decides the lengths.

    Raises:
        ConfigError: the data is too short, or the window asked for is longer than documents, or than what the model can
            be extended to.
    """
    packing = truncate = False
    dropped = 0
    if wish.window_tokens is not None:
        window, (why, packing) = wish.window_tokens, _asked_window(wish, data)
    elif data.answers:
        window, why, dropped = _answer_window(model, data)
    else:
        window, why, packing = _text_window(wish, model, data, machine)
    scaling = model.rope_scaling(window)
    if scaling is None:
        if wish.window_tokens is not None:
            raise ConfigError(
                f"--window: the context of {model.context_tokens:,} tokens of this model cannot be extended"
            )
        window, scaling, truncate = model.context_tokens or window, "none", data.answers
        why = "the model's own context, which cannot be extended"
    kept = 1.0 if wish.validation else 1 - HELD_OUT
    if data.answers or packing:
        samples = [min(n, window) for n in data.lengths if n <= window or not dropped]
        lengths = samples if data.answers else [n % window for n in data.lengths]
        full = 0 if data.answers else sum(n // window for n in data.lengths)
        windows = round((full + len(share_windows(lengths, window))) * kept)
    else:
        windows = sum(int(n * kept) // window for n in data.lengths)
    windows = max(1, windows)
    step_tokens = STEP_TOKENS if machine.gpu else CPU_STEP_TOKENS
    accumulation = max(1, min(step_tokens // window, windows // 20))
    steps = max(1, windows // accumulation)
    return Shape(window, why, scaling, packing, truncate, dropped, windows, accumulation, steps)


def describe_shape(
    shape: Shape, wish: Wish, model: ModelFacts, data: DataFacts, longest: Callable[[], str]
) -> list[str]:
    """The length of windows with its reason, and what it costs: samples, or the context that the model was made for.

    Args:
        shape: what was decided.
        wish: what was asked for.
        model: whose context it is.
        data: whose lengths they are.
        longest: gives the place of the longest sample.
    """
    lines = [f"window: {shape.window_tokens:,} tokens: {shape.why}"]
    if not shape.dropped and not shape.truncate and shape.rope_scaling == "none":
        return lines
    about = f"{longest()} with about {data.longest_tokens:,} tokens"
    if shape.dropped:
        lines.append(
            f"warning: longer than the model's context, and left out (data.long_rows: drop): about {shape.dropped:,} "
            f"of {len(data.lengths):,} samples, the longest {about}; --window {room_for(data)} keeps all and extends "
            "the context"
        )
    if shape.truncate:
        lines.append(f"warning: longer samples are shortened (data.long_rows: truncate), the longest {about}")
    if shape.rope_scaling != "none":
        shorter = " with data.long_rows=drop or truncate" if data.answers else ""
        why = f"the longest sample is {about}" if wish.window_tokens is None else "--window asks for it"
        lines.append(
            f"warning: the context of the model, {model.context_tokens:,} tokens, is extended (model.rope_scaling: "
            f"{shape.rope_scaling}): {why}; --window {model.context_tokens}{shorter} keeps the model as it is"
        )
    return lines


def room_for(data: DataFacts) -> int:
    """A length that has room for the longest sample."""
    step = 128 if data.longest_tokens < 4096 else 1024
    # Those of most characters were counted; another one may have a few tokens more.
    return math.ceil(1.02 * data.longest_tokens / step) * step


def _answer_window(model: ModelFacts, data: DataFacts) -> tuple[int, str, int]:
    """A length with room for the longest sample; its reason; how many samples are left out.

    Where few are longer than the model's context, these are: extending it would change the model for all others.
    """
    room, context = room_for(data), model.context_tokens
    if context is not None and room > context:
        beyond = sum(n > context for n in data.lengths)
        if data.longest_tokens <= context:
            return context, "the model's own context, in which all samples fit", 0
        if 0 < beyond < _FEW * len(data.lengths):
            return context, "the model's own context, in which most samples fit", beyond
    return room, f"the longest sample counted has {data.longest_tokens:,}", 0


def _asked_window(wish: Wish, data: DataFacts) -> tuple[str, bool]:
    """The reason for a length that was asked for, and whether documents share windows of it."""
    lacks = _what_lacks(wish, data)
    if lacks is None:
        return "as asked for", False
    if (missing := missing_windows(wish, data)) is not None:
        raise ConfigError(f"--window: {missing}")
    which = "the ends held out" if lacks[0] else "documents without the ends held out" if lacks[1] else "documents"
    return f"as asked for; {which} are shorter: several share a window", True


def _text_window(wish: Wish, model: ModelFacts, data: DataFacts, machine: MachineFacts) -> tuple[int, str, bool]:
    """The longest power of two within the model's context that documents fill; its reason; whether to pack."""
    most, why = model.context_tokens or 8192, "the model's own context"
    if not machine.gpu and most > CPU_TOKENS:
        most, why = CPU_TOKENS, "enough to try on a CPU; raise it on a GPU"
    window = first = 2 ** int(math.log2(most))
    if first < most:
        why = f"the largest power of two in the model's context of {most:,}"
    while window >= max(_SHORTEST, first // 2):
        lack = _why_not(wish, data, window)
        if lack is None:
            return window, why, False
        why = lack
        window //= 2
    window = first
    while window >= _SHORTEST and data.tokens < 2 * window:
        window //= 2
    if window < _SHORTEST:
        raise ConfigError(f"the data has about {data.tokens:,} tokens, too few to train on and hold some out")
    return window, f"several documents share one: {_why_not(wish, data, window) or why}", True


def _why_not(wish: Wish, data: DataFacts, window: int) -> str | None:
    """Why windows of one document each would not do; None where they would."""
    if _fills(data.lengths, window, holds_out=not wish.validation):
        return None
    if _fills(data.lengths, window, holds_out=False):
        end = int(max(data.lengths) * HELD_OUT)
        return f"only {end:,} tokens of the longest document are held out (--validation FILE avoids that)"
    if max(data.lengths) < window:
        return f"no document has {window:,} tokens"
    return f"windows of {window:,}, one document each, would leave more than a quarter unused"


def _fills(lengths: Sequence[int], window: int, *, holds_out: bool) -> bool:
    """Whether windows leave at most a quarter of the tokens over, and what is held out has one."""
    parts = holds_out and _holds_out_ends(lengths)
    train = [int(n * (1 - HELD_OUT)) if parts else n for n in lengths]
    used = sum(n // window * window for n in train) >= 0.75 * sum(train)
    return used and (not parts or any(int(n * HELD_OUT) >= window for n in lengths))


def packs(wish: Wish, data: DataFacts) -> bool:
    """Whether documents share windows of the length asked for: none fills one, and together they fill some."""
    return _what_lacks(wish, data) is not None and data.tokens * HELD_OUT >= (wish.window_tokens or 0)


def missing_windows(wish: Wish, data: DataFacts) -> str | None:
    """Why no window comes out of text for training or validation, when a length was asked for; None when some do."""
    lacks = _what_lacks(wish, data)
    if lacks is None or packs(wish, data):
        return None
    about = "" if data.kind == "tokens" else "about "
    return (
        f"no window{lacks[0]} of {wish.window_tokens:,} tokens comes out: the longest document has {about}"
        f"{data.longest_tokens:,}{lacks[1]}; name a smaller --window{' or --validation FILE' if lacks[1] else ''}"
    )


def _what_lacks(wish: Wish, data: DataFacts) -> tuple[str, str] | None:
    """What windows are for that no document fills, and what is left of a document for them; None when some do."""
    window = wish.window_tokens
    if window is None or data.answers:
        return None
    parts = not wish.validation and _holds_out_ends(data.lengths)
    longest = data.longest_tokens
    if longest < window:
        return "", ""
    if parts and int(longest * (1 - HELD_OUT)) < window:
        return "", f", of which {HELD_OUT:.0%} are held out"
    if parts and int(longest * HELD_OUT) < window:
        return " for validation", f", of which {HELD_OUT:.0%} are held out"
    return None


def _holds_out_ends(lengths: Sequence[int]) -> bool:
    """Whether the end of each document is held out, because there are too few documents."""
    return len(lengths) < round(1 / HELD_OUT)
