"""`lemo calibrate`."""

from __future__ import annotations

from pathlib import Path

import typer

from lemo.cli.arguments import Overrides, Recipe


def calibrate(recipe: Recipe, overrides: Overrides = None) -> None:
    """Fit a plan: predictors, bypasses and thresholds for a recipe's model, ratios and data.

    Writes plan, report and resumable stages into the recipe's output folder. Use the plan with sparsity.plan=FOLDER.
    """
    from lemo.cli.recipe import dump_recipe, load_recipe
    from lemo.errors import ConfigError

    run = load_recipe(recipe, overrides or ())
    from lemo.train.planning import needs_calibration

    if run.sparsity.plan is not None:
        raise ConfigError(f"{recipe}: sparsity.plan names a plan already; remove the key to calibrate another")
    if not needs_calibration(run):
        raise ConfigError(
            f"{recipe}: nothing to calibrate: the recipe runs densely, or no predictor ranks blocks and every row runs "
            "forward or those that skip are left out of all layers"
        )
    if not run.output:
        raise ConfigError(f"{recipe}: output is empty: name the folder that receives the plan")
    folder = Path(run.output)
    if (folder / "run.json").exists():
        raise ConfigError(
            f"{recipe}: {folder} holds a run, whose plan and recipe would be overwritten; name another folder: "
            "output=FOLDER"
        )
    from lemo.cli.arguments import Loaded, load_parts, start_of
    from lemo.train.planning import make_plan

    model, tokenizer = load_parts(Loaded(run, start_of(run), None), run.data.train)
    make_plan(model, run, tokenizer, folder)
    (folder / "recipe.yaml").write_text(dump_recipe(run), encoding="utf-8")
    typer.echo(f"plan: {folder / 'plan'}")
    typer.echo(f"report: {folder / 'calibration-report.json'}")
    typer.echo(f"next: lemo train {recipe} sparsity.plan={folder / 'plan'} output=FOLDER")
