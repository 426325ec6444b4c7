"""`lemo train`."""

from __future__ import annotations

import os
import shlex
from typing import Annotated

import typer

from lemo.cli.arguments import Overrides, Recipe


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take up the last checkpoint in the output folder.")] = False,
    resume_if_possible: Annotated[
        bool, typer.Option("--resume-if-possible", help="The same, or begin where there is none, as requeued jobs do.")
    ] = False,
) -> None:
    """Fine-tune a model as a recipe says.

    Ctrl-C saves a full checkpoint and stops; once more aborts. Touching the file save-now in the output folder saves
    one and goes on.
    """
    from lemo.cli.arguments import quieten
    from lemo.cli.recipe import dump_recipe, load_recipe

    run = load_recipe(recipe, overrides or ())
    quieten()
    from lemo.eval.perplexity import evaluate_loss
    from lemo.train.checkpoint import FinishedRunError
    from lemo.train.run import train as run_training

    how = resume or ("if possible" if resume_if_possible else False)
    speaks = os.environ.get("RANK", "0") == "0"  # of several processes, the first
    try:
        result = run_training(run, evaluate_loss, resume=how, recipe=dump_recipe(run))
    except FinishedRunError:
        if not resume_if_possible:
            raise
        # A job that was queued once more has nothing left to do, which is no failure.
        if speaks:
            typer.echo(f"the run in {run.output} is finished; nothing is left to do", err=True)
        return
    for note in result.notes if speaks else ():
        typer.echo(f"note: {note}", err=True)
    if result.interrupted:
        if speaks:
            command = shlex.join(["lemo", "train", str(recipe), *(overrides or ()), "--resume"])
            typer.echo(f"stopped after step {result.steps}; go on with: {command}", err=True)
        raise typer.Exit(130)
    width = max((len(name) for name in result.losses), default=0)
    for name, nats in result.losses.items() if speaks else ():
        typer.echo(f"{name:<{width}}  {nats:.4f}")
