"""Arguments that several verbs share, and what they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lemo.errors import ConfigError

if TYPE_CHECKING:
    from lemo.config import RunConfig

Recipe = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
Source = Annotated[Path, typer.Argument(help="A recipe, or the output folder of a run.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Values that replace the recipe's: training.learning_rate=1e-4 ...", show_default=False),
]
AdapterOption = Annotated[
    Path | None,
    typer.Option("--adapter", help="Folder of an adapter. A run's own, or a recipe's lora.adapter, by default."),
]
PlanOption = Annotated[Path | None, typer.Option("--plan", help="Folder of a plan. A run's own by default.")]


@dataclass(frozen=True)
class Loaded:
    """What a recipe or a run's folder names.

    Attributes:
        run: the recipe.
        adapter: folder of the adapter, or None; of a recipe, that which training would go on from.
        plan: folder of the plan, or None.
    """

    run: RunConfig
    adapter: Path | None
    plan: Path | None


def load_source(
    source: Path, overrides: list[str] | None, adapter: Path | None, plan: Path | None, *, weights: bool = True
) -> Loaded:
    """Reads a recipe, or the resolved recipe in a run's folder with the adapter and plan beside it.

    Args:
        source: a recipe or a folder.
        overrides: values that replace the recipe's.
        adapter: folder of an adapter that is taken instead of the run's own.
        plan: folder of a plan that is taken instead.
        weights: whether an adapter is needed, where there has been a run.

    Raises:
        ConfigError: the folder holds no run or one that is not finished, or the recipe is wrong.
    """
    from lemo.cli.recipe import load_recipe

    if not source.is_dir():
        run = load_recipe(source, overrides or ())
        named = run.sparsity.plan if run.sparsity.enabled else None
        return Loaded(run, adapter or start_of(run), plan or (Path(named) if named else None))
    recipe = source / "recipe.yaml"
    if not recipe.is_file():
        raise ConfigError(f"{source} is no output folder of a run: it holds no recipe.yaml")
    own_adapter, own_plan = source / "adapter", source / "plan"
    # `lemo calibrate` writes recipe and plan too: no run has begun there, and the plan is of the model before training.
    begun = any((source / name).exists() for name in ("run.json", "checkpoints"))
    run = load_recipe(recipe, overrides or (), begun=begun)
    if weights and begun and adapter is None and not own_adapter.is_dir():
        newest = newest_checkpoint(source)
        hint = "wait for a checkpoint" if newest is None else f"name its newest checkpoint with --adapter {newest}"
        raise ConfigError(f"{say_unfinished(source)}; {hint}, or {recipe} as the source for the model before training")
    return Loaded(
        run,
        adapter or (own_adapter if own_adapter.is_dir() else None if begun else start_of(run)),
        plan or (own_plan if own_plan.is_dir() else None),
    )


def start_of(run: RunConfig) -> Path | None:
    """Folder of the adapter that training would go on from, or None."""
    from lemo.train.start_adapter import adapter_folder

    return None if run.lora.adapter is None else adapter_folder(run.lora)


def say_unfinished(folder: Path) -> str:
    """What is the matter with a run's folder that has no adapter."""
    return f"{folder} holds no adapter: the run in it is not finished"


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that holds an adapter."""
    found = [
        (int(path.name.rpartition("-")[2]), path)
        for path in (folder / "checkpoints").glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdecimal()
        and (path / "adapter_config.json").is_file()
        and any(path.glob("adapter_model.*"))
    ]
    return max(found)[1] if found else None


def load_parts(loaded: Loaded, paths: Sequence[str]) -> tuple[Any, Any]:
    """Model (with adapter) and the tokenizer for the data in `paths`; None when all of it is pre-tokenised."""
    from lemo.train.lora import load_adapter
    from lemo.train.model import load_model, load_tokenizer
    from lemo.train.sources import needs_tokenizer

    quieten()
    tokenizer = load_tokenizer(loaded.run.model) if paths and needs_tokenizer(paths) else None
    model = load_model(loaded.run.model, window_tokens=loaded.run.data.window_tokens)
    if loaded.adapter is not None:
        model = load_adapter(model, loaded.adapter)
    return model, tokenizer


def quieten() -> None:
    """Turns off loading bars of Transformers, and what other libraries say of each other and of kernels they lack."""
    import logging
    import warnings

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # before the import that would be heard
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|accelerate")


def check_writable(paths: Sequence[Path]) -> None:
    """Finds out before the work whether its results can be written; folders above them are made.

    Raises:
        OSError: one cannot be; what was there stays as it is.
    """
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        path.open("ab").close()
        if not there:
            path.unlink()


def check_device(name: str | None) -> str | None:
    """The device of an option --device.

    Raises:
        ConfigError: there is none of that name, or this torch or machine lacks it.
    """
    import torch

    if name is None:
        return None
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
            built = torch.version.cuda is None
            reason = "this torch was built without CUDA" if built else "torch sees no CUDA device"
        raise ConfigError(f"--device {name}: {reason}") from error
    if torch.device(name).type == "meta":
        raise ConfigError("--device meta: it holds no numbers to compute with")
    return name
