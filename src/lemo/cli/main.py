"""The `lemo` command. Verbs import torch and transformers when they run, so that `lemo --help` is immediate."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import lemo
from lemo.cli import bench, calibrate, doctor, estimate, evaluate, init, inspect, merge, report, schema, train
from lemo.cli.failures import explain_failure
from lemo.errors import LemoError


class ErrorGroup(TyperGroup):
    """Turns every LemoError into its message on standard error and exit code 2.

    Errors of files and of memory become one line too, and exit code 1.
    """

    def invoke(self, ctx: Any) -> Any:
        """Runs a verb."""
        try:
            return super().invoke(ctx)
        except LemoError as error:
            if ctx.params.get("debug"):
                raise
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)
            raise typer.Exit(2) from error
        except Exception as error:
            line = None if ctx.params.get("debug") else explain_failure(error)
            if isinstance(error, EOFError) and line is None:  # of which Click would say no more than "Aborted!"
                raise RuntimeError("a file ends too early") from error
            if line is None:
                raise
            print(f"error: {line}", file=sys.stderr)
            raise typer.Exit(1) from error


app = typer.Typer(
    name="lemo",
    cls=ErrorGroup,
    help="Fine-tune softmax-attention decoders on long contexts while involving fewer tokens in each layer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        print(lemo.__version__)
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of all verbs."""
    # Progress bars of the libraries underneath drown the lines that matter; errors still come through.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


app.command("init")(init.init)
app.command("schema")(schema.schema)
app.command("estimate")(estimate.estimate)
app.command("train")(train.train)
app.command("calibrate")(calibrate.calibrate)
app.command("eval")(evaluate.evaluate)
app.command("inspect")(inspect.inspect)
app.command("report")(report.report)
app.command("merge")(merge.merge)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Entry point."""
    app()
