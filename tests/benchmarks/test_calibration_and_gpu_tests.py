"""The scripts behind two bars write sound Records, and answer a bar only with what the bar asks for."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import calibration, check_bars, gpu_tests
from lemo.measure.record import read_records
from tests.gpu.kernel_hashes import kernel_hashes
from tests.train.tiny import save_tiny_model


def test_calibration_is_timed(tmp_path: Path):
    model, out = save_tiny_model(tmp_path / "model", layers=3), tmp_path / "r.jsonl"
    sizes = ["--window", "512", "--windows", "2", "--held-out", "1"]
    assert (
        calibration.main(["--shape", str(model), *sizes, "--device", "cpu", "--dtype", "float32", "--out", str(out)])
        == 0
    )
    minutes, peak = read_records(out)
    assert 0 < minutes.value < 5 and minutes.unit == "min" and minutes.bar is None, "a tiny model on a CPU is no bar"
    assert peak.unit == "GiB" and minutes.setting["layers"] == 3
    assert check_bars.main([str(out)]) == 0


def test_share_of_kernels_that_passed(tmp_path: Path, capsys):
    hashes, out = kernel_hashes(), tmp_path / "r.jsonl"
    passed = {"device": "a card", "torch": "1", "triton": "1", "tests": 10, "sha256": dict(hashes)}
    for changed, code in ((0, 0), (1, 1)):
        for path in list(hashes)[:changed]:
            passed["sha256"][path] = "0" * 64
        (tmp_path / "passed.json").write_text(json.dumps(passed))
        assert gpu_tests.main(["--passed", str(tmp_path / "passed.json"), "--out", str(out)]) == code
    whole, part = read_records(out)
    assert whole.value == 1 and part.value == 1 - 1 / len(hashes)
    assert part.bar == "C.gpu_tests" and part.setting["changed_since"] == list(hashes)[:1]
    assert "a card" in capsys.readouterr().out
