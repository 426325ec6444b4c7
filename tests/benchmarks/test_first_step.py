"""The time to the first step: which line of the metrics ends it, and which Records answer the bar."""

from __future__ import annotations

import json

import pytest

from benchmarks.check_bars import BARS, find_problems
from benchmarks.first_step import PARTS, first_step, make_records, write_text
from lemo.errors import DataError


def test_a_step_counts_when_its_line_is_whole(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert first_step(metrics) is None
    entry = json.dumps({"step": 1, "loss": 2.5})
    metrics.write_text('{"eval_loss": 3.0}\n' + entry)
    assert first_step(metrics) is None
    metrics.write_text(metrics.read_text() + "\n")
    assert first_step(metrics) == {"step": 1, "loss": 2.5}


def test_records_are_sound_and_overrides_answer_no_bar():
    seconds = {part: 10.0 * (i + 1) for i, part in enumerate(PARTS)}
    whole, *parts = make_records(seconds, {"overrides": []})
    assert whole.bar == "E.first_step_minutes" and whole.value == pytest.approx(2.5)
    assert [record.value for record in parts] == list(seconds.values())
    bars = {bar.id: bar for bar in BARS}
    assert not any(find_problems(record, bars) for record in (whole, *parts))
    assert all(record.bar is None for record in make_records(seconds, {"overrides": ["model.dtype=bfloat16"]}))
    with pytest.raises(DataError, match="install"):
        make_records({k: v for k, v in seconds.items() if k != "install"}, {"overrides": []})


def test_the_text_is_long_enough_to_try(tmp_path):
    assert write_text(tmp_path / "book.txt") > 10_000
