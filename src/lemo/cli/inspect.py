"""`lemo inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lemo.cli.arguments import AdapterOption, Overrides, PlanOption, Source

_MOST_TEXTS, _LOOKED_AT = 2, 8


def inspect(
    source: Source,
    overrides: Overrides = None,
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="Text to look at, twice for two. Validation data by default.")
    ] = None,
    out: Annotated[
        list[Path] | None, typer.Option("--out", help="Also write this file: .png or .html; repeatable.")
    ] = None,
    adapter: AdapterOption = None,
    plan: PlanOption = None,
    samples: Annotated[
        int, typer.Option("--samples", min=0, help="Show this many training samples with their loss instead.")
    ] = 0,
    tokens: Annotated[int, typer.Option("--tokens", min=0, help="Tokens of each text to print.")] = 400,
) -> None:
    """Show which blocks of texts run in which layer, and which tokens carry loss.

    With --samples, training samples are shown as the model gets them; that needs no weights and no plan. Otherwise maps
    of one or two texts are drawn on the terminal, layers of the same rows as one, and into the files of --out, if any:
    a picture, or a page with the text beneath.
    """
    from lemo.cli.arguments import check_writable, load_source
    from lemo.errors import ConfigError

    loaded = load_source(source, overrides, adapter, plan, weights=not samples)
    files = out or []
    wrong = [path for path in files if path.suffix not in (".html", *(() if samples else (".png",)))]
    if wrong:
        raise ConfigError(f"--out: {wrong[0]} must end in .html" + ("" if samples else " or .png"))
    check_writable(files)
    if samples:
        _show_samples(loaded.run, samples, tokens, files)
        return
    if len(text or ()) > _MOST_TEXTS:
        raise ConfigError(f"--text: at most {_MOST_TEXTS} texts stand side by side, got {len(text or ())}")
    if not text and not loaded.run.data.validation_sources:
        raise ConfigError("data.validation is empty: name a text with --text")
    _show_maps(loaded, text or [], tokens, files)


def _show_samples(run: Any, count: int, tokens: int, files: list[Path]) -> None:
    """Training samples with their loss mask."""
    from dataclasses import replace

    from lemo.cli.arguments import quieten
    from lemo.cli.terminal import cut_pieces, show_pieces
    from lemo.errors import ConfigError
    from lemo.report.keep_page import samples_page
    from lemo.train.data import load_windows
    from lemo.train.model import load_tokenizer
    from lemo.train.planning import training_collator

    quieten()
    try:
        tokenizer = load_tokenizer(run.model)
    except ConfigError as error:
        raise ConfigError(f"--samples needs the model's tokenizer, to show text ({error})") from error
    run = replace(run, data=replace(run.data, max_windows=count))
    dataset, report = load_windows(run.data, tokenizer, "train")
    collator = training_collator(run, tokenizer)
    shown = []
    for index in range(len(dataset)):
        batch = collator([dataset[index]])
        ids, learned = batch["input_ids"][0].tolist(), (batch["labels"][0] != -100).tolist()
        name = f"{dataset.windows[index].sample_id}: {len(ids):,} tokens, {sum(learned):,} carry loss"
        show_pieces(cut_pieces(tokenizer, ids, learned, 0, tokens), f"{name}; the first {min(tokens, len(ids))}")
        shown.append((name, cut_pieces(tokenizer, ids, learned)))
    for path in files:
        _write(path, samples_page(shown, report.lines()))


def _show_maps(loaded: Any, texts: list[Path], tokens: int, files: list[Path]) -> None:
    """Maps of kept blocks."""
    from lemo.cli.terminal import cut_pieces, show_map, show_pieces
    from lemo.eval.keep_map import never_dropped_places, never_dropped_tokens
    from lemo.report.keep_page import ShownText, keep_page
    from lemo.report.plots import plot_keep_maps

    found, tokenizer = _find_maps(loaded, texts)
    shown = found[: max(1, len(texts))]
    for name, each, ids, learned in shown:
        show_map(each, name)
        if tokenizer is not None and tokens:
            title = f"the first {min(tokens, len(ids))} tokens; ⟦those that carry loss⟧"
            show_pieces(cut_pieces(tokenizer, ids, learned, 0, tokens), title)
    if tokenizer is None:
        typer.echo("the data is pre-tokenised, so there is no text of the loss mask to show")
    maps = [each for _, each, _, _ in found]
    for path in files:
        if path.suffix == ".png":
            pictures = [(name, each.kept_LK, each.supervised_K) for name, each, _, _ in shown]
            what = {"block_size": maps[0].block_size, "rows": maps[0].rows}
            typer.echo(f"picture: {plot_keep_maps(pictures, path, **what)}")
            continue
        pages = []
        for name, each, ids, learned in shown:
            spans = [] if tokenizer is None else zip(each.starts_K, each.lengths_K, strict=True)
            blocks = [cut_pieces(tokenizer, ids, learned, start, start + length) for start, length in spans]
            pages.append(ShownText(name, each, blocks))
        counted = never_dropped_tokens(maps, [ids for _, _, ids, _ in found])
        words = [[(_word(tokenizer, token), count) for token, count in layer] for layer in counted]
        _write(path, keep_page(pages, never_dropped_places(maps), words))


def _find_maps(loaded: Any, texts: list[Path]) -> tuple[list[tuple[str, Any, list[int], list[bool]]], Any]:
    """(name, map, token ids, loss mask) of each text, or of some validation windows; and the tokenizer."""
    from dataclasses import replace

    from lemo.cli.arguments import load_parts
    from lemo.core.plan import Plan
    from lemo.errors import ConfigError
    from lemo.eval.keep_map import keep_map
    from lemo.runtime.attach import attach
    from lemo.train.data import load_windows
    from lemo.train.planning import needs_calibration, skeleton_plan, training_collator

    if loaded.plan is None and needs_calibration(loaded.run):
        raise ConfigError("the recipe needs a calibrated plan; make one with lemo calibrate and name it with --plan")
    data = replace(loaded.run.data, validation_windows=_LOOKED_AT)
    splits = [data] if not texts else [_only(data, path) for path in texts]
    paths = [path for each in splits for path in each.validation_sources]
    model, tokenizer = load_parts(loaded, paths)
    plan = skeleton_plan(model, loaded.run) if loaded.plan is None else Plan.load(loaded.plan)
    run = replace(loaded.run, sparsity=replace(loaded.run.sparsity, block_size=plan.block_size))
    found = []
    with attach(model, plan) as handle:
        for split in splits:
            run = replace(run, data=split)
            vocabulary = model.config.get_text_config().vocab_size
            dataset, _ = load_windows(split, tokenizer, "validation", vocabulary=vocabulary)
            collator = training_collator(run, tokenizer, model, plan)
            for index in range(1 if texts else len(dataset)):
                batch = collator([dataset[index]])
                ids, learned = batch["input_ids"][0].tolist(), (batch["labels"][0] != -100).tolist()
                name = f"{dataset.windows[index].sample_id}"
                found.append((name, keep_map(model, batch, handle), ids, learned))
    return found, tokenizer


def _only(data: Any, path: Path) -> Any:
    """The data options for one text, shorter than a window or not."""
    from dataclasses import replace

    return replace(
        data, validation=(str(path),), held_out_share=0.0, remainder="keep", answer_only=False, packing=False
    )


def _word(tokenizer: Any, token: int) -> str:
    return str(token) if tokenizer is None else tokenizer.decode([token])


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    typer.echo(f"page: {path}")
