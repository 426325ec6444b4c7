"""Figures from Records and saved metrics; the only place that draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lemo.errors import DataError
from lemo.measure.record import Record
from lemo.report.tables import latest, mean_value, variants

_COLOURS = {"dense_rows": "#a3a9b3", "dense": "#6b7280", "skip": "#2563eb", "balanced": "#2563eb"}
_FURTHER = ("#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2")


def colour_of(variant: str, index: int) -> str:
    """Dense runs are grey, lemo's own blue, others follow a fixed order."""
    for word, colour in _COLOURS.items():
        if variant == word or variant.startswith(f"{word}_"):
            return colour
    return _FURTHER[index % len(_FURTHER)]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )
    return pyplot


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure in the house style and its axes, (rows, columns), `size` in inches."""
    return _pyplot().subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def save_figure(figure: Any, path: str | Path) -> Path:
    """Writes a figure as a PNG and closes it."""
    return _save(figure, path)


def _save(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    _pyplot().close(figure)
    return path


def draw_loss_curves(axes: Any, curves: Mapping[str, Sequence[float]]) -> None:
    """Training loss over optimizer steps, one line per variant, named at its end."""
    for index, (variant, losses) in enumerate(curves.items()):
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, color=colour_of(variant, index), marker="o", markersize=3, label=_words(variant))
    axes.set(title="Training loss", xlabel="optimizer step", ylabel="nats")
    if curves:
        axes.legend()
        axes.xaxis.get_major_locator().set_params(integer=True)


def draw_bars(axes: Any, values: Mapping[str, float], title: str, unit: str, digits: int = 0) -> None:
    """One horizontal bar per variant with its number; starts at zero."""
    names = list(values)
    colours = [colour_of(name, index) for index, name in enumerate(names)]
    bars = axes.barh(range(len(names)), list(values.values()), color=colours, height=0.6)
    axes.bar_label(bars, fmt=f"{{:,.{digits}f}}", padding=4)
    axes.set(title=f"{title} ({unit})", xlim=(0, 1.2 * max(values.values(), default=1.0)))
    axes.set_yticks(range(len(names)), [_words(name) for name in names])
    axes.invert_yaxis()
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])


def draw_losses(axes: Any, losses: Mapping[str, Mapping[str, float]]) -> None:
    """Validation loss: one point per variant and stage, joined; the scale does not start at zero, so no bars."""
    stages = list(dict.fromkeys(stage for found in losses.values() for stage in found))
    rows = [(variant, found) for variant, found in losses.items() if found]
    spread = [0.3 * (i - (len(rows) - 1) / 2) for i in range(len(rows))]
    for index, (variant, found) in enumerate(rows):
        places = [stages.index(stage) + spread[index] for stage in found]
        colour = colour_of(variant, index)
        axes.plot(places, list(found.values()), "o", color=colour, label=_words(variant))
        for place, value in zip(places, found.values(), strict=True):
            below = index % 2 == 1
            axes.annotate(
                f"{value:.3f}",
                (place, value),
                xytext=(0, -11 if below else 6),
                textcoords="offset points",
                ha="center",
                color=colour,
                fontsize=8,
            )
    axes.set(title="Validation loss", ylabel="nats")
    axes.set_xticks(range(len(stages)), stages)
    axes.set_xlim(-0.5, len(stages) - 0.5)
    axes.margins(y=0.25)
    if rows:
        axes.legend()


def draw_keep_map(
    axes: Any,
    kept_LK: Sequence[Sequence[float]],
    block_size: int,
    supervised_K: Any = None,
    *,
    rows: str = "forward",
) -> None:
    """Which blocks of one text are kept in which layer: dark ones. Loss blocks are marked along the top.

    Args:
        axes: where it is drawn.
        kept_LK: (L, K) share of each block's rows that are kept, 0 to 1.
        block_size: rows per block.
        supervised_K: (K,) whether a block holds loss rows; None marks none.
        rows: what keeping means: `forward`, to run the layer, or `backward`, to pass gradient.
    """
    axes.imshow(kept_LK, aspect="auto", interpolation="nearest", cmap="Blues", vmin=-0.15, vmax=1.15)
    title = f"Blocks that {'run each layer' if rows == 'forward' else 'pass gradient, by layer'} (dark), one text"
    axes.set(title=title, xlabel=f"block of {block_size} tokens", ylabel="layer")
    if supervised_K is not None:
        marked = [k for k, flag in enumerate(supervised_K) if flag]
        axes.plot(marked, [-1.2] * len(marked), "v", color="#d97706", markersize=4, clip_on=False)
        axes.set_title(f"{title}; ▼ loss rows", pad=12)


def draw_shares(axes: Any, shares: Mapping[str, Sequence[float]]) -> None:
    """Share of rows that run each layer."""
    for index, (variant, per_layer) in enumerate(shares.items()):
        axes.step(range(len(per_layer)), per_layer, where="mid", color=colour_of(variant, index), label=_words(variant))
    axes.set(title="Share of rows that run each layer", xlabel="layer", ylim=(0, 1.05))
    if shares:
        axes.legend()


def _words(variant: str) -> str:
    return variant.replace("_", " ")


def _samples(records: Sequence[Record], name: str) -> list[float]:
    found = latest(records, name)
    return list(found[-1].samples) if found and not isinstance(found[-1].samples, Mapping) else []


def plot_study(
    records: Sequence[Record], path: str | Path, *, study: str, title: str, keep_map: Mapping[str, Any] | None = None
) -> Path:
    """One figure of a study: losses, speed, memory, and what was skipped.

    Args:
        records: Records named `study/variant/...`.
        path: PNG to write.
        study: first part of the names.
        title: above the figure.
        keep_map: `kept` (L, K), `block_size`, optionally `supervised` (K,) and `rows`; None draws the shares per layer.

    Raises:
        DataError: no Records of the study.
    """
    names = [v for v in variants(records, study) if mean_value(records, f"{study}/{v}/tokens_per_second") is not None]
    if not names:
        raise DataError(f"no Records of {study!r} to draw")

    def values(what: str) -> dict[str, float]:
        found = {v: mean_value(records, f"{study}/{v}/{what}") for v in names}
        return {v: x for v, x in found.items() if x is not None}

    pyplot = _pyplot()
    figure = pyplot.figure(figsize=(10, 7.5), layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    grid = figure.add_gridspec(3, 2, height_ratios=(1.3, 0.55, 1.4))
    draw_loss_curves(
        figure.add_subplot(grid[0, 0]), {v: _samples(records, f"{study}/{v}/training_loss") for v in names}
    )
    draw_losses(figure.add_subplot(grid[0, 1]), _stages(records, study, names))
    draw_bars(figure.add_subplot(grid[1, 0]), values("tokens_per_second"), "Speed", "tokens/s, higher is better")
    draw_bars(figure.add_subplot(grid[1, 1]), values("peak_memory"), "Peak memory", "GiB, lower is better", digits=2)
    below = figure.add_subplot(grid[2, :])
    if keep_map is not None:
        rows = keep_map.get("rows", "forward")
        draw_keep_map(below, keep_map["kept"], keep_map["block_size"], keep_map.get("supervised"), rows=rows)
    else:
        draw_shares(below, {v: s for v in names if (s := _samples(records, f"{study}/{v}/forward_share"))})
    return _save(figure, path)


def _stages(records: Sequence[Record], study: str, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Validation losses of each variant by stage."""
    wanted = {
        "validation_loss_before": "before",
        "validation_loss_after": "after",
        "dense_validation_loss": "after",
        "sparse_validation_loss_after": "after, sparse\n(look-ahead)",
        "sparse_validation_loss": "after, sparse\n(look-ahead)",
    }
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for name in names:
        for what, stage in wanted.items():
            value = mean_value(records, f"{study}/{name}/{what}")
            if value is not None:
                found[name][stage] = value
    return found


