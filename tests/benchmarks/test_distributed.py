"""Two processes against one: the benchmark's runs train alike, and its Records say so."""

from __future__ import annotations

import pytest

from benchmarks import distributed
from lemo.measure.record import read_records
from tests.train.tiny import save_tiny_model, words


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    """On CPUs, without noise of half precision: losses of all steps agree."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    save_tiny_model(tmp_path / "model", layers=2)
    (tmp_path / "text.txt").write_text(words(900, seed=1))
    paths = {"model": "model", "data": "text.txt", "out": "r.jsonl"}
    files = [x for name, file in paths.items() for x in (f"--{name}", str(tmp_path / file))]
    sizes = ["--window", "128", "--windows-per-step", "2", "--steps", "3", "--dtype", "float32", "--turns", "1"]
    assert distributed.main([*files, *sizes]) == 0
    found = {record.name: record for record in read_records(tmp_path / "r.jsonl")}
    assert found["distributed/2/tokens_per_s"].value > 0
    for name in ("loss_difference", "after_difference"):
        assert found[f"distributed/2/{name}"].value < 1e-4


def test_windows_are_shared_evenly(capsys):
    with pytest.raises(SystemExit):
        distributed.main(["--model", "m", "--data", "d", "--processes", "3", "--windows-per-step", "4"])
    assert "divide" in capsys.readouterr().err
