"""`lemo schema`."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer


def schema(
    output: Annotated[Path | None, typer.Option("--output", help="File to write; standard output otherwise.")] = None,
) -> None:
    """Print the JSON Schema of recipes, for editors that complete and check YAML."""
    text = json.dumps(recipe_schema(), indent=1) + "\n"
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of recipes with what the configuration says of each key: meaning and range."""
    from lemo.cli.recipe import json_schema
    from lemo.config import RunConfig
    from lemo.train.checks import RANGES

    made = json_schema()
    made["title"] = "lemo recipe"
    sections = {"": made, **{name: made["$defs"][cls.__name__] for name, cls in _sections(RunConfig).items()}}
    classes = {"": RunConfig, **_sections(RunConfig)}
    for name, section in sections.items():
        for key, text in describe_fields(classes[name]).items():
            section["properties"][key]["description"] = text
    for bounds, keys in RANGES:
        for key in keys:
            section, _, name = key.partition(".")
            found = sections[section]["properties"][name]
            # The range is the number's: null stays allowed where it is.
            for part in found.get("anyOf", [found]):
                if part.get("type") in ("integer", "number"):
                    part.update(bounds)
    return made


def _sections(cls: type) -> dict[str, type]:
    """Sections of a recipe by name."""
    return {name: hint for name, hint in get_type_hints(cls).items() if dataclasses.is_dataclass(hint)}


def describe_fields(cls: type) -> dict[str, str]:
    """Meaning of each field, from the `Attributes:` of a class's docstring."""
    _, _, attributes = (cls.__doc__ or "").partition("Attributes:")
    found = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", attributes, flags=re.M)
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: " ".join(text.split()) for name, text in found if name in names}
