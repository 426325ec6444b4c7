"""`lemo eval`."""

from __future__ import annotations

import json
import math
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

from lemo.cli.arguments import AdapterOption, Overrides, PlanOption, Source

_PICTURES = (".html", ".png")
_SAME = "the plan changes nothing in forward at this length"


def evaluate(
    source: Source,
    overrides: Overrides = None,
    adapter: AdapterOption = None,
    plan: PlanOption = None,
    bins: Annotated[
        int, typer.Option("--bins", min=1, max=64, help="Position bins over a window, or depths of facts.")
    ] = 8,
    output: Annotated[
        list[Path] | None,
        typer.Option("--output", help="File for the figures, JSON; with --retrieval also .html or .png; repeatable."),
    ] = None,
    retrieval: Annotated[
        str | None,
        typer.Option(
            "--retrieval", help="Ask for buried facts instead: TASK[:PROMPTS],... such as passkey:64,two_hop."
        ),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="Tokens of prompts: 4096,8192. A recipe's own window otherwise.")
    ] = None,
) -> None:
    """Measure validation loss, dense and (with a plan) sparse, in all and by position; or retrieval.

    The sparse loss is look-ahead, because selection sees later tokens, and counts drawn loss rows only, because rows
    that carry loss never skip; the dense loss of the same rows stands beside it.

    With --retrieval, facts are buried in meaningless text and asked for at the end: passkey, needle (a named number),
    multi_key, multi_value, two_hop, variable_tracking; 32 prompts of each length unless a number follows the task. The
    source may be a model's folder then, and prompts follow from training.seed.
    """
    from lemo.cli.arguments import check_writable
    from lemo.errors import ConfigError

    outputs = output or []
    if taken := [path for path in outputs if path.exists()]:
        raise ConfigError(f"--output: {taken[0]} exists already")
    check_writable(outputs)
    if retrieval is None:
        if lengths is not None:
            raise ConfigError("--lengths is for --retrieval; a loss is measured at data.window_tokens")
        if wrong := [path for path in outputs if path.suffix in _PICTURES]:
            raise ConfigError(f"--output: {wrong[0]}: only --retrieval draws pictures; name a .json file")
        loaded = load_wanted(source, overrides, adapter, plan, bare=False)
        reports = _losses(loaded, bins, source, overrides or [])
        _show(reports)
    else:
        loaded = load_wanted(source, overrides, adapter, plan, bare=True)
        reports = _retrieval(loaded, retrieval, lengths, bins)
        _show_retrieval(reports)
    for path in outputs:
        _write(reports, path, f"Retrieval, {source}")


def load_wanted(
    source: Path, overrides: list[str] | None, adapter: Path | None, plan: Path | None, *, bare: bool
) -> Any:
    """A recipe or a run; where `bare` allows it also a model's folder, or `package:NAME`, by itself."""
    from lemo.cli.arguments import Loaded, load_source
    from lemo.cli.recipe import build_run, override_values
    from lemo.train.model import PACKAGE, find_gguf

    is_model = str(source).startswith(PACKAGE) or (
        source.is_dir() and not (source / "recipe.yaml").is_file() and _holds_model(source)
    )
    if not bare or not is_model:
        return load_source(source, overrides, adapter, plan)
    values: dict[str, Any] = {"model": {"path": str(source)}}
    if (gguf := find_gguf(str(source))) is not None:
        values["model"]["gguf_file"] = gguf
    sources = override_values(values, overrides or [])
    return Loaded(build_run(values, str(source), sources), adapter, plan)


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or any(folder.glob("*.gguf"))


def _write(reports: dict[str, Any], path: Path, title: str) -> None:
    """The figures as JSON, page or picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        from lemo.report.retrieval_page import plot_retrieval

        plot_retrieval(reports, path)
    elif path.suffix == ".html":
        from lemo.report.retrieval_page import retrieval_page

        path.write_text(retrieval_page(reports, title), encoding="utf-8")
    else:
        values = {name: report.to_dict() for name, report in reports.items()}
        path.write_text(json.dumps(_without_nan(values), indent=1) + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:
    """The figures with null for the mean of nothing: JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _retrieval(loaded: Any, wanted: str, lengths: str | None, depths: int) -> dict[str, Any]:
    """Reports of retrieval by name."""
    from dataclasses import replace

    from lemo.cli.arguments import load_parts
    from lemo.core.plan import Plan
    from lemo.eval.retrieval import check_prompts, evaluate_retrieval, parse_lengths, parse_tasks
    from lemo.runtime.attach import attach
    from lemo.train.model import extend_context, load_settings, load_tokenizer

    run = loaded.run
    tasks, settings = parse_tasks(wanted), load_settings(run.model)  # mistakes are found before weights are read
    check_prompts(tasks, depths)
    extend_context(settings, run.model)
    context = getattr(settings.get_text_config(), "max_position_embeddings", None)
    asked = parse_lengths(lengths or str(run.data.window_tokens), context)
    tokenizer = load_tokenizer(run.model)
    loaded = replace(loaded, run=replace(run, data=replace(run.data, window_tokens=asked[-1])))
    model, _ = load_parts(loaded, [])

    def measure(sparse: Any = None) -> Any:
        mode = "dense" if sparse is None else "sparse"
        return evaluate_retrieval(
            model,
            tokenizer,
            tasks,
            asked,
            seed=run.training.seed,
            depths=depths,
            sparse=sparse,
            progress=lambda task, length: typer.echo(f"{mode}: {task}, {length:,} tokens", err=True),
        )

    reports = {"dense": measure()}
    if loaded.plan is not None:
        plan = Plan.load(loaded.plan)
        if _changes_forward(plan, asked[-1]):
            with attach(model, plan) as handle:
                reports["sparse (look-ahead)"] = measure(handle)
        else:
            typer.echo(f"{_SAME}, so its answers are the dense ones", err=True)
    return reports


