"""`lemo merge`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer


def merge(
    source: Annotated[Path, typer.Argument(help="Output folder of a run, or of an adapter.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder for the merged model.", show_default=False)],
    base: Annotated[str | None, typer.Option("--base", help="Base model, when the adapter's own has moved.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of the merged model. The run's, or the base model's, by default.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="Where to compute; a GPU if there is one.")] = None,
) -> None:
    """Merge an adapter into its base model, check the result against the adapter model, and save it.

    The folder loads with plain Transformers and everything that reads its format. Nothing is left behind when the
    merged model's logits are further from the adapter model's than rounding explains.
    """
    from lemo.cli.arguments import check_device, check_writable, quieten
    from lemo.errors import ConfigError
    from lemo.train.merge import DTYPES, merge_adapter

    if out.exists():
        raise ConfigError(f"--out: {out} exists already")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: a model is written in one of {', '.join(DTYPES)}")
    check_device(device)
    quieten()
    run, adapter = _find(source, base)
    model = run.model if dtype is None else replace(run.model, dtype=dtype)  # type: ignore[arg-type]
    check_writable([out])
    samples, name = _find_samples(run)
    options: dict[str, Any] = {"samples": samples, "sample_name": name, "device": device}
    report = merge_adapter(model, adapter, out, **options, progress=partial(typer.echo, err=True))
    for line in report.lines():
        typer.echo(line)
    if report.base_dtype not in (None, report.dtype):
        origin = "the run's dtype" if dtype is None else "as asked for"
        typer.echo(f"written in {report.dtype}, {origin}; the base model is in {report.base_dtype}")
    typer.echo(f"merged model: {report.output}")


def _find_samples(run: Any) -> tuple[Any, str]:
    """What to compare the models on, and what that is: a run's validation text where it can be read."""
    from lemo.errors import ConfigError, DataError, first_line
    from lemo.train.merge import read_samples
    from lemo.train.model import load_tokenizer

    drawn = "tokens drawn at random"
    if not run.data.validation_sources:
        return None, drawn
    typer.echo("reading the run's validation data", err=True)
    try:
        return read_samples(run, load_tokenizer(run.model)), "validation text"
    except (ConfigError, DataError) as error:
        return None, f"{drawn}, since the run's validation data cannot be read: {first_line(error)}"


def _find(source: Path, base: str | None) -> tuple[Any, Path]:
    """The run with its base model, and the adapter's folder."""
    from lemo.cli.arguments import load_source, newest_checkpoint, say_unfinished
    from lemo.config import RunConfig
    from lemo.errors import ConfigError
    from lemo.train.lora import read_base_path
    from lemo.train.merge import base_config

    is_run = (source / "recipe.yaml").is_file()
    named = None if is_run else read_base_path(source)
    folder = source if is_run else source.absolute().parent
    if not is_run and folder.name == "checkpoints":
        folder = folder.parent
    if (folder / "recipe.yaml").is_file():  # it knows how the context was extended, also of the adapter inside a run
        loaded = load_source(folder, None, None if is_run else source, None, weights=False)
        adapter = loaded.adapter
        if adapter is None:
            newest = newest_checkpoint(folder)
            hint = "it has no checkpoint yet" if newest is None else f"its newest checkpoint is {newest}: merge that"
            raise ConfigError(f"{say_unfinished(folder)}; {hint}")
        run = loaded.run
        return (run if base is None else replace(run, model=replace(run.model, path=base))), adapter
    if not (base or named):
        raise ConfigError(f"{source} does not name its base model; name it with --base")
    return RunConfig(model=base_config(base or named or "")), source
