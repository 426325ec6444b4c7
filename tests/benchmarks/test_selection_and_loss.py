"""The benchmarks of selection and loss run end to end on a CPU, and refuse to time what is wrong."""

from __future__ import annotations

import argparse

import torch

from benchmarks import check_bars, loss, selection
from lemo.measure.record import read_records
from lemo.ops import linear_ce
from lemo.ops.linear_ce.reference import linear_ce_reference


def test_selection_writes_sound_records(tmp_path):
    out = tmp_path / "selection.jsonl"
    sizes = ["--width", "16", "--layers", "2", "--repeats", "2", "--dtype", "float32", "--block", "16"]
    assert selection.main(["--rows", "200", "333", *sizes, "--device", "cpu", "--out", str(out)]) == 0
    records = read_records(out)
    assert [record.setting["rows"] for record in records] == [200, 333]
    assert not any(check_bars.find_problems(record, {}) for record in records)
    assert all(len(record.samples) == 2 and record.unit == "us" for record in records)


def test_phases_make_up_a_layer():
    """What the phases are timed on is what a layer does: the last one returns the layer's rows."""
    options = {"width": 16, "block": 16, "keep": 0.4, "supervised": 0.2, "dtype": "float32", "device": "cpu"}
    workload = selection.Workload.draw(333, argparse.Namespace(**options))
    phases = workload.phases()
    assert torch.equal(phases["select"]().rows_N, workload.layer().forward.rows_N)
    assert torch.equal(phases["nets"](), workload.predictor.scores(workload.x_NM, workload.layout))


def _inputs():
    options = argparse.Namespace(rows=64, vocabulary=50, width=16, device="cpu")
    return loss.draw(options, 0.5)


def test_loss_agrees_with_an_independent_one():
    losses = {"lemo": linear_ce, "baseline": linear_ce_reference}
    assert loss.disagreement(losses, _inputs()) is None


def test_a_wrong_loss_is_not_timed(tmp_path, capsys):
    wrong = lambda hidden, weight, labels: 1.1 * linear_ce(hidden, weight, labels)  # noqa: E731
    options = argparse.Namespace(rows=64, vocabulary=50, width=16, device="cpu", repeats=2, out=tmp_path / "loss.jsonl")
    assert not loss.measure(options, 0.5, wrong)
    assert "NOT TIMED" in capsys.readouterr().err and not options.out.exists()


def test_loss_writes_sound_records(tmp_path):
    options = argparse.Namespace(rows=64, vocabulary=50, width=16, device="cpu", repeats=2, out=tmp_path / "loss.jsonl")
    assert loss.measure(options, 0.5, linear_ce_reference)
    (record,) = read_records(options.out)
    assert record.bar is None, "only the sizes of the bar answer it"
    assert not check_bars.find_problems(record, {})
    assert set(record.samples) == {"baseline", "lemo"}
