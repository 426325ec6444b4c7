"""Prints every bar with its goal and the newest value measured; refuses Records that cannot be trusted.

    python benchmarks/check_bars.py [benchmarks/results/*.jsonl ...]

Values are recomputed from the raw samples. A bar that was measured for several shapes (`ID/shape`) shows the worst of
them. Exits with 0 when every Record is sound (bars that were missed are listed), with 1 when one is not.
"""

from __future__ import annotations

import argparse
import math
import operator
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lemo.errors import DataError
from lemo.measure.record import Record, read_records
from lemo.measure.statistics import COMPARATIVE, value_of
from lemo.report.tables import markdown

RESULTS = Path(__file__).resolve().parent / "results"
COMPARISONS = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Bar:
    """A goal that the project set itself.

    Attributes:
        id: as in the issue.
        what: in words.
        comparison: `<=` or `>=`; None for a figure that is only reported.
        goal: number to reach.
        unit: of the values.
        compares: the value compares with a baseline, which must be in the same Record.
        goals: goal of each shape where they differ; the plain id then shows the worst share of its goal.
        conditions: numbers in the Record's setting that must not exceed these for the value to count.
        seeds: paired seeds that the value takes; a good value of fewer is shown and does not count as met.
    """

    id: str
    what: str
    comparison: str | None
    goal: float | None
    unit: str
    compares: bool = False
    goals: dict[str, float] = field(default_factory=dict)
    conditions: dict[str, float] = field(default_factory=dict)
    seeds: int = 0


def _trained(
    name: str, what: str, comparison: str | None, goal: float | None, unit: str = "nats", seeds: int = 3
) -> Bar:
    """A bar of trained models: a comparison paired by seed."""
    return Bar(name, what, comparison, goal, unit, compares=unit in ("nats", "standard errors"), seeds=seeds)


def _by_model(name: str, what: str, comparison: str, unit: str, llama2: float, llama3: float) -> Bar:
    """A bar with a goal for each of the two large shapes. The adapter set may follow: `ID/llama2/all`."""
    goals = {"llama2": llama2, "llama3": llama3}
    return Bar(name, what, comparison, 1.0, unit, compares=unit == "ratio", goals=goals)


