"""`lemo report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of runs.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="HTML page to write.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option("--title", help="Of the page.")] = None,
) -> None:
    """Write one HTML page about one or several runs: losses, speed, memory, rows by layer, and how they differ.

    The page needs nothing beside it. A run that is still going or was stopped counts as far as it came.
    """
    from lemo.cli.arguments import check_writable
    from lemo.cli.recipe import parse_yaml
    from lemo.errors import ConfigError
    from lemo.report.run_page import read_run, run_page

    found = []
    for folder, name in zip(runs, name_runs(runs), strict=True):
        recipe = folder / "recipe.yaml"
        if not recipe.is_file():
            raise ConfigError(f"{folder} is no output folder of a run: it holds no recipe.yaml")
        found.append(read_run(folder, parse_yaml(recipe.read_text(encoding="utf-8"), str(recipe)) or {}, name))
    check_writable([out])
    out.write_text(run_page(found, title), encoding="utf-8")
    typer.echo(f"report: {out}")


def name_runs(folders: Sequence[Path]) -> list[str]:
    """Names of folders: the last parts of their paths, as many as tell them apart."""
    paths = [folder.resolve().parts[1:] for folder in folders]
    depth = 1
    while depth < max(map(len, paths)) and len({path[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    return ["/".join(path[-depth:]) for path in paths]
