"""`lemo init`."""

from __future__ import annotations

from enum import Enum, StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lemo.cli.presets import PRESETS

PresetName = Enum("PresetName", {name: name for name in PRESETS}, type=str)


class Machine(StrEnum):
    """Where the run will be."""

    auto = "auto"
    cpu = "cpu"
    gpu = "gpu"


def init(
    model: Annotated[str, typer.Argument(help="Model folder, hub name or package:NAME.", show_default=False)],
    data: Annotated[list[str], typer.Argument(help="Training files or folders.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Recipe to write.")] = Path("recipe.yaml"),
    preset: Annotated[PresetName, typer.Option("--preset", help="How much is left out.")] = PresetName.balanced,
    validation: Annotated[
        list[str] | None, typer.Option("--validation", help="Validation files; a share is held out otherwise.")
    ] = None,
    window: Annotated[int | None, typer.Option("--window", min=2, help="Tokens of a sample; found otherwise.")] = None,
    run: Annotated[str, typer.Option("--run", help="Output folder that the recipe names.")] = "run",
    machine: Annotated[Machine, typer.Option("--machine", help="What the run will be on.")] = Machine.auto,
) -> None:
    """Write a commented recipe for a model, data and this machine.

    Context length, kind of data, window, dtype, ratios and steps are found out or chosen, each with its reason.
    """
    from dataclasses import replace

    from lemo.cli.arguments import quieten
    from lemo.cli.draft import Wish, draft_recipe
    from lemo.cli.recipe import build_run, parse_yaml
    from lemo.config import ModelConfig
    from lemo.errors import ConfigError
    from lemo.train.model import load_tokenizer
    from lemo.train.sources import needs_tokenizer
    from lemo.train.survey import survey_data, survey_machine, survey_model

    if out.exists():
        raise ConfigError(f"--out: {out} exists already")
    quieten()
    files = [*data, *(validation or [])]
    needs_text = needs_tokenizer(files)
    facts = survey_model(model)
    tokenizer = load_tokenizer(ModelConfig(model, gguf_file=facts.gguf_file)) if needs_text else None
    found = survey_data(data, tokenizer)
    if validation:
        longest = max(found.longest_tokens, survey_data(validation, tokenizer).longest_tokens)
        found = replace(found, longest_tokens=longest)
    wish = Wish(tuple(data), tuple(validation or ()), run, preset.value, window)
    text = draft_recipe(wish, facts, found, survey_machine(machine.value))
    build_run(parse_yaml(text, str(out)), str(out))  # a recipe that would be refused is never written
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    documents = len(found.lengths)
    typer.echo(f"model: {facts.kind}, {facts.layers} layers, context of {facts.context_tokens or '?'} tokens")
    typer.echo(f"data: {documents:,} document{'s' if documents > 1 else ''}, about {found.tokens:,} tokens")
    typer.echo(f"recipe: {out}")
    typer.echo(f"next: lemo train {out}")