BARS = (
    Bar("A.demo_minutes", "`make demo` in a fresh clone, 2 cores", "<=", 10, "min"),
    Bar("A.test_minutes", "`make test` in a fresh clone, 2 cores", "<=", 15, "min"),
    Bar("A.families", "decoder families that pass every law", ">=", 14, "families"),
    Bar("A.exact_forward_grad", "exact forward against explicit stop-gradients, fp64", "<=", 1e-10, "relative error"),
    Bar("A.recall_in_domain", "predictor recall over competing blocks, keep 0.3", ">=", 0.90, "share"),
    Bar("A.recall_shifted", "the same on a domain not calibrated on", ">=", 0.85, "share"),
    Bar(
        "A.predictor_share",
        "predictor parameters over the model's",
        "<=",
        1.0,
        "share",
        goals={"smollm2-135m": 0.05, "llama-3-8b": 0.005},
    ),
    Bar(
        "A.elastic_size",
        "predictor size after elastic pruning",
        "<=",
        0.65,
        "share",
        conditions={"recall_loss_points": 0.5},
    ),
    Bar("A.threshold_gain", "Algorithm 1 over one global threshold", ">=", 0, "nats", compares=True),
    Bar("A.block_score_vs_sdpa", "block_score over SDPA's forward, time", "<=", 1.0, "ratio", compares=True),
    Bar("A.keep_all_time", "keep-all step over dense, time", "<=", 1.02, "ratio", compares=True),
    Bar("A.extension_gap_skip", "8K to 16K, skip 0.5 over dense LoRA", "<=", 0.02, "nats", compares=True),
    Bar("A.extension_gap_exact", "8K to 16K, exact forward 0.5 over dense LoRA", "<=", 0.02, "nats", compares=True),
    Bar("A.pairs_vs_rows", "`pairs` gradient over `rows`", None, None, "nats", compares=True),
    Bar("B.default_ideal_gain", "default, ideal gain at 64K, Llama-3-8B shape", ">=", 3.0, "times"),
    _trained("B.default_gap", "default over dense on the same loss rows, per domain", "<=", 0.01),
    _trained("B.default_total_gap", "default over dense with loss on all rows", "<=", 0.02),
    _trained("B.equal_compute_gain", "default below dense at equal FLOPs", ">=", 0.02),
    _trained("B.over_short_windows", "default below dense on short windows", ">=", 0.01),
    Bar("B.mha_ideal_gain", "multi-head default, ideal gain, Llama-2-7B shape", ">=", 3.5, "times"),
    _trained("B.mha_gap", "multi-head default over dense, same loss rows", "<=", 0.02),
    Bar("B.conservative_ideal_gain", "`quality`, ideal gain", ">=", 2.0, "times"),
    _trained("B.conservative_gap", "`quality` over dense, same loss rows", "<=", 0.005),
    Bar("B.aggressive_ideal_gain", "`fast`, ideal gain", ">=", 5.0, "times"),
    _trained("B.aggressive_gap", "`fast` over dense, same loss rows", None, None),
    _trained("B.instruct_gap", "`lemo init`'s choice over dense, answers", "<=", 0.01),
    _trained("B.instruct_context_value", "documents' worth to dense, answers", ">=", 0.1),
    _trained("B.over_random_se", "predictors below random rows", ">=", 3.0, "standard errors", seeds=5),
    _trained("B.over_random_nats", "predictors below random rows", ">=", 0.01, seeds=5),
    _trained("B.oracle_share", "predictors' share of the oracle's advantage", ">=", 0.8, "share"),
    Bar("B.retrieval_gap", "retrieval, dense LoRA over lemo", "<=", 1.0, "points", compares=True),
    _trained("B.sparse_gap", "sparse forward over dense forward, default", "<=", 0.02),
    _trained("B.recall_drift", "recall after 200 LoRA steps over that at the start", ">=", 0.9, "share"),
    Bar("C.8k_k50", "keep 0.5, 8K, over Liger", ">=", 1.85, "ratio", compares=True),
    Bar("C.8k_k30", "keep 0.3, 8K, over Liger", ">=", 2.8, "ratio", compares=True),
    Bar("C.32k_k50", "keep 0.5, 32K, over Liger + recompute", ">=", 2.8, "ratio", compares=True),
    Bar("C.32k_k30", "keep 0.3, 32K, over Liger + recompute", ">=", 4.8, "ratio", compares=True),
    Bar("C.64k_k50", "keep 0.5, 64K, over Liger + recompute", ">=", 3.2, "ratio", compares=True),
    Bar("C.64k_k30", "keep 0.3, 64K, over Liger + recompute", ">=", 5.5, "ratio", compares=True),
    Bar("C.128k_k50", "keep 0.5, 128K, over Liger + recompute", ">=", 3.2, "ratio", compares=True),
    Bar("C.128k_k30", "keep 0.3, 128K, over Liger + recompute", ">=", 5.9, "ratio", compares=True),
    _by_model("C.8k_time", "default, 8K, over Liger", ">=", "ratio", 1.85, 1.7),
    _by_model("C.32k_time", "default, 32K, over Liger + recompute", ">=", "ratio", 2.8, 2.4),
    _by_model("C.64k_time", "default, 64K, over Liger + recompute", ">=", "ratio", 3.5, 3.0),
    _by_model("C.128k_time", "default, 128K, over Liger + recompute", ">=", "ratio", 4.0, 3.2),
    Bar("C.8k_gib", "default, 8K, peak", "<=", 24, "GiB"),
    _by_model("C.64k_gib", "default, 64K, peak", "<=", "GiB", 28, 36),
    _by_model("C.128k_gib", "default, 128K, peak", "<=", "GiB", 45, 56),
    Bar("C.dense_parity", "keep-all over Liger, time", ">=", 1.0, "ratio", compares=True),
    Bar("C.over_generic_time", "fused over generic engine, 64K, keep 0.5", ">=", 1.25, "ratio", compares=True),
    Bar("C.over_generic_gib", "the same, peak memory, layers recomputed", ">=", 1.4, "ratio", compares=True),
    Bar(
        "C.row_kib",
        "bytes held per kept row and layer, by what is recomputed",
        "<=",
        1.0,
        "KiB",
        goals={"none": 96, "mlp": 52, "lin": 17},
    ),
    Bar("C.selection_share", "scoring and selection, share of the step", "<=", 0.02, "share"),
    Bar("C.kv_all_attention", "kept queries x all keys, share of the vendor's TFLOP/s", ">=", 0.8, "ratio", True),
    Bar("C.ops_bandwidth", "bytes over time, worst op, share of the copy rate", ">=", 0.8, "share"),
    Bar(
        "C.scatter_vs_naive",
        "scatter over index, zeros, scatter, add",
        ">=",
        1.0,
        "ratio",
        compares=True,
        goals={"keep-0.5": 2.5, "keep-0.3": 4.0},
    ),
    Bar("C.gather_norm_vs_naive", "gather + norm over index + norm", ">=", 1.6, "ratio", compares=True),
    Bar("C.loss_gib", "segmented loss, 64K x 128,256, above the rest", "<=", 1.0, "GiB"),
    Bar("C.loss_time", "segmented loss over Liger's, time", "<=", 1.1, "ratio", compares=True),
    Bar("C.paper_memory", "over LoRA, nothing recomputed, four models", ">=", 1.93, "ratio", compares=True),
    Bar("C.paper_time", "the same, time", ">=", 1.36, "ratio", compares=True),
    Bar("C.calibration_minutes", "8B shape, 16K, one GPU", "<=", 10, "min"),
    Bar("C.gpu_tests", "kernels with a green GPU run", ">=", 1.0, "share"),
    Bar("E.estimate_share", "estimated peaks within 10 % of measured ones, held-out steps", ">=", 0.9, "share"),
    Bar("E.first_step_minutes", "installation to first training step, CPU, after downloads", "<=", 3, "min"),
)