def plot_keep_map(
    kept_LK: Sequence[Sequence[float]],
    path: str | Path,
    *,
    block_size: int,
    title: str | None = None,
    supervised_K: Sequence[bool] | None = None,
    rows: str = "forward",
) -> Path:
    """A heat map of kept blocks per layer as a PNG.

    Args:
        kept_LK: (L, K) share of each block's rows that are kept, 0 to 1.
        path: PNG to write.
        block_size: rows per block.
        title: above the map.
        supervised_K: (K,) blocks that hold loss rows.
        rows: as in `draw_keep_map`.
    """
    if not kept_LK or not kept_LK[0]:
        raise DataError("a keep map needs at least one layer and one block")
    return plot_keep_maps([(title or "", kept_LK, supervised_K)], path, block_size=block_size, rows=rows)


def plot_keep_maps(
    maps: Sequence[tuple[str, Sequence[Sequence[float]], Sequence[bool] | None]],
    path: str | Path,
    *,
    block_size: int,
    rows: str = "forward",
) -> Path:
    """Heat maps of several texts side by side as a PNG.

    Args:
        maps: name, (L, K) shares, and (K,) blocks that hold loss rows, of each text.
        path: PNG to write.
        block_size: rows per block.
        rows: as in `draw_keep_map`.
    """
    width = sum(min(16.0, max(6.0, 1.5 + len(kept_LK[0]) / 14)) for _, kept_LK, _ in maps)
    height = min(12.0, max(3.0, 1.5 + len(maps[0][1]) / 8))
    figure, axes = _pyplot().subplots(1, len(maps), figsize=(width, height), layout="constrained", squeeze=False)
    for each, (name, kept_LK, supervised_K) in zip(axes[0], maps, strict=True):
        draw_keep_map(each, kept_LK, block_size, supervised_K, rows=rows)
        if name:
            each.set_title(f"{name}\n{each.get_title(loc='left')}", pad=12)
    return _save(figure, path)
