"""The public surface as data. Regenerate the stored one with `python -m tests.architecture.snapshot`."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

NAMES_FILE = Path(__file__).parent / "public_names.json"
FLAGS_FILE = Path(__file__).parent / "cli_flags.json"


def public_names() -> dict[str, Any]:
    """Every name in `lemo.__all__` with its parameters; for classes also the public members."""
    import lemo

    return {name: _describe(getattr(lemo, name)) for name in lemo.__all__}


def _describe(thing: Any) -> Any:
    if inspect.ismodule(thing):
        return _parameters(type(thing).__call__)
    if inspect.isclass(thing):
        members = [n for n in vars(thing) if not n.startswith("_")]
        fields = [f.name for f in dataclasses.fields(thing)] if dataclasses.is_dataclass(thing) else []
        return {"bases": [b.__name__ for b in thing.__bases__], "members": sorted({*members, *fields})}
    return _parameters(thing)


def _parameters(function: Any) -> list[str]:
    named = inspect.signature(function).parameters.values()
    return [_parameter(p) for p in named if p.name != "self"]


def _parameter(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return parameter.name
    return f"{parameter.name}={parameter.default!r}"


def cli_flags() -> dict[str, list[str]]:
    """Arguments and options of every verb."""
    import typer

    from lemo.cli.main import app

    root: Any = typer.main.get_command(app)
    verbs = {"lemo": root, **{f"lemo {name}": command for name, command in root.commands.items()}}
    return {name: sorted(opt for p in command.params for opt in p.opts) for name, command in sorted(verbs.items())}


def write() -> None:
    """Stores the surface of today."""
    for path, content in ((NAMES_FILE, public_names()), (FLAGS_FILE, cli_flags())):
        path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    write()
