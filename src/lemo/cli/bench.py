"""`lemo bench`."""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

_DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass
class Variant:
    """One way to train that is timed.

    Attributes:
        name: shown in the table.
        plan: attached; None for the plain model.
        recompute: whether layers are recomputed in backward.
        engine: of lemo.
        seconds: of each timed step.
        peaks_gib: of each turn, on a GPU; on a CPU variants of one process cannot be told apart.
        problem: why there are no numbers.
        share: of rows that ran a layer forward, mean over layers.
    """

    name: str
    plan: Any = None
    recompute: bool = False
    engine: str = "auto"
    seconds: list[float] = field(default_factory=list)
    peaks_gib: list[float] = field(default_factory=list)
    problem: str = ""
    share: float = 1.0


def bench(
    source: Annotated[
        str, typer.Argument(help="A recipe, a folder with a config.json, or a shape: llama2-7b, llama3-8b, ...")
    ],
    tokens: Annotated[int | None, typer.Option("--tokens", min=64, help="Length. A recipe's own, else 8192.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps of each variant.")] = 6,
    keep: Annotated[list[float] | None, typer.Option("--keep", help="Shares of rows to run. 0.5 and 0.3.")] = None,
    kv: Annotated[str | None, typer.Option("--kv", help="kept or all. A recipe's own, else kept.")] = None,
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Only so many layers of the model.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="bfloat16 on a GPU, else float32.")] = None,
    loss_share: Annotated[float, typer.Option("--loss-share", help="Share of blocks that carry loss.")] = 0.3,
) -> None:
    """Time training steps on this machine: dense, with recomputation, and with rows that skip forward and backward.

    Needs no weights. No preset skips rows in forward: `lemo estimate RECIPE --probe` runs a step of a recipe.
    """
    import torch

    from lemo.cli.arguments import quieten
    from lemo.errors import ConfigError

    quieten()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, tokens, kv, block = _read_source(source, tokens, kv)
    name = dtype or ("bfloat16" if device == "cuda" else "float32")
    if name not in _DTYPES:
        raise ConfigError(f"--dtype {name}: training computes in one of {', '.join(_DTYPES)}")
    kind = getattr(torch, name)
    runner = Runner(shape, tokens, layers, kind, device, loss_share, block)
    variants = _variants(runner.config, keep or [0.5, 0.3], kv, block)
    runner.run(variants, steps)
    _show(variants, f"{Path(shape).name}, {tokens} tokens, {device}, {str(kind).removeprefix('torch.')}", loss_share)


def _read_source(source: str, tokens: int | None, kv: str | None) -> tuple[str, int, str, int]:
    """Shape or folder, tokens, kv and block size, from the recipe where the source is one."""
    from lemo.train.rehearsal import SHAPES

    if source in SHAPES or Path(source).is_dir() or not source.endswith((".yaml", ".yml")):
        return source, tokens or 8192, kv or "kept", 64
    from lemo.cli.recipe import load_recipe
    from lemo.errors import ConfigError

    run = load_recipe(Path(source), ())
    if not (Path(run.model.path).expanduser() / "config.json").is_file():
        raise ConfigError(
            f"{source}: model.path ({run.model.path}) is no folder with a config.json; name a shape instead"
        )
    folder = str(Path(run.model.path).expanduser())
    return folder, tokens or run.data.window_tokens, kv or run.sparsity.kv, run.sparsity.block_size


def _variants(config: Any, keeps: list[float], kv: str, block: int) -> list[Variant]:
    """Dense twice, then each share that leaves a layer rows to skip."""
    from lemo.train.rehearsal import random_plan

    found = [Variant("dense"), Variant("dense, layers recomputed", recompute=True)]
    for keep in keeps:
        plan = random_plan(config, forward_ratio=keep, backward_ratio=keep, kv=kv, block_size=block)
        if all(layer.is_dense for layer in plan.layers):
            why = "every row is kept" if keep == 1 else "the first and last layer run densely, and there is no other"
            typer.echo(f"note: no row of the table for keep {keep:g}: {why}", err=True)
            continue
        found.append(Variant(f"lemo, keep {keep:g}, kv {kv}", plan))
        found.append(Variant(f"lemo, keep {keep:g}, kv {kv}, recomputed", plan, recompute=True))
    return found


