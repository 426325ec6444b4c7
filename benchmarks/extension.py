"""Context extension of SmolLM2-135M from 8K to 16K on one GPU: dense LoRA against lemo, same data and loss rows.

    python -m benchmarks.extension --model FOLDER --data FOLDER [--steps 100] [--variants dense_rows,skip] [--out FILE]

FOLDER of the model and of the data are what `benchmarks/prepare_data.py` writes. Every variant starts from the same
weights and adapter, sees the same windows in the same order, and (but for dense_all) the same loss rows. A cell is one
variant with one seed; cells whose Records are in the --out file already are not run again, so a run that was cut off
goes on where it stopped. At the end the Records that answer bars are written from all cells with the same setting.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lemo
from benchmarks.study import Study, add_options, make_optimizer, step_function
from lemo.eval.perplexity import evaluate_loss
from lemo.measure.memory import track_peak
from lemo.measure.profile import StepTimer
from lemo.measure.record import Record, read_records
from lemo.measure.statistics import paired_standard_error

SCRIPT = "benchmarks/extension.py"
WARM_STEPS = 3  # not counted in tokens/s: allocator, autotuning


@dataclass(frozen=True)
class Variant:
    """How one cell trains. `plan` is the calibrated plan's use: dense, skip, random, rows or pairs."""

    plan: str
    loss_rows: bool = True


VARIANTS = {
    "dense_all": Variant("dense", loss_rows=False),
    "dense_rows": Variant("dense"),
    "skip": Variant("skip"),
    "exact_rows": Variant("rows"),
    "exact_pairs": Variant("pairs"),
    "random_skip": Variant("random"),
}
BASELINE = "dense_rows"
# variant, baseline, bar
GAPS = (
    ("skip", BASELINE, "A.extension_gap_skip"),
    ("exact_rows", BASELINE, "A.extension_gap_exact/rows"),
    ("exact_pairs", BASELINE, "A.extension_gap_exact/pairs"),
    ("exact_pairs", "exact_rows", "A.pairs_vs_rows"),
    ("random_skip", "skip", None),
    (BASELINE, "dense_all", None),
)


def evaluate(study: Study, model: Any, use: str) -> dict[str, list[float]]:
    """Validation losses of a model that no plan is attached to: dense, and under a plan on its loss rows."""
    everything, drawn = study.validation_batches(loss_rows=False), study.validation_batches(loss_rows=True)
    with lemo.attach(model, study.plan_of(use), self_test=False) as handle:
        reports = {
            "dense_validation_loss": evaluate_loss(model, everything),
            "dense_validation_loss_on_loss_rows": evaluate_loss(model, drawn),
            "sparse_validation_loss": evaluate_loss(model, drawn, handle=handle, sparse=True),
        }
    return {name: list(report.by_sequence) for name, report in reports.items()}


def run_cell(study: Study, name: str, seed: int) -> None:
    """Trains one variant and writes its Records."""
    options, variant = study.options, VARIANTS[name]
    model = study.adapted_model(seed)
    optimizer, schedule = make_optimizer(model, options)
    step, timer = step_function(model, optimizer), StepTimer(study.device)
    order, losses = study.order(seed), []
    model.train()
    with lemo.attach(model, study.plan_of(variant.plan)) as handle:
        with track_peak(study.device) as peak:
            for number in range(options.steps):
                batch = study.batch(order[number * options.batch : (number + 1) * options.batch], variant.loss_rows)
                with timer.step():
                    losses.append(float(step(batch)))
                schedule.step()
                if number % 10 == 0 or number == options.steps - 1:
                    print(
                        f"{name} seed {seed} step {number}: loss {losses[-1]:.4f}, {timer.seconds[-1]:.2f} s",
                        flush=True,
                    )
        shares = handle.ratios() if handle.selections else {}
        for note in handle.notes:
            print(f"note: {note}", flush=True)
    tokens = options.batch * options.window
    rates = [tokens / seconds for seconds in timer.seconds[WARM_STEPS:] or timer.seconds]
    write(study, name, seed, "tokens_per_second", "tokens/s", rates, "median")
    write(study, name, seed, "peak_memory", "GiB", [peak.peak_gib], "max")
    write(study, name, seed, "training_loss", "nats", losses, "last")
    if shares:
        write(study, name, seed, "forward_share", "share", [shares[i][0] for i in sorted(shares)], "mean")
        write(study, name, seed, "backward_share", "share", [shares[i][1] for i in sorted(shares)], "mean")
    use = variant.plan if variant.plan in ("skip", "random") else "skip"
    for what, values in evaluate(study, model, use).items():
        write(study, name, seed, what, "nats", values, "mean")


def write(study: Study, cell: str, seed: int, what: str, unit: str, samples: list[float], statistic: str) -> None:
    """One Record of a cell."""
    setting = {**study.setting, "variant": cell, "statistic": statistic}
    record = Record.measure(f"extension/{cell}/{what}", unit, samples, setting, script=SCRIPT, seeds=[seed])
    record.append(study.options.out)
    print(f"{cell} seed {seed} {what}: {record.value:.5g} {unit}", flush=True)


