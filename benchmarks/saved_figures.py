"""The table and the figure of what a step saves, by part, for benchmarks/performance.py. From Records only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.saved_parts import PARTS, SHAPE, TOKENS
from lemo.measure.record import Record
from lemo.report.method_names import name_method
from lemo.report.tables import NOT_MEASURED, markdown

FIGURE = "performance-saved-16k.png"
GIB = 2**30
_SAVED, _HELD = f"saved/{SHAPE}/{TOKENS}/", f"training/{SHAPE}/{TOKENS}/qkvo/"
_COLOURS = ("#1e3a8a", "#b45309", "#047857", "#3b82f6", "#9333ea", "#be185d")
_UNSPLIT = "#d1d5db"
_EXPLAINED = f"""\
What autograd saves for backward in one step of {SHAPE} at {TOKENS:,} tokens, LoRA on q, k, v and o, nothing recomputed,
in GiB. The parts are those of `benchmarks/saved_parts.py`: saved tensors of the real methods at a small size on a CPU,
scaled to this one; for lemo the closed form of its engine. A tensor that several parts save counts for the first of
them: the input of `o` is attention's output, but a copy in LongLoRA and under fp32 adapters. `held` is what torch's
allocator held on the GPU between forward and backward, measured by itself. Liger was measured as a whole only."""


@dataclass
class Saved:
    """Newest Records of one method.

    Attributes:
        parts: bytes by part; empty where only the whole was measured.
        held: bytes held on the GPU; None where that was not measured.
    """

    parts: dict[str, float] = field(default_factory=dict)
    held: float | None = None

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(self.parts.values())


def read_saved(records: Sequence[Record]) -> dict[str, Saved]:
    """Methods with parts, and Liger, which has a whole only, most bytes first."""
    found: dict[str, Saved] = {}
    held: dict[str, float] = {}
    for record in sorted(records, key=lambda r: r.time):
        method, _, what = record.name.removeprefix(_SAVED).removeprefix(_HELD).rpartition("/")
        if record.name.startswith(_SAVED):
            found.setdefault(method, Saved()).parts[what] = record.value
        elif record.name.startswith(_HELD) and what == "held_bytes":
            held[method] = record.value
    if found:
        found |= {
            method: Saved() for method in held if method.partition(":")[0] == "liger" and "recompute" not in method
        }
    for method, saved in found.items():
        saved.held = held.get(method)
    return dict(sorted(found.items(), key=lambda item: -(item[1].held or item[1].total)))


def saved_table(methods: dict[str, Saved]) -> str:
    """GiB by method and part, with the measured whole."""
    rows = []
    for method, saved in methods.items():
        cells = [f"{saved.parts[part] / GIB:.2f}" if part in saved.parts else "–" for part in PARTS]
        cells += [f"{saved.total / GIB:.2f}" if saved.parts else "–"]
        cells += ["–" if saved.held is None else f"{saved.held / GIB:.2f}"]
        cells += [f"{saved.total / saved.held:.1%}" if saved.parts and saved.held else "–"]
        rows.append([name_method(method), *cells])
    return markdown(["method", *PARTS.values(), "sum", "held", "parts / held"], rows)


def saved_section(records: Sequence[Record], figures: Sequence[str]) -> list[str]:
    """Paragraphs of the page."""
    methods = read_saved(records)
    parts = ["## What a step saves, by part"]
    if not methods:
        return [*parts, NOT_MEASURED]
    return [*parts, _EXPLAINED, saved_table(methods), *(f"![{name}]({name})" for name in figures if name == FIGURE)]


def draw_saved(records: Sequence[Record], folder: Path) -> list[str]:
    """Stacked bars, one a method; returns the file's name, or nothing where there are no Records."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = read_saved(records)
    if not methods:
        return []
    figure, axes = pyplot.subplots(figsize=(11, 4.2))
    names = [name_method(method) for method in methods]
    widest = max(saved.held or saved.total for saved in methods.values()) / GIB
    left = [0.0] * len(names)
    for part, colour in zip(PARTS, _COLOURS, strict=True):
        width = [saved.parts.get(part, 0.0) / GIB for saved in methods.values()]
        seen = max(width) > 0.002 * widest  # a part that no bar shows has no place in the legend
        bars = axes.barh(names, width, left=left, color=colour, label=PARTS[part] if seen else None, height=0.66)
        inside = [f"{size:.1f}" if size > 0.025 * widest else "" for size in width]
        axes.bar_label(bars, inside, label_type="center", fontsize=8, color="white")
        left = [a + b for a, b in zip(left, width, strict=True)]
    unsplit = [0.0 if saved.parts else (saved.held or 0.0) / GIB for saved in methods.values()]
    axes.barh(names, unsplit, left=left, color=_UNSPLIT, label="held on the GPU, not split", height=0.66)
    for place, end in enumerate(a + b for a, b in zip(left, unsplit, strict=True)):
        axes.text(end + 0.008 * widest, place, f"{end:.1f}", va="center", fontsize=9)
    axes.set(xlabel=f"GiB saved for backward, {SHAPE}, {TOKENS:,} tokens", xlim=(0, 1.07 * widest))
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(folder / FIGURE, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return [FIGURE]
