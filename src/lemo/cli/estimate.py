"""`lemo estimate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lemo.cli.arguments import Overrides
from lemo.cli.init import PresetName

if TYPE_CHECKING:
    from lemo.config import RunConfig
    from lemo.measure.card import Card
    from lemo.measure.estimate import Change, Estimate
    from lemo.measure.step_memory import StepSetting
    from lemo.train.data_gain import DataGain, Looked
    from lemo.train.forecast import Forecast
    from lemo.train.run_time import RunTime

GIB, DEFAULT_CARD = 2**30, "h100"
_CARD_HELP = (
    "h200, a100-80gb, rtx-4090:24, ...; `probed` measures this machine's. By default this machine's, or where it has "
    f"none, {DEFAULT_CARD}."
)
# What `--fit` may change in a step, and the keys of a recipe that say it; a level is said by one key or another.
FREE_KEYS = {
    "segment_rows": "training.segment_rows",
    "offload": "training.offload",
    "kv": "sparsity.kv",
    "forward_ratio": "sparsity.forward_ratio",
    "backward_ratio": "sparsity.backward_ratio",
}


def estimate(
    source: Annotated[
        str, typer.Argument(help="A recipe, a model folder, a config.json or a known shape.", show_default=False)
    ],
    overrides: Overrides = None,
    card: Annotated[str | None, typer.Option("--card", help=_CARD_HELP)] = None,
    preset: Annotated[
        PresetName | None, typer.Option("--preset", help="Ratios of a model without recipe.", show_default="balanced")
    ] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Choose what fits the card and is fastest.")] = False,
    data: Annotated[
        bool, typer.Option("--data", help="Also count the data's steps, and say what they will gain.")
    ] = False,
    probe: Annotated[bool, typer.Option("--probe", help="Also run one step of full length on this machine.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how much memory and time a training step will need, from configuration files alone.

    No weights are read and no GPU is needed. Beside the peak by part it says the longest length that fits, what to
    change when it does not fit, and, where the number of steps is known, the time of the whole run.
    """
    import json

    from lemo.cli.arguments import quieten
    from lemo.errors import ConfigError
    from lemo.measure.card import here
    from lemo.measure.estimate import changes, fit_setting, gain, longest_tokens, make_estimate
    from lemo.train.data_gain import data_gain, look_at_data, with_data
    from lemo.train.forecast import forecast, probe_step
    from lemo.train.run_time import UNKNOWN, run_time

    quieten()
    run = read_source(source, overrides, preset)
    if data and not run.data.train:
        raise ConfigError("--data: data.train is empty; name a recipe that has data, or add data.train=[FILE]")
    chosen = choose_card(card)
    assumed = forecast(run)
    looked = look_at_data(run, assumed, _tokenizer(run)) if data else None
    gains = None if looked is None else data_gain(run, assumed, looked, chosen)
    found = assumed if gains is None else with_data(assumed, gains)
    now = make_estimate(found.sizes, found.setting, chosen)
    report: dict[str, Any] = {"model": run.model.path, "notes": list(found.notes), "estimate": now}
    assumes = card is None and here() is None
    if assumes and as_json:
        report["notes"].append(f"this machine has no CUDA device: the card is taken to be {chosen.name} (--card)")
    report["longest_tokens"] = longest_tokens(found.sizes, found.setting, chosen)
    report["gain"] = gain(found.sizes, found.setting, chosen)
    report["changes"] = [] if now.fits else changes(found.sizes, found.setting, chosen)
    report |= {} if gains is None else {"data": gains}
    report["run"] = run_time(run, found, chosen, gains)
    if fit:
        report["fit"] = best = fit_setting(found.sizes, found.setting, chosen)
        report["fit_run"] = None if best is None else _fitted_run(run, assumed, looked, best)
    if report["run"] is None and run.data.train:
        report["notes"].append(UNKNOWN)
    if probe:
        report["probe"] = probe_step(run, found)
    if as_json:
        typer.echo(json.dumps(plain(report), indent=1))
        return
    on = f"{chosen.name}, which is assumed: this machine has no CUDA device (--card)" if assumes else chosen.name
    show(report, fit, on)


def _fitted_run(run: RunConfig, assumed: Forecast, looked: Looked | None, fitted: Estimate) -> RunTime | None:
    """The time of the run with what `--fit` has found."""
    from lemo.train.data_gain import data_gain
    from lemo.train.run_time import run_time

    free = {name: getattr(fitted.setting, name) for name in ("recompute", *FREE_KEYS)}
    found = replace(assumed, setting=replace(assumed.setting, **free))
    gains = None if looked is None else data_gain(run, found, looked, fitted.card)
    return run_time(run, found, fitted.card, gains)