@dataclass(frozen=True)
class Outcome:
    """What is known about one bar: the worst of the newest values of its shapes, and the Record that it is from.

    `seeds` is that of the shape with the fewest.
    """

    bar: Bar
    value: float | None = None
    record: Record | None = None
    shapes: int = 0
    failed_condition: str = ""
    seeds: int = 0

    @property
    def status(self) -> str:
        """`met`, `MISSED`, `reported`, `not measured`, or `2 of 3 seeds`."""
        if self.value is None:
            return "not measured"
        if self.bar.comparison is None or self.bar.goal is None:
            return "reported"
        if not COMPARISONS[self.bar.comparison](self.value, self.bar.goal) or self.failed_condition:
            return "MISSED"
        return "met" if self.seeds >= self.bar.seeds else f"{self.seeds} of {self.bar.seeds} seeds"


def find_problems(record: Record, bars: dict[str, Bar]) -> list[str]:
    """Why a Record may not be published; empty for a sound one."""
    found = record.problems()
    statistic = record.setting.get("statistic")
    if record.unit == "ratio" and statistic not in COMPARATIVE:
        found.append("a ratio whose baseline was not measured in the same command")
    if record.bar is None:
        return found
    name, _, shape = record.bar.partition("/")
    bar = bars.get(name)
    if bar is None:
        return [*found, f"unknown bar {record.bar!r}"]
    if bar.unit != record.unit:
        found.append(f"unit {record.unit!r}, but {bar.id} is in {bar.unit!r}")
    if bar.compares and statistic not in COMPARATIVE:
        found.append(f"{bar.id} compares, but statistic {statistic!r} does not")
    if bar.goals and shape.partition("/")[0] not in bar.goals:
        found.append(f"{bar.id} has goals for {', '.join(bar.goals)}, not for {shape!r}")
    missing = [key for key in bar.conditions if not isinstance(record.setting.get(key), int | float)]
    if missing:
        found.append(f"{bar.id} needs {', '.join(missing)} in the setting")
    return found


def judge(bar: Bar, records: Sequence[Record]) -> Outcome:
    """Worst of the newest values of a bar's shapes. `records` are sound and may answer other bars."""
    newest: dict[str, Record] = {}
    for record in sorted(records, key=lambda r: r.time):
        if record.bar is not None and record.bar.partition("/")[0] == bar.id:
            newest[record.bar] = record
    outcomes = []
    seeds = min((len(set(record.seeds)) for record in newest.values()), default=0)
    for name, record in newest.items():
        value = value_of(record.samples, record.setting["statistic"])
        if bar.goals:
            value /= bar.goals[name.split("/")[1]]
        failed = [f"{k} {record.setting[k]} > {most}" for k, most in bar.conditions.items() if record.setting[k] > most]
        outcomes.append(Outcome(bar, value, record, len(newest), ", ".join(failed), seeds))
    if not outcomes:
        return Outcome(bar)
    sign = -1 if bar.comparison == ">=" else 1
    return max(outcomes, key=lambda o: (bool(o.failed_condition), sign * (o.value or 0.0)))


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """One line a bar."""
    rows = [("bar", "goal", "value", "unit", "status", "from")]
    for outcome in outcomes:
        bar, record = outcome.bar, outcome.record
        goal = "-" if bar.comparison is None else f"{bar.comparison} {bar.goal:g}"
        value = "-" if outcome.value is None else f"{outcome.value:.4g}"
        origin = "" if record is None else f"{record.bar} {record.time[:10]} {record.device}"
        if outcome.shapes > 1:
            origin += f" (worst of {outcome.shapes})"
        unit = "of its goal" if bar.goals else bar.unit
        rows.append((bar.id, goal, value, unit, outcome.status, (origin + " " + outcome.failed_condition).strip()))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def goal_table(records: Sequence[Record], prefix: str = "") -> str:
    """Markdown: each goal beside its newest value, the worst over shapes. `records` are sound.

    Values that have goals of their own for each shape are shares of them.
    """
    rows = []
    for bar in BARS:
        if not bar.id.startswith(prefix):
            continue
        outcome = judge(bar, records)
        asked = "–" if bar.goal is None else f"{bar.comparison} {bar.goal:g}"
        status = "**missed**" if outcome.status == "MISSED" else outcome.status
        unit = "of its goal" if bar.goals else bar.unit
        rows.append([f"`{bar.id}`", bar.what, asked, _shown(outcome), unit, status])
    return markdown(["goal", "what", "asked", "value", "unit", "status"], rows)


