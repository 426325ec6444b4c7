"""Facts that a question needs: what words find, a draw does not."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks.kept_facts import SCORERS, kept_share, measure
from lemo.eval.needle import make_prompt
from lemo.eval.ruler import TASKS
from lemo.measure.record import read_records
from tests.train.tiny import byte_tokenizer


def test_a_record_for_each_task_and_scorer(tmp_path: Path):
    sizes = {"length": 4096, "ratio": 0.3, "prompts": 2, "block": 16}
    options = argparse.Namespace(**sizes, tokenizer="work/bytes", out=tmp_path / "r.jsonl")
    measure(byte_tokenizer(), options)
    records = read_records(options.out)
    assert {(r.setting["task"], r.setting["scorer"]) for r in records} == {(t, s) for t in TASKS for s in SCORERS}
    assert all(len(r.samples) == 2 and not r.problems() for r in records)


@pytest.mark.parametrize("ratio", [0.2, 1.0])
def test_shares_are_of_the_rows_of_the_facts(ratio: float):
    prompts = [make_prompt("multi_value", TASKS["multi_value"], byte_tokenizer(), 4096, seed=s) for s in range(4)]
    shares = {scorer: [kept_share(p, scorer, ratio, 16, 0) for p in prompts] for scorer in SCORERS}
    assert all(0 <= x <= 1 for found in shares.values() for x in found)
    if ratio == 1:
        assert all(x == 1 for found in shares.values() for x in found)
    else:
        assert fmean(shares["random"]) == pytest.approx(ratio, abs=0.2)
