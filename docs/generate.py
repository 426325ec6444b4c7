"""Writes the reference pages from docstrings, configuration classes and the command line.

    python -m docs.generate

A test fails while docs/reference differs from what this makes.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

import lemo
from lemo.config import RunConfig

FOLDER = Path(__file__).parent / "reference"
MADE = "*Made by `python -m docs.generate`.*"
ERRORS = (
    "Errors are a line on standard error and exit code 2; of files that cannot be read or written and of memory that "
    "is full, exit code 1. `lemo --debug VERB ...` shows where."
)
_SECTION = re.compile(r"^\*?(Args|Attributes|Returns|Yields|Raises|Cost|Numerics|Source)\*?:(.*)$")
_QUOTED = re.compile(r"(: |-> )'([^']*)'")  # annotations are texts
_ENTRY = re.compile(r"^(\*{0,2}\w+): (.*)$")


def as_markdown(docstring: str | None) -> str:
    """A docstring in Google's style as paragraphs and lists."""
    lines = inspect.cleandoc(docstring or "").splitlines()
    parts: list[str] = []
    index = 0
    while index < len(lines):
        found = _SECTION.match(lines[index])
        if found is None:
            parts.append(_escape(lines[index]))
            index += 1
            continue
        index += 1
        body = [found[2].strip()] if found[2].strip() else []
        while index < len(lines) and (body_line := lines[index]) and _SECTION.match(body_line) is None:
            body.append(body_line)
            index += 1
        parts += ["", f"**{found[1]}**" + _section(inspect.cleandoc("\n".join(["", *body])).splitlines()), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).strip()


def _section(lines: list[str]) -> str:
    """Entries as a list, other text as it stands."""
    entries: list[str] = []
    for line in lines:
        found = _ENTRY.match(line)
        if found is not None:
            entries.append(f"- `{found[1]}`: {_escape(found[2])}")
        elif entries:
            entries[-1] += " " + _escape(line.strip())
        else:
            return ": " + _escape(" ".join(part.strip() for part in lines))
    return "\n\n" + "\n".join(entries)


def _escape(text: str) -> str:
    """Text in which nothing but code in back quotes has a meaning of its own."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([*_<\[\]|])", r"\\\1", p) for p in pieces)


def signature(target: Any, name: str) -> str:
    """A call, a line for each argument where one line is too long."""
    found = inspect.signature(target)
    kept = [p for p in found.parameters.values() if p.name not in ("self", "cls")]
    text = _plain(found.replace(parameters=kept))
    if len(name + text) <= 100:
        return name + text
    arguments = [_plain(p) for p in kept]
    stars = next((i for i, p in enumerate(kept) if p.kind is p.KEYWORD_ONLY), None)
    if stars is not None and not any(p.kind is p.VAR_POSITIONAL for p in kept):
        arguments.insert(stars, "*")
    answer = text[text.rindex(") ->") + 1 :] if ") ->" in text else ""
    return name + "(\n" + "".join(f"    {argument},\n" for argument in arguments) + f"){answer}"


def _plain(text: Any) -> str:
    return _QUOTED.sub(r"\1\2", str(text)).replace("<factory>", "...")


def describe(target: Any, name: str, depth: int) -> list[str]:
    """A function, or a class with its public methods."""
    lines = [f"{'#' * depth} {name}", ""]
    calls = inspect.isfunction(target) or (inspect.isclass(target) and not issubclass(target, Exception))
    if calls and not (inspect.isclass(target) and name == "Handle"):
        lines += ["```text", signature(target, name), "```", ""]
    lines += [as_markdown(target.__doc__), ""]
    if inspect.isclass(target):
        for key, value in vars(target).items():
            member = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            function = member.fget if isinstance(member, property) else member
            if key.startswith("_") or not inspect.isfunction(inspect.unwrap(function)) or not function.__doc__:
                continue
            shown = key if isinstance(member, property) else signature(function, key)
            lines += [f"{'#' * (depth + 1)} {name}.{key}", "", "```text", shown, "```", ""]
            lines += [as_markdown(function.__doc__), ""]
    return lines


def api_page() -> str:
    """Public names of the package, and the ops."""
    lines = ["# Python", "", MADE, "", "`import lemo` imports neither torch nor transformers and changes nothing.", ""]
    order = ["attach", "Handle", "Plan", "LayerPlan", "Selection", "calibrate", "LossRows", "LemoTrainer"]
    for name in [*order, *(n for n in lemo.__all__ if n not in order)]:
        target = getattr(lemo, name)
        if name == "calibrate":
            target = importlib.import_module("lemo.calibrate.session").calibrate
        lines += describe(target, name, 2)
    lines += ["## Ops", "", "`lemo.ops`: tensors in, tensors out. The reference of each is in its folder.", ""]
    ops = importlib.import_module("lemo.ops")
    for name in ops.__all__:
        lines += describe(getattr(ops, name), name, 3)
    return "\n".join(lines)


def recipe_page() -> str:
    """Every key of a recipe with its type, default and meaning."""
    from lemo.cli.recipe import dump_value
    from lemo.cli.schema import describe_fields

    lines = ["# Keys of a recipe", "", MADE, "", "What is not in a recipe has its default.", ""]
    hints = typing.get_type_hints(RunConfig)
    lines += ["`output`: folder that receives adapter, plan, metrics and the resolved recipe.", ""]
    for section, cls in hints.items():
        if not dataclasses.is_dataclass(cls):
            continue
        about = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        lines += [f"## {section}", "", _escape(about), ""]
        lines += ["| key | default | values | meaning |", "| --- | --- | --- | --- |"]
        meanings, types = describe_fields(cls), typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            value = dump_value(list(default) if isinstance(default, tuple) else default)
            meaning = _escape(meanings.get(field.name, ""))
            lines.append(f"| `{field.name}` | `{value}` | {_kind(types[field.name])} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def _kind(hint: Any) -> str:
    """A type as a reader of YAML names it."""
    from lemo.cli.recipe import _describe

    text = _describe(hint).removeprefix("one of ")
    return _escape(text)


def command_page() -> str:
    """Every verb with its arguments and options."""
    from lemo.cli.main import app

    group = typer.main.get_command(app)
    lines = ["# Command line", "", MADE, "", ERRORS, ""]
    for name in group.list_commands(typer.Context(group)):
        command = group.get_command(typer.Context(group), name)
        usage = " ".join(command.collect_usage_pieces(typer.Context(command, info_name=name)))
        lines += [f"## lemo {name}", "", "```text", f"lemo {name} {usage}", "```", "", as_markdown(command.help), ""]
        for parameter in command.params:
            help_text = _escape(getattr(parameter, "help", None) or "")
            if parameter.name == "help":
                continue
            shown = ", ".join(f"`{o}`" for o in parameter.opts) if parameter.param_type_name == "option" else ""
            default = parameter.default
            with_default = default not in (None, False, "", ()) and not callable(default)
            default = getattr(default, "value", default)
            tail = f" Default: `{default}`." if with_default else ""
            lines.append(f"- {shown or f'`{parameter.name}`'}: {help_text}{tail}")
        lines.append("")
    return "\n".join(lines)


PAGES: dict[str, Callable[[], str]] = {"api.md": api_page, "recipe.md": recipe_page, "command-line.md": command_page}


def main() -> None:
    """Writes all pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make().strip() + "\n", encoding="utf-8")
        print(FOLDER / name)


if __name__ == "__main__":
    main()
