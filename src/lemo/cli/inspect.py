"""`lemo inspect`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any

import typer

from lemo.cli.arguments import AdapterOption, Overrides, PlanOption, Source

_SHADES = " ░▒▓█"


def inspect(
    source: Source,
    overrides: Overrides = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="Text to look at. The first validation window by default.")
    ] = None,
    png: Annotated[Path, typer.Option("--png", help="Picture to write.")] = Path("kept-blocks.png"),
    adapter: AdapterOption = None,
    plan: PlanOption = None,
    tokens: Annotated[int, typer.Option("--tokens", min=0, help="Tokens of the loss mask to show.")] = 400,
) -> None:
    """Show which blocks of a text run in which layer, and which of its tokens carry loss."""
    from dataclasses import replace

    from lemo.cli.arguments import load_parts, load_source
    from lemo.errors import ConfigError

    loaded = load_source(source, overrides, adapter, plan)
    if text is not None:
        data = replace(
            loaded.run.data,
            validation=(str(text),),
            held_out_share=0.0,
            remainder="keep",
            answer_only=False,
            packing=False,
        )
        loaded = replace(loaded, run=replace(loaded.run, data=data))
    elif not loaded.run.data.validation_sources:
        raise ConfigError("data.validation is empty: name a text with --text")
    from lemo.core.plan import Plan
    from lemo.eval.keep_map import keep_map
    from lemo.report.plots import plot_keep_map
    from lemo.runtime.attach import attach
    from lemo.train.data import load_windows
    from lemo.train.planning import needs_calibration, skeleton_plan, training_collator

    if loaded.plan is None and needs_calibration(loaded.run):
        raise ConfigError("the recipe needs a calibrated plan; make one with lemo calibrate and name it with --plan")
    model, tokenizer = load_parts(loaded, loaded.run.data.validation_sources)
    chosen = skeleton_plan(model, loaded.run) if loaded.plan is None else Plan.load(loaded.plan)
    run = replace(loaded.run, sparsity=replace(loaded.run.sparsity, block_size=chosen.block_size))
    vocabulary = model.config.get_text_config().vocab_size
    dataset, _ = load_windows(run.data, tokenizer, "validation", vocabulary=vocabulary)
    batch = training_collator(run, tokenizer)([dataset[0]])
    with attach(model, chosen) as handle:
        found = keep_map(model, batch, handle)
    show_map(found)
    title = f"{dataset.windows[0].sample_id}, {found.rows} rows"
    png.parent.mkdir(parents=True, exist_ok=True)
    path = plot_keep_map(found.kept_LK, png, block_size=found.block_size, title=title, supervised_K=found.supervised_K)
    typer.echo(f"picture: {path}")
    if tokenizer is None:
        typer.echo("the data is pre-tokenised, so there is no text of the loss mask to show")
    elif tokens:
        show_mask(batch, tokenizer, tokens)


def show_map(found: Any, console: Any = None) -> None:
    """The heat map on the terminal: a line per layer, shades for the share of a block's rows that run."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    width = max(10, min(len(found.supervised_K), console.width - 16))
    console.print(f"Blocks of {found.block_size} tokens whose rows run {found.rows}, by layer; ▼ carries loss")
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


def show_mask(batch: Any, tokenizer: Any, tokens: int, console: Any = None) -> None:
    """Text of the first tokens; those that carry loss stand out."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    ids, labels = batch["input_ids"][0, :tokens].tolist(), batch["labels"][0, :tokens].tolist()
    shown = Text()
    start = 0
    # Runs of equal mask are decoded together: single tokens may be parts of a letter.
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (labels[end] == -100) != (labels[start] == -100):
            learned = labels[start] != -100
            piece = tokenizer.decode(ids[start:end])
            shown.append(f"⟦{piece}⟧" if learned else piece, style="bold green" if learned else "dim")
            start = end
    console.print(f"The first {len(ids)} tokens; ⟦those that carry loss⟧")
    console.print(shown)