def _shown(outcome: Outcome) -> str:
    """Value, and of several shapes the name of the worst."""
    if outcome.value is None or outcome.record is None:
        return "–"
    goal, texts = outcome.bar.goal, [f"{outcome.value:.{digits}g}" for digits in (3, 4, 5, 6)]
    # More digits where three would hide a miss.
    text = next((t for t in texts if outcome.status != "MISSED" or goal is None or float(t) != goal), texts[-1])
    _, _, shape = (outcome.record.bar or "").partition("/")
    return f"{text} ({shape})" if outcome.shapes > 1 else text


def goal_page(outcomes: Sequence[Outcome], records: Sequence[Record]) -> str:
    """docs/goals.md."""
    said = ", ".join(f"{number} {status}" for status, number in _counts(outcomes).items())
    return (
        f"{_PAGE}\nOf {len(outcomes)} goals: {said}; the others are figures to be reported.\n\n{goal_table(records)}\n"
    )


def _counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many goals are met, missed, measured with fewer seeds than they take, and not measured."""
    counts = Counter("short of seeds" if o.status.endswith("seeds") else o.status.lower() for o in outcomes)
    return {status: counts[status] for status in ("met", "missed", "short of seeds", "not measured")}


_PAGE = """# Goals

What the project set itself before it was built, and where it stands. Made by `python -m benchmarks.check_bars --page
docs/goals.md` from the Records in `benchmarks/results/`; of a goal with several shapes, domains or settings the worst
is shown. Goals marked A are of the method and its predictors, B of [quality](quality.md), C of
[performance](performance.md), E of first use. Why a goal is missed stands in the [decisions](decisions/README.md): 16
and 18 (equal arithmetic, short windows) and 17 (steps at 8K, bandwidth of the bypass). A goal of trained models takes
three paired seeds, predictors against random rows five; one that has fewer so far says how many.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks the files named, or all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--page", type=Path, help="write the goals as a page, too")
    options = parser.parse_args(arguments)
    files = options.files or sorted(RESULTS.glob("*.jsonl"))
    try:
        records = [(file, record) for file in files for record in read_records(file)]
    except DataError as error:
        print(f"invalid: {error}", file=sys.stderr)
        return 1
    bars = {bar.id: bar for bar in BARS}
    sound, invalid = [], 0
    for file, record in records:
        if problems := find_problems(record, bars):
            invalid += 1
            print(f"invalid: {file.name}: {record.name} ({record.time}): {'; '.join(problems)}", file=sys.stderr)
        else:
            sound.append(record)
    outcomes = [judge(bar, sound) for bar in BARS]
    print_outcomes(outcomes)
    counts = ", ".join(f"{number} {status}" for status, number in _counts(outcomes).items())
    print(f"\n{len(sound)} sound Records, {invalid} invalid. {counts}")
    for outcome in outcomes:
        if outcome.status == "MISSED" and not math.isnan(outcome.value or 0.0):
            print(f"missed: {outcome.bar.id}: {outcome.value:.4g}, goal {outcome.bar.comparison} {outcome.bar.goal:g}")
    if options.page is not None:
        options.page.write_text(goal_page(outcomes, sound), encoding="utf-8")
    return 1 if invalid else 0


if __name__ == "__main__":
    sys.exit(main())
