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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lemo.errors import DataError
from lemo.measure.record import Record, read_records
from lemo.measure.statistics import COMPARATIVE, value_of

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
    """

    id: str
    what: str
    comparison: str | None
    goal: float | None
    unit: str
    compares: bool = False
    goals: dict[str, float] = field(default_factory=dict)
    conditions: dict[str, float] = field(default_factory=dict)


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
)


@dataclass(frozen=True)
class Outcome:
    """What is known about one bar: the worst of the newest values of its shapes, and the Record that it is from."""

    bar: Bar
    value: float | None = None
    record: Record | None = None
    shapes: int = 0
    failed_condition: str = ""

    @property
    def status(self) -> str:
        """`met`, `MISSED`, `reported` or `not measured`."""
        if self.value is None:
            return "not measured"
        if self.bar.comparison is None or self.bar.goal is None:
            return "reported"
        good = COMPARISONS[self.bar.comparison](self.value, self.bar.goal) and not self.failed_condition
        return "met" if good else "MISSED"


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
    if bar.goals and shape not in bar.goals:
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
    for name, record in newest.items():
        value = value_of(record.samples, record.setting["statistic"])
        if bar.goals:
            value /= bar.goals[name.partition("/")[2]]
        failed = [f"{k} {record.setting[k]} > {most}" for k, most in bar.conditions.items() if record.setting[k] > most]
        outcomes.append(Outcome(bar, value, record, len(newest), ", ".join(failed)))
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks the files named, or all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    files = parser.parse_args(arguments).files or sorted(RESULTS.glob("*.jsonl"))
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
    counts = {status: sum(o.status == status for o in outcomes) for status in ("met", "MISSED", "not measured")}
    print(f"\n{len(sound)} sound Records, {invalid} invalid. " + ", ".join(f"{n} {s}" for s, n in counts.items()))
    for outcome in outcomes:
        if outcome.status == "MISSED" and not math.isnan(outcome.value or 0.0):
            print(f"missed: {outcome.bar.id}: {outcome.value:.4g}, goal {outcome.bar.comparison} {outcome.bar.goal:g}")
    return 1 if invalid else 0


if __name__ == "__main__":
    sys.exit(main())