def _changes_forward(plan: Any, tokens: int) -> bool:
    """Whether, in samples of up to so many tokens, rows skip layers in forward or do not see all rows before them."""
    exact = any(layer.is_exact for layer in plan.layers)
    # In its own chunk and the one before a row sees everything.
    windowed = plan.context_window is not None and tokens > 2 * plan.context_window
    return any(layer.forward_ratio < 1 for layer in plan.layers) or (exact and windowed)


def _show_retrieval(reports: dict[str, Any]) -> None:
    """A line per report, task and length; a column per depth."""
    from rich.console import Console
    from rich.table import Table

    depths = next(iter(reports.values())).depths
    table = Table("forward", "task", "tokens", "right", *(f"{depth:.0%}" for depth in depths))
    for name, report in reports.items():
        for (task, length), cells in report.rows.items():
            right = [r for cell in cells for r in cell.right]
            shares = [f"{cell.accuracy:.0%}" for cell in cells]
            table.add_row(name, task, f"{length:,}", f"{sum(right) / len(right):.0%} of {len(right)}", *shares)
    Console(width=None if Console().is_terminal else 80 + 8 * len(depths)).print(table)


def _losses(loaded: Any, bins: int, source: Path, overrides: list[str]) -> dict[str, Any]:
    """Reports of validation loss by name; of a run on the data, and with chat templates of the day, that it began with.

    Raises:
        ConfigError: the run's validation data has changed since, and no key of `data` says that other data is meant.
    """
    from lemo.cli.arguments import load_parts
    from lemo.train.chat import chat_date, dated
    from lemo.train.data import load_windows

    begun = _read_run(source)
    model, tokenizer = load_parts(loaded, loaded.run.data.validation_sources)
    vocabulary = model.config.get_text_config().vocab_size
    with dated(date.fromisoformat(begun["date"]) if "date" in begun else chat_date()):
        dataset, report = load_windows(loaded.run.data, tokenizer, "validation", vocabulary=vocabulary)
        if not any(override.startswith("data.") for override in overrides):
            _check_data((begun.get("data") or {}).get("validation"), dataset, source)
        for line in report.lines():
            typer.echo(line, err=True)
        return _measure(loaded, model, tokenizer, dataset, bins)


def _read_run(source: Path) -> dict[str, Any]:
    """What a run noted in its folder when it began; nothing where the source is no such folder."""
    from lemo.errors import ConfigError
    from lemo.train.checkpoint import RUN_FILE

    path = source / RUN_FILE
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from error


def _check_data(stored: dict[str, Any] | None, dataset: Any, source: Path) -> None:
    """Raises ConfigError where a run had other validation data than there is now; a run without any had none."""
    from lemo.errors import ConfigError
    from lemo.train.checkpoint import data_fingerprint, describe_fingerprint

    if stored is None or (found := data_fingerprint(dataset.windows)) == stored:
        return
    had, has = describe_fingerprint(stored), describe_fingerprint(found)
    raise ConfigError(
        f"the validation data of the run in {source} has changed since it began: it had {had} and has {has}. Bring the "
        "files back as they were, or name what to evaluate on, by data.validation=[FILE]"
    )


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
        if not _changes_forward(plan, max(len(window.tokens_T) for window in dataset.windows)):
            typer.echo(f"{_SAME}, so its loss is the dense one", err=True)
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
        parts = [f"{part.nats:.3f}" if part.tokens else "-" for part in report.by_position]
        table.add_row(name, f"{report.nats:.4f}", f"{report.perplexity:.2f}", f"{report.tokens:,}", *parts)
    Console(width=None if Console().is_terminal else 60 + 12 * len(first.by_position)).print(table)
