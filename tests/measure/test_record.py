"""Records keep what was measured, and nothing that was not."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemo.errors import DataError
from lemo.measure.record import Record, config_hash, read_records
from lemo.measure.statistics import STATISTICS, paired_standard_error, value_of

NUMBERS = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=8)


def _record(**changes) -> Record:
    arguments = {
        "name": "step",
        "unit": "s",
        "samples": [3.0, 1.0, 2.0],
        "setting": {"statistic": "median", "tokens": 8192},
        "script": "benchmarks/x.py",
        "seeds": [1],
    }
    return Record.measure(**{**arguments, **changes})


def test_a_measured_record_is_complete_and_survives_its_file(tmp_path: Path):
    file = tmp_path / "new" / "records.jsonl"
    first, second = _record().append(file), _record(name="other", bar="A.x").append(file)
    assert read_records(file) == [first, second]
    assert first.value == 2.0
    assert all(dataclasses.asdict(first)[name] for name in ("device", "versions", "commit", "config_hash", "time"))
    assert first.versions["torch"] and first.versions["python"]
    assert first.problems() == []


@given(NUMBERS, NUMBERS)
def test_statistics_follow_their_names(baseline: list[float], lemo: list[float]):
    pair = {"baseline": baseline, "lemo": lemo}
    gain, cost = value_of(pair, "ratio_of_medians"), value_of(pair, "overhead_of_medians")
    assert gain * cost == pytest.approx(1)
    assert (gain >= 1) == (statistics.median(baseline) >= statistics.median(lemo))
    assert value_of(pair, "difference_of_means") == -value_of(pair, "reduction_of_means")
    assert value_of(lemo, "min") <= value_of(lemo, "median") <= value_of(lemo, "max")
    assert value_of(lemo, "last") == lemo[-1]


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("samples", [[], {}, {"baseline": [], "lemo": [1.0]}, {"lemo": [1.0]}])
def test_statistics_of_nothing_are_refused(statistic: str, samples):
    with pytest.raises(DataError):
        value_of(samples, statistic)


def test_comparison_without_baseline_is_refused():
    with pytest.raises(DataError, match="baseline"):
        _record(unit="ratio", setting={"statistic": "ratio_of_medians"})


@pytest.mark.parametrize("samples", [[], [float("nan")], [float("inf"), 1.0]])
def test_unfit_samples_are_refused(samples: list[float]):
    with pytest.raises(DataError):
        _record(samples=samples)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"value": 1.0}, "samples give 2.0"),
        ({"script": ""}, "no script"),
        ({"samples": []}, "no samples"),
        ({"samples": {"baseline": [], "lemo": [1.0]}}, "no samples"),
        ({"setting": {"tokens": 1}}, "statistic"),
        ({"setting": {"statistic": "mode"}}, "unknown statistic"),
        ({"setting": {"statistic": "median", "tokens": 1}}, "config_hash"),
    ],
)
def test_tampered_records_have_problems(changes: dict, problem: str):
    assert any(problem in text for text in dataclasses.replace(_record(), **changes).problems())


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "no JSON"),
        ("[1]", "JSON object"),
        ('{"name": "x"}', "missing"),
        ("EXTRA", "unknown: ['colour']"),
        ("VALUE", "value must be a number"),
        ("SAMPLES", "samples must be numbers"),
        ("SETTING", "setting has the wrong type"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, problem: str):
    good = dataclasses.asdict(_record())
    changed = {
        "EXTRA": {"colour": 1},
        "VALUE": {"value": "2"},
        "SAMPLES": {"samples": ["a"]},
        "SETTING": {"setting": 1},
    }
    line = json.dumps({**good, **changed[line]}) if line in changed else line
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps(good) + "\n\n" + line + "\n")
    with pytest.raises(DataError, match=r"r\.jsonl:3: ") as caught:
        read_records(file)
    assert problem in str(caught.value)


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        read_records(tmp_path / "absent.jsonl")


def test_config_hash_depends_on_content_not_on_order():
    assert config_hash({"a": 1, "b": [1, 2]}) == config_hash({"b": (1, 2), "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})


def test_commit_falls_back_to_the_environment_outside_a_repository(monkeypatch: pytest.MonkeyPatch):
    from lemo.measure import record

    def no_git(*_):
        raise OSError("no git")

    monkeypatch.setattr(record, "_git", no_git)
    monkeypatch.setenv("LEMO_COMMIT", "abc")
    assert record.commit() == "abc"
    monkeypatch.delenv("LEMO_COMMIT")
    assert record.commit() == "unknown"


def test_paired_standard_error_is_that_of_the_differences():
    assert paired_standard_error([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]) == 0
    assert paired_standard_error([0.0, 0.0], [1.0, 3.0]) == pytest.approx(1.0)
    with pytest.raises(DataError):
        paired_standard_error([1.0], [2.0])