class Runner:
    """One random model with an adapter, trained in each variant in turn."""

    def __init__(
        self, shape: str, tokens: int, layers: int | None, dtype: Any, device: str, loss_share: float, block: int
    ) -> None:
        """Draws model, adapter and batch."""
        import torch

        from lemo.config import LoraConfig
        from lemo.train.lora import add_adapter
        from lemo.train.rehearsal import random_batch, random_model, shape_config

        self.device = device
        self.config = shape_config(shape, tokens=tokens, layers=layers)
        model = random_model(self.config, dtype=dtype, device=device)
        self.model = add_adapter(model, LoraConfig(rank=8, alpha=16))
        self.model.enable_input_require_grads()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device == "cuda")
        vocabulary = self.config.get_text_config().vocab_size
        batch = random_batch(vocabulary, tokens, share=loss_share, seed=0, block_size=block)
        self.batch = {name: value.to(device) for name, value in batch.items()}

    def run(self, variants: list[Variant], steps: int) -> None:
        """Two turns of each variant; in each a step that is not timed, then half of the steps."""
        for turn in range(2):
            for variant in variants:
                count = (steps + 1 - turn) // 2
                if count and not variant.problem:
                    self._turn(variant, count)

    def _turn(self, variant: Variant, steps: int) -> None:
        import torch

        from lemo.errors import LemoError
        from lemo.measure.memory import track_peak
        from lemo.measure.profile import StepTimer

        timer = StepTimer(self.device)
        try:
            with self._as(variant) as describe:
                self._step()
                with track_peak(self.device) as peak:
                    for _ in range(steps):
                        with timer.step():
                            self._step()
                variant.share = describe()
                variant.seconds += timer.seconds
                if self.device == "cuda":
                    variant.peaks_gib.append(peak.peak_gib)
        except torch.OutOfMemoryError:
            variant.problem = "out of memory"
        except LemoError as error:
            variant.problem = str(error)
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _step(self) -> None:
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def _as(self, variant: Variant) -> Iterator[Callable[[], float]]:
        """The model in one variant; yields what gives the mean share of rows per layer."""
        from lemo.runtime.attach import attach

        if variant.recompute:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            if variant.plan is None:
                yield lambda: 1.0
                return
            with attach(self.model, variant.plan, engine=variant.engine, self_test=False) as handle:
                yield lambda: statistics.fmean(share for share, _ in handle.ratios().values() or [(1.0, 1.0)])
        finally:
            self.model.gradient_checkpointing_disable()


def _show(variants: list[Variant], title: str, loss_share: float) -> None:
    """The table; ratios are against the fastest dense variant that ran."""
    from rich.console import Console
    from rich.table import Table

    dense = [statistics.median(v.seconds) for v in variants if v.plan is None and v.seconds and not v.problem]
    best = min(dense, default=None)
    table = Table("", "ms a step", "peak GiB", "rows run", "speed-up", title=title, box=None, title_justify="left")
    for variant in variants:
        if variant.problem or not variant.seconds:
            table.add_row(variant.name, variant.problem or "not run", "", "", "")
            continue
        step = statistics.median(variant.seconds)
        gain = "" if best is None else f"{best / step:.2f}x"
        peak = f"{max(variant.peaks_gib):.2f}" if variant.peaks_gib else "–"
        table.add_row(variant.name, f"{step * 1e3:.1f}", peak, f"{variant.share:.0%}", gain)
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    console.print(
        f"Random weights and tokens, LoRA on all linear layers, {loss_share:.0%} of the blocks carry loss. Speed-up is "
        "over the fastest dense variant that ran. What skipping costs in quality, `lemo train` and `lemo eval` say."
    )