def read_source(source: str, overrides: list[str] | None, preset: PresetName | None) -> RunConfig:
    """The recipe, or one made up for a model.

    Raises:
        ConfigError: it cannot be read, or the options contradict each other.
    """
    from lemo.cli.presets import PRESETS
    from lemo.cli.recipe import build_run, load_recipe, override_values
    from lemo.errors import ConfigError

    given = list(overrides or ())
    if Path(source).suffix in (".yaml", ".yml"):
        if preset is not None:
            raise ConfigError("--preset: the recipe has ratios of its own; override sparsity.forward_ratio and others")
        return load_recipe(source, given)
    _check_model(source)
    named = PRESETS[(preset or PresetName.balanced).value]
    values: dict[str, Any] = {
        "model": {"path": source},
        "data": {"window_tokens": 8192},
        "loss_rows": {"share": named.loss_share, "span": named.span, "local_share": named.local_share},
        "sparsity": named.sparsity,
    }
    sources = override_values(values, given)
    return build_run(values, source, sources)


def _check_model(source: str) -> None:
    """Refuses a mistyped shape at once: a name without a slash is asked for on the hub only when it was used before.

    Raises:
        ConfigError: it is neither a shape nor a folder.
    """
    import difflib

    from huggingface_hub import try_to_load_from_cache

    from lemo.errors import ConfigError
    from lemo.train.model import PACKAGE
    from lemo.train.rehearsal import SHAPES

    if source in SHAPES or "/" in source or source.startswith((PACKAGE, "~")) or Path(source).exists():
        return
    if isinstance(try_to_load_from_cache(source, "config.json"), str):
        return
    close = difflib.get_close_matches(source, SHAPES, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(
        f"{source!r} is no folder, no OWNER/NAME of a hub and none of the known shapes {', '.join(SHAPES)}{meant}"
    )


def choose_card(name: str | None) -> Card:
    """The card that was named, this machine's, or where it has none the usual one.

    Raises:
        ConfigError: no such card; or one to measure that is not here.
    """
    from lemo.errors import ConfigError
    from lemo.measure.card import find_card, here, probe_card

    if name is not None and name != "probed":
        return find_card(name)
    own = here()
    if name == "probed":
        if own is None:
            raise ConfigError("--card probed: this machine has no CUDA device")
        return probe_card(own)
    return find_card(DEFAULT_CARD) if own is None else own


def _tokenizer(run: RunConfig) -> Any:
    from lemo.train.model import load_tokenizer
    from lemo.train.sources import needs_tokenizer

    return load_tokenizer(run.model) if needs_tokenizer(list(run.data.train)) else None


def plain(value: Any) -> Any:
    """The report as JSON types."""
    import dataclasses

    if hasattr(value, "to_dict"):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def show(report: dict[str, Any], fit: bool, on: str) -> None:
    """Prints the report, on the card named: a table with colours on a terminal, plain text elsewhere."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    now: Estimate = report["estimate"]
    setting, card = now.setting, now.card
    console.print(
        f"{report['model']}, {setting.tokens:,} tokens a sample, {setting.batch} at a time, on {on}", markup=False
    )
    console.print(describe(now), markup=False)
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("peak memory")
    table.add_column("GiB", justify="right")
    for name, size in now.parts_bytes.items():
        if size >= GIB / 200:
            table.add_row(name, f"{size / GIB:.2f}")
    table.add_row("allocated at the peak", f"{now.peak_bytes / GIB:.2f}", style="bold")
    table.add_row("needed of the card", f"{now.needed_bytes / GIB:.2f}", style="bold")
    if now.host_bytes:
        table.add_row("pinned host memory", f"{now.host_bytes / GIB:.2f}")
    console.print(table)
    verdict = "fits" if now.fits else "does not fit"
    style = "green" if now.fits else "bold red"
    console.print(f"{verdict} {card.name} with {card.memory_bytes / GIB:.1f} GiB; peak at: {now.moment}", style=style)
    console.print(f"longest sample that fits so: {report['longest_tokens']:,} tokens")
    time = now.time
    rest = "; starting them takes the rest" if time.waits else ""
    console.print(
        f"step: about {time.total_s:.2f} s (products {time.products_s:.2f}, attention {time.attention_s:.2f}, "
        f"memory {time.memory_s:.2f}{rest}), {now.tokens_per_s:,.0f} tokens/s; rates of the card: {card.source}"
    )
    console.print(f"about {report['gain']:.1f} times as fast as with every row in every layer")
    if report["run"] is not None:
        console.print(describe_run(report["run"]))
    for note in report["notes"]:
        console.print(f"note: {note}", markup=False)
    _show_more(report, fit, console)


def _show_more(report: dict[str, Any], fit: bool, console: Any) -> None:
    """What was asked for beyond the estimate."""
    listed: list[Change] = report["changes"]
    if listed:
        console.print("what would save memory:")
        for change in listed:
            console.print(f"  {change.text}: {_outcome(change.estimate)}", markup=False)
    if fit:
        _show_fit(report["estimate"], report["fit"], listed, console)
        if report.get("fit_run") is not None:
            console.print(f"  {describe_run(report['fit_run'])}", markup=False)
    if "data" in report:
        console.print(describe_data(report["data"]))
    if "probe" in report:
        probe = report["probe"]
        what = "allocated" if probe.source == "cuda" else "resident, of the whole process,"
        console.print(f"one step here: {probe.peak_bytes / GIB:.2f} GiB {what} at the peak, {probe.seconds:.2f} s")
        if report["run"] is not None:
            from lemo.train.run_time import say_duration

            batches = report["run"].batches
            console.print(f"  {batches:,} of them, the batches of the run: {say_duration(batches * probe.seconds)}")


def describe_data(found: DataGain) -> str:
    """What the data's steps gain, on two lines; of those that do not gain, why."""
    rest = round(1 - found.gaining - found.short, 6)
    parts = ["no step gains"]
    if found.gaining:
        best = f"the best is {found.best:.1f} times as fast; all together {found.gain:.1f} times"
        parts = [f"{found.gaining:.0%} of the steps gain, {best}"]
    for share, why in ((found.short, "are too short to gain"), (rest, "leave too little out to gain at any length")):
        if share:
            parts.append(f"{'all' if share == 1 else f'{share:.0%}'} {why}")
    return (
        f"data: {found.windows:,} samples looked at, the longest of {found.longest_tokens:,} tokens; "
        f"{found.supervised_share:.0%} of the rows carry loss, in {found.forced_share:.0%} of the blocks\n"
        f"  {'; '.join(parts)}"
    )


def _show_fit(before: Estimate, found: Estimate | None, listed: list[Change], console: Any) -> None:
    if found is None:
        console.print("nothing fits: take a shorter length, fewer layers or a larger card", style="bold red")
        return
    faster = [e for e in (change.estimate for change in listed) if e.fits and e.time.total_s < found.time.total_s]
    # Memory of the host is taken only where nothing else fits, since nobody asked how much of it there is.
    limit = " without memory of the host" if any(e.host_bytes > found.host_bytes for e in faster) else ""
    console.print(f"the fastest that fits{limit}: {_outcome(found)}")
    for key, value in fit_keys(before, found).items():
        console.print(f"  {key}: {value}", markup=False)


def fit_keys(before: Estimate, found: Estimate) -> dict[str, Any]:
    """Keys of the recipe that a fitted setting changes, and the level that it needs."""
    old, new = before.setting, found.setting
    if new.engine == "fused":
        keys: dict[str, Any] = {"training.recompute": new.recompute}
    else:
        keys = {"training.gradient_checkpointing": str(new.recompute == "layer").lower()}
    for name, key in FREE_KEYS.items():
        if getattr(old, name) != getattr(new, name):
            value = getattr(new, name)
            keys[key] = str(value).lower() if isinstance(value, bool) else value
    return keys


def _outcome(found: Estimate) -> str:
    verdict = "fits" if found.fits else "does not fit"
    return f"{found.needed_bytes / GIB:.1f} GiB, {found.time.total_s:.2f} s a step, {verdict}"


def describe_run(found: RunTime) -> str:
    """The time of the run on one line."""
    from lemo.train.run_time import say_duration

    most = "at most " if found.may_stop else ""
    steps = f"{found.steps:,} step{'s' if found.steps != 1 else ''}"
    if found.accumulation > 1:
        steps += f" of {found.accumulation:,} batches"
    lengths = "every window full" if found.windows is None else f"{found.windows:,} windows an epoch"
    text = f"run: {most}{say_duration(found.total_s)} for {steps}, {lengths}"
    if not found.evaluations:
        return text
    return (
        f"{text}; of that {say_duration(found.evaluation_s)} for validation, {found.evaluations:,} times up to "
        f"{found.evaluation_windows:,} windows"
    )


_OFFLOADS = {False: "", True: ", offload", "inputs": ", offload", "keys": ", offload of keys too"}


def describe(found: Estimate) -> str:
    """The setting on one line."""
    setting = found.setting
    words = {
        "fused": f"fused engine, recompute {setting.recompute}{_OFFLOADS[setting.offload]}",
        "generic": f"generic engine, checkpointing {'on' if setting.recompute == 'layer' else 'off'}",
        "plain": f"no rows skip, checkpointing {'on' if setting.recompute == 'layer' else 'off'}",
    }[setting.engine]
    if setting.engine == "plain":
        return words
    share = setting.forward_ratio
    ran = "every row runs each layer" if share == 1 else f"{share:.0%} of the rows run each layer that skips"
    loss = setting.loss_share + setting.local_share
    passes = max(setting.backward_ratio, loss) if setting.local_share else setting.backward_ratio
    far = "" if setting.far_share == 1 else f", backward through {setting.far_share:.0%} of the far keys"
    return (
        f"{words}; {ran}, {passes:.0%} pass gradient{_near(setting, passes)}{far}, kv {setting.kv}; "
        f"{loss:.0%} of the rows carry loss"
    )


def _near(setting: StepSetting, passes: float) -> str:
    """Which rows attend within chunks."""
    if not setting.context_window:
        return ""
    chunks, others = f"within chunks of {setting.context_window:,}", "rows without gradient"
    if not setting.local_share:
        return f"; {others} attend {chunks}"
    local = f"{setting.local_share:.0%}"
    if setting.local_forward == "all":
        return f" ({local} {chunks} only); {others} attend {chunks}"
    return f": {passes - setting.local_share:.0%} attend to all keys, {local} and the {others} {chunks}"
