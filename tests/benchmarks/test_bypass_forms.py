"""Forms of the bypass side by side, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bypass_forms, check_bars
from lemo.measure.record import read_records
from lemo.train.data import write_npz
from tests.train.tiny import save_tiny_model

WINDOW = 256


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_model(folder / "model", layers=4, max_position_embeddings=WINDOW)
    generator = np.random.default_rng(0)
    for split, windows in (("train", 4), ("validation", 2)):
        write_npz(folder / f"books-{split}.npz", [generator.integers(0, 64, WINDOW * windows)])
    return folder


def test_every_form_is_measured_once(inputs: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(bypass_forms, "STEPS", 5)
    places = ["--model", str(inputs / "model"), "--data", str(inputs), "--out", str(tmp_path / "r.jsonl")]
    sizes = ["--domains", "books", "--window", str(WINDOW), "--block", "16", "--loss-rows", "32", "--held-out", "2"]
    assert bypass_forms.main([*places, *sizes]) == 0
    records = {r.name.split("/")[1]: r for r in read_records(tmp_path / "r.jsonl")}
    assert set(records) == set(bypass_forms.FORMS) and all(len(r.samples) == 2 for r in records.values())
    assert check_bars.main([str(tmp_path / "r.jsonl")]) == 0
    capsys.readouterr()
    assert bypass_forms.main([*places, *sizes]) == 0
    assert capsys.readouterr().out.count("done before") == len(bypass_forms.FORMS)


def test_forms_fit_what_they_can(inputs: Path):
    torch.manual_seed(0)
    x, block = torch.randn(512, 96), torch.arange(512) // 16
    low = 0.1 * torch.randn(96, 8) @ torch.randn(8, 96)
    aim = bypass_forms.rms_normalise(x) @ low
    rows = bypass_forms.Rows(x, torch.randn(512, 96), aim, 0.3 * aim, torch.ones(512), block)
    for form in ("rank_16", "full", "halves", "nonlinear", "representative"):
        left = aim - bypass_forms.FORMS[form]([rows])(rows)
        assert float(left.square().sum() / aim.square().sum()) < (0.2 if form == "representative" else 0.01), form
    assert not bypass_forms.FORMS["none"]([rows])(rows).any()
    shared = bypass_forms.Rows(x, aim[block * 16 + 8], aim[block * 16 + 8], aim, torch.ones(512), block)
    found = bypass_forms.FORMS["representative"]([shared])(shared)
    torch.testing.assert_close(found, shared.aim_NM, rtol=1e-3, atol=1e-3)
