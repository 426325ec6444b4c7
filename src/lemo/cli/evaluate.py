"""`lemo eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lemo.cli.arguments import AdapterOption, Overrides, PlanOption, Source


def evaluate(
    source: Source,
    overrides: Overrides = None,
    adapter: AdapterOption = None,
    plan: PlanOption = None,
    bins: Annotated[int, typer.Option("--bins", min=1, help="Position bins over a window.")] = 8,
    output: Annotated[Path | None, typer.Option("--output", help="JSON file for the figures.")] = None,
) -> None:
    """Measure validation loss, dense and (with a plan) sparse, in all and by position.

    The sparse loss is look-ahead, because selection sees later tokens, and counts drawn loss rows only, because rows
    that carry loss never skip; the dense loss of the same rows stands beside it.
    """
    from lemo.cli.arguments import load_parts, load_source

    loaded = load_source(source, overrides, adapter, plan)
    if output is not None and output.exists():
        from lemo.errors import ConfigError

        raise ConfigError(f"--output: {output} exists already")
    from lemo.train.data import load_windows

    model, tokenizer = load_parts(loaded, loaded.run.data.validation_sources)
    vocabulary = model.config.get_text_config().vocab_size
    dataset, report = load_windows(loaded.run.data, tokenizer, "validation", vocabulary=vocabulary)
    for line in report.lines():
        typer.echo(line, err=True)
    reports = _measure(loaded, model, tokenizer, dataset, bins)
    _show(reports)
    if output is not None:
        output.write_text(json.dumps({k: r.to_dict() for k, r in reports.items()}, indent=1) + "\n", encoding="utf-8")


def _measure(loaded: Any, model: Any, tokenizer: Any, dataset: Any, bins: int) -> dict[str, Any]:
    """Reports by name."""
    from dataclasses import replace

    from lemo.core.plan import Plan
    from lemo.eval.perplexity import evaluate_loss
    from lemo.runtime.attach import attach
    from lemo.train.planning import validation_batches

    run = loaded.run
    batches = validation_batches(run, tokenizer, dataset)
    reports = {"dense": evaluate_loss(model, batches, bins=bins)}
    if loaded.plan is None:
        return reports
    plan = Plan.load(loaded.plan)
    run = replace(run, sparsity=replace(run.sparsity, block_size=plan.block_size))
    with attach(model, plan) as handle:
        if not any(layer.forward_ratio < 1 for layer in plan.layers):
            typer.echo("the plan skips no rows in forward, so its loss is the dense one", err=True)
            return reports
        drawn = validation_batches(run, tokenizer, dataset, loss_rows=True, model=model)
        reports["dense, loss rows"] = evaluate_loss(model, drawn, handle=handle, bins=bins)
        name = "sparse (look-ahead), loss rows"
        reports[name] = evaluate_loss(model, drawn, handle=handle, sparse=True, bins=bins)
    return reports


def _show(reports: dict[str, Any]) -> None:
    """A table on the terminal: one line per report, one column per position bin."""
    from rich.console import Console
    from rich.table import Table

    first = next(iter(reports.values()))
    table = Table("forward", "nats", "perplexity", "tokens", *(f"{p.start}-{p.end}" for p in first.by_position))
    for name, report in reports.items():
        parts = [f"{part.nats:.3f}" for part in report.by_position]
        table.add_row(name, f"{report.nats:.4f}", f"{report.perplexity:.2f}", f"{report.tokens:,}", *parts)
    Console(width=None if Console().is_terminal else 60 + 12 * len(first.by_position)).print(table)
