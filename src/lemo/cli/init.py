"""`lemo init`."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lemo.cli.presets import PRESETS

if TYPE_CHECKING:
    from lemo.config import RunConfig
    from lemo.train.survey import DataFacts

PresetName = Enum("PresetName", {name: name for name in PRESETS}, type=str)


class Machine(StrEnum):
    """Where the run will be."""

    auto = "auto"
    cpu = "cpu"
    gpu = "gpu"


def init(
    model: Annotated[str, typer.Argument(help="Model folder, hub name or package:NAME.", show_default=False)],
    data: Annotated[
        list[str],
        typer.Argument(
            help="Training files or folders; data.text_field=KEY names the key of rows' text.", show_default=False
        ),
    ],
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
    from lemo.cli.arguments import check_writable, quieten
    from lemo.cli.draft import count_rows, draft_recipe
    from lemo.cli.recipe import build_run, parse_yaml
    from lemo.cli.shape import Wish, describe_shape, find_shape
    from lemo.config import ModelConfig
    from lemo.errors import ConfigError
    from lemo.train.model import load_tokenizer
    from lemo.train.sources import describe_unread, needs_tokenizer
    from lemo.train.survey import survey_machine, survey_model

    if out.exists():
        raise ConfigError(f"--out: {out} exists already")
    quieten()
    data, text_field = _split_field(data)
    files = [*data, *(validation or [])]
    needs_text = needs_tokenizer(files)
    facts = survey_model(model)
    tokenizer = load_tokenizer(ModelConfig(model, gguf_file=facts.gguf_file)) if needs_text else None
    found, place = _survey(data, validation or [], tokenizer, text_field)
    wish, where = Wish(tuple(data), tuple(validation or ()), run, preset.value, window), survey_machine(machine.value)
    text = draft_recipe(wish, facts, found, where)
    made = build_run(parse_yaml(text, str(out)), str(out))  # a recipe that would be refused is never written
    notes = [*describe_shape(find_shape(wish, facts, found, where), wish, facts, found, place), *_shared(made)]
    check_writable([out])
    out.write_text(text, encoding="utf-8")
    typer.echo(f"model: {facts.kind}, {facts.layers} layers, context of {facts.context_tokens or '?'} tokens")
    typer.echo(f"data: {count_rows(found)}, about {found.tokens:,} tokens")
    unread = describe_unread(files)
    if unread:
        typer.echo(unread)
    if found.unused:
        typer.echo(f"note: the first row has text that is not used: {', '.join(found.unused)}")
    for note in notes:
        typer.echo(note, err=note.startswith("warning: "))
    typer.echo(f"recipe: {out}")
    typer.echo(f"next: lemo train {out}")


def _split_field(data: list[str]) -> tuple[list[str], str | None]:
    """Files, and the key of the text where `data.text_field=KEY` stands among them."""
    start = "data.text_field="
    fields = [part.removeprefix(start) for part in data if part.startswith(start)]
    return [part for part in data if not part.startswith(start)], fields[-1] if fields else None


def _shared(run: RunConfig) -> list[str]:
    """A warning where validation files hold text of the training files."""
    from lemo.train.data import read_documents
    from lemo.train.hold_out import note_shared

    data, notes = run.data, []
    if data.validation:
        fields = {"text_field": data.text_field, "messages_field": data.messages_field}
        train, held = (read_documents(paths, **fields) for paths in (data.train, data.validation))
        for _ in note_shared(train, held, notes):
            pass
    return [f"warning: {note}" for note in notes]


def _survey(
    data: list[str], validation: list[str], tokenizer: Any, text_field: str | None
) -> tuple[DataFacts, Callable[[], str]]:
    """Facts about training data, its longest sample that of validation data where that is longer; and what finds it.

    Raises:
        ConfigError: the two are of different kinds, or keep their text in different keys.
    """
    from dataclasses import replace
    from functools import partial

    from lemo.cli.draft import KINDS
    from lemo.errors import ConfigError
    from lemo.train.survey import KNOWN_CHATS, survey_data

    found = survey_data(data, tokenizer, text_field)
    if not validation:
        return found, partial(_longest_place, data, found)
    held = survey_data(validation, tokenizer, text_field)
    if held.kind != found.kind and not {held.kind, found.kind} <= {"text", "tokens"}:
        raise ConfigError(
            f"--validation: {validation[0]} holds {KINDS[held.kind]}, the training data {KINDS[found.kind]}; both must "
            "be of one kind"
        )
    fields = {facts.field for facts in (found, held)} - {None}
    if len(fields) > 1 and not fields <= set(KNOWN_CHATS):
        raise ConfigError(
            f"--validation: rows of {validation[0]} keep their text in {held.field!r}, training rows in "
            f"{found.field!r}; both need the same key"
        )
    longest, files = max(((found, data), (held, validation)), key=lambda pair: pair[0].longest_tokens)
    facts = replace(found, longest_tokens=longest.longest_tokens, field=found.field or held.field)
    return facts, partial(_longest_place, files, longest)


def _longest_place(files: list[str], found: DataFacts) -> str:
    """File and row of the document with most text."""
    from itertools import islice

    from lemo.train.sources import read_documents

    fields = {"messages_field" if found.kind == "messages" else "text_field": found.field} if found.field else {}
    number = max(range(len(found.lengths)), key=found.lengths.__getitem__)
    return next(islice(read_documents(files, **fields), number, None)).place