def run_before(study: Study) -> None:
    """Validation losses of the extended model before any training."""
    for what, values in evaluate(study, study.base_model(), "skip").items():
        write(study, "before", 0, what, "nats", values, "mean")


def run_timing(study: Study) -> None:
    """Step times of the variants taking turns on one model, each against dense on the same loss rows."""
    options = study.options
    names = [name for name in options.variants if VARIANTS[name].plan != "dense" and name != "random_skip"]
    timers = {name: StepTimer(study.device) for name in (BASELINE, *names)}
    peaks: dict[str, list[float]] = {name: [] for name in timers}
    model = study.adapted_model(0)
    step = step_function(model, make_optimizer(model, options)[0])
    batch = study.batch(study.order(0)[: options.batch], True)
    model.train()
    for _ in range(options.timing_rounds):
        for name, timer in timers.items():
            with lemo.attach(model, study.plan_of(VARIANTS[name].plan), self_test=False):
                step(batch)  # not timed: the allocator settles
                with track_peak(study.device) as peak, timer.step():
                    step(batch)
            peaks[name].append(peak.peak_gib)
    for name in names:
        setting = {**study.setting, "variant": name, "baseline": BASELINE, "statistic": "ratio_of_medians"}
        pair = {"baseline": timers[BASELINE].seconds, "lemo": timers[name].seconds}
        speed = Record.measure(f"extension/{name}/speedup", "ratio", pair, setting, script=SCRIPT, seeds=[0])
        pair = {"baseline": peaks[BASELINE], "lemo": peaks[name]}
        memory = Record.measure(f"extension/{name}/memory_ratio", "ratio", pair, setting, script=SCRIPT, seeds=[0])
        for record in (speed, memory):
            record.append(options.out)
            print(f"{record.name}: {record.value:.3f}", flush=True)


def finished(study: Study, cell: str, seed: int, what: str) -> Record | None:
    """The newest Record of a cell with this study's setting."""
    if not study.options.out.exists():
        return None
    wanted = {**study.setting, "variant": cell}
    found = None
    for record in read_records(study.options.out):
        setting = {name: value for name, value in record.setting.items() if name in wanted}
        if record.name == f"extension/{cell}/{what}" and list(record.seeds) == [seed] and setting == wanted:
            found = record
    return found


def write_gaps(study: Study) -> None:
    """Differences between variants over all seeds that both have run."""
    what = "dense_validation_loss"
    for name, baseline, bar in GAPS:
        pairs = [(finished(study, baseline, s, what), finished(study, name, s, what)) for s in study.options.seeds]
        pairs = [(b, c, s) for (b, c), s in zip(pairs, study.options.seeds, strict=True) if b and c]
        if not pairs:
            continue
        samples = {
            "baseline": [x for b, _, _ in pairs for x in b.samples],
            "lemo": [x for _, c, _ in pairs for x in c.samples],
        }
        setting = {**study.setting, "variant": name, "baseline": baseline, "statistic": "difference_of_means"}
        if len(samples["lemo"]) > 1:
            setting["standard_error_over_windows"] = paired_standard_error(samples["baseline"], samples["lemo"])
        record = Record.measure(
            f"extension/{name}/gap_over_{baseline}",
            "nats",
            samples,
            setting,
            script=SCRIPT,
            seeds=[s for _, _, s in pairs],
            bar=bar,
        ).append(study.options.out)
        print(f"{name} over {baseline}: {record.value:+.4f} nats ({len(pairs)} seeds) {bar or ''}", flush=True)


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).parent / "results" / "extension.jsonl")
    add("--variants", type=lambda text: text.split(","), default=list(VARIANTS))
    add("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0])
    add("--timing-rounds", type=int, default=5, help="0 leaves the timing out")
    add_options(parser)
    options = parser.parse_args(arguments)
    if unknown := set(options.variants) - set(VARIANTS):
        parser.error(f"unknown variants: {', '.join(sorted(unknown))}; known are {', '.join(VARIANTS)}")
    return options


@contextmanager
def fresh_memory(device: torch.device) -> Iterator[None]:
    """Frees what a cell left behind."""
    yield
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    study = Study(read_options(arguments))
    options = study.options
    with fresh_memory(study.device):
        if finished(study, "before", 0, "sparse_validation_loss") is None:
            run_before(study)
    for seed in options.seeds:
        for name in options.variants:
            if finished(study, name, seed, "sparse_validation_loss") is not None:
                print(f"{name} seed {seed}: done before", flush=True)
                continue
            start = time.perf_counter()
            with fresh_memory(study.device):
                run_cell(study, name, seed)
            print(f"{name} seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    write_gaps(study)
    if options.timing_rounds:
        with fresh_memory(study.device):
            run_timing(study)
    return 0


if __name__ == "__main__":
    sys.exit(main())
