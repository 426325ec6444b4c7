"""check_bars shows what was measured, believes samples only, and refuses what cannot be trusted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks import check_bars
from lemo.measure.record import Record, config_hash


def _record(bar: str | None, samples, statistic: str, unit: str, **changes) -> Record:
    setting = {"statistic": statistic, **changes.pop("setting", {})}
    record = Record.measure("x", unit, samples, setting, script="benchmarks/x.py", bar=bar)
    return dataclasses.replace(record, **changes)


def _run(tmp_path: Path, capsys, *records: Record) -> tuple[int, str, str]:
    file = tmp_path / "r.jsonl"
    file.write_text("")
    for record in records:
        record.append(file)
    code = check_bars.main([str(file)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def _line(out: str, bar: str) -> str:
    return next(line for line in out.splitlines() if line.startswith(bar + " "))


def test_every_bar_is_listed_even_without_records(tmp_path, capsys):
    code, out, _ = _run(tmp_path, capsys)
    assert code == 0
    for bar in check_bars.BARS:
        assert "not measured" in _line(out, bar.id)


def test_met_and_missed_bars_exit_with_zero(tmp_path, capsys):
    code, out, _ = _run(
        tmp_path,
        capsys,
        _record("A.demo_minutes", [7.0], "max", "min"),
        _record("A.recall_in_domain", [0.8, 0.9], "mean", "share"),
    )
    assert code == 0
    assert " met " in _line(out, "A.demo_minutes")
    assert "MISSED" in _line(out, "A.recall_in_domain") and "missed: A.recall_in_domain: 0.85" in out


def test_the_newest_record_counts(tmp_path, capsys):
    old = _record("A.demo_minutes", [99.0], "max", "min", time="2020-01-01T00:00:00+00:00")
    new = _record("A.demo_minutes", [5.0], "max", "min")
    assert " met " in _line(_run(tmp_path, capsys, new, old)[1], "A.demo_minutes")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_worst_shape_counts(tmp_path, capsys, order):
    good = _record("A.block_score_vs_sdpa/8k", {"baseline": [2.0], "lemo": [1.0]}, "overhead_of_medians", "ratio")
    bad = _record("A.block_score_vs_sdpa/32k", {"baseline": [2.0], "lemo": [3.0]}, "overhead_of_medians", "ratio")
    line = _line(_run(tmp_path, capsys, *[(good, bad)[i] for i in order])[1], "A.block_score_vs_sdpa")
    assert "1.5" in line and "MISSED" in line and "worst of 2" in line


def test_the_worst_of_a_bar_to_exceed_is_the_smallest(tmp_path, capsys):
    records = [_record(f"A.recall_shifted/{i}", [x], "mean", "share") for i, x in enumerate((0.95, 0.80, 0.90))]
    assert "0.8" in _line(_run(tmp_path, capsys, *records)[1], "A.recall_shifted")


def test_shapes_with_goals_of_their_own_are_compared_by_share_of_goal(tmp_path, capsys):
    small = _record("A.predictor_share/smollm2-135m", [0.04], "max", "share")
    large = _record("A.predictor_share/llama-3-8b", [0.0049], "max", "share")
    line = _line(_run(tmp_path, capsys, small, large)[1], "A.predictor_share")
    assert "0.98" in line and " met " in line


@pytest.mark.parametrize(("loss", "status"), [(0.4, " met "), (0.6, "MISSED")])
def test_a_condition_can_fail_a_good_value(tmp_path, capsys, loss, status):
    record = _record("A.elastic_size", [0.6], "max", "share", setting={"recall_loss_points": loss})
    assert status in _line(_run(tmp_path, capsys, record)[1], "A.elastic_size")


@pytest.mark.parametrize(
    ("gap", "seeds", "status"), [(0.005, 2, "2 of 3 seeds"), (0.005, 3, " met "), (0.02, 2, "MISSED")]
)
def test_a_good_value_of_few_seeds_is_not_met_and_a_bad_one_is_missed(tmp_path, capsys, gap, seeds, status):
    samples = {"baseline": [2.0] * seeds, "lemo": [2.0 + gap] * seeds}
    record = _record("B.default_gap/code", samples, "gap_plus_error", "nats", seeds=tuple(range(seeds)))
    assert status in _line(_run(tmp_path, capsys, record)[1], "B.default_gap")


def _faulty(kind: str) -> Record:
    good = _record("A.demo_minutes", [7.0], "max", "min")
    ratio = {"statistic": "median"}
    return {
        "script": dataclasses.replace(good, script=""),
        "samples": dataclasses.replace(good, samples=[]),
        "value": dataclasses.replace(good, value=1.0),
        "unit": dataclasses.replace(good, unit="h"),
        "bar": dataclasses.replace(good, bar="A.demo_minuets"),
        "condition": _record("A.elastic_size", [0.6], "max", "share"),
        "shape": _record("A.predictor_share/gpt2", [0.01], "max", "share"),
        "baseline": _record("A.keep_all_time", [1.0], "median", "ratio"),
        "no bar": dataclasses.replace(_record(None, [2.0], "median", "ratio"), config_hash=config_hash(ratio)),
        "nats": _record("A.extension_gap_skip", [0.001], "mean", "nats"),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("script", "no script"),
        ("samples", "no samples"),
        ("value", "samples give 7.0"),
        ("unit", "is in 'min'"),
        ("bar", "unknown bar"),
        ("condition", "recall_loss_points"),
        ("shape", "has goals for"),
        ("baseline", "same command"),
        ("no bar", "same command"),
        ("nats", "compares"),
    ],
)
def test_faulty_records_are_refused_and_do_not_count(tmp_path, capsys, kind, reason):
    faulty = _faulty(kind)
    code, out, err = _run(tmp_path, capsys, faulty)
    assert code == 1 and reason in err
    if faulty.bar and (bar := faulty.bar.partition("/")[0]) in {b.id for b in check_bars.BARS}:
        assert "not measured" in _line(out, bar)


def test_unreadable_lines_are_refused(tmp_path, capsys):
    file = tmp_path / "r.jsonl"
    file.write_text("{}\n")
    assert check_bars.main([str(file)]) == 1
    assert "r.jsonl:1" in capsys.readouterr().err


def test_published_results_are_sound(capsys):
    assert check_bars.main([]) == 0, capsys.readouterr().err


def test_the_page_of_goals_is_that_of_the_records(tmp_path: Path):
    page = tmp_path / "goals.md"
    assert check_bars.main(["--page", str(page)]) == 0
    published = Path(check_bars.__file__).parents[1] / "docs" / "goals.md"
    assert published.read_text() == page.read_text(), "run `python -m benchmarks.check_bars --page docs/goals.md`"


def test_a_narrow_miss_is_shown_with_more_digits(tmp_path: Path):
    bar = next(b for b in check_bars.BARS if b.id == "C.calibration_minutes")
    record = Record.measure("x", bar.unit, [10.0003], {"statistic": "median"}, script="s.py", bar=bar.id)
    table = check_bars.goal_table([record], "C.cal")
    assert "**missed**" in table and "| 10.0003 |" in table
