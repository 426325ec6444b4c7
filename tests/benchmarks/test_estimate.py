"""The grid of estimates: measured once a point, fitted on one half, judged on the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import estimate
from benchmarks.estimate_points import Point, exact, grid, held_out
from lemo.errors import LemoError
from lemo.measure.attention_memory import Workspace
from lemo.measure.step_memory import MemoryConstants
from lemo.train import rehearsal

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(rehearsal.SHAPES, "tiny", TINY)
    return [
        Point("tiny", 512, "lin", 0.5, "all"),
        Point("tiny", 256, "none", 0.3, forward=1.0),
        Point("tiny", 256, "layer", 0.5, engine="generic"),
        Point("tiny", 256, "none", 1.0, engine="plain"),
        exact("tiny", 512, "mlp", offload=True),
    ]


def test_the_halves_are_large_enough_and_fixed():
    """At least 44 points; 20 held out, 10 of them of a 7B shape at 32K tokens or more; order does not matter."""
    points = grid()
    apart = held_out(points)
    assert len({p.key for p in points}) == len(points) >= 44
    assert apart == held_out(points[::-1])
    held = [p for p in points if p.key in apart]
    assert len(held) >= 20 and sum(p.is_large for p in held) >= 10
    assert len(points) - len(held) >= 20
    assert {p.recompute for p in held} == {"none", "mlp", "lin", "layer"}
    assert {p.engine for p in held} == {p.engine for p in points}


def test_both_halves_have_the_default():
    """Exact forward of the default preset: with and without offload, at 32K or more of both large shapes."""
    apart = held_out(grid())
    large = [p for p in grid() if p.preset == "balanced" and p.is_large]
    for half in (True, False):
        found = {(p.shape, bool(p.offload)) for p in large if (p.key in apart) == half}
        assert found == {(shape, offload) for shape in ("llama2-7b", "llama3-8b") for offload in (True, False)}
    setting = large[0].setting()
    assert (setting.gradient, setting.dense_layers, setting.predictor, setting.bypass_rank) == ("keys", 0, False, 0)
    assert setting.forward_ratio == 1 and setting.backward_ratio == setting.loss_share == 0.12


def test_points_are_measured_once(tiny, tmp_path):
    """Every engine runs its steps; what the work file holds is not measured again; a short budget begins nothing."""
    work = tmp_path / "w.jsonl"
    assert not estimate.measure(tiny, work, 0.0, "cpu") and not work.exists()
    assert estimate.measure(tiny, work, 1e9, "cpu")
    cells = estimate.read_cells(work)
    assert {cells[p.key]["status"] for p in tiny} == {"ok"}
    assert all(len(cells[p.key]["losses"]) == 2 and cells[p.key]["peak_bytes"] > 0 for p in tiny)
    before = work.read_text()
    assert estimate.measure(tiny, work, 1e9, "cpu") and work.read_text() == before


def test_fit_finds_the_constants_that_made_the_peaks(tiny):
    """Steps of several kinds, whose peaks follow from known constants, give these constants back."""
    truth = replace(MemoryConstants(), fixed_bytes=96 * estimate.MIB, share=0.02, attention=Workspace(5.0, 2.0))
    points = [replace(p, tokens=n) for p in tiny for n in (4096, 65536, 262144)]
    measured = [(p, {"peak_bytes": estimate.predicted_bytes(p, truth)}) for p in points]
    found = estimate.fit(measured)
    assert max(abs(estimate.error_of(p, cell, found)) for p, cell in measured) < 0.01
    assert abs(found.fixed_bytes - truth.fixed_bytes) <= 16 * estimate.MIB


def test_too_few_points_make_no_record(tiny):
    cells = [(p, {"peak_bytes": 1, "seconds": 1.0, "commit": "c", "device": "d"}) for p in tiny]
    with pytest.raises(LemoError, match="5 held-out points"):
        estimate.make_record(cells)


def test_a_record_counts_points_within_ten_percent(tiny):
    """Two of 24 points lie outside."""
    points = [Point("llama2-7b", 32768 + 64 * n, layers=2) for n in range(24)]
    exact = [estimate.predicted_bytes(p, estimate.CONSTANTS) for p in points]
    peaks = [size * (1.2 if n < 2 else 1.05) for n, size in enumerate(exact)]
    cells = [{"peak_bytes": x, "seconds": 1.0, "commit": "c", "device": "d"} for x in peaks]
    record = estimate.make_record(list(zip(points, cells, strict=True)))
    assert record.value == pytest.approx(22 / 24) and record.bar == "E.estimate_share"
    assert torch.tensor(list(record.setting["errors"].values())).lt(0).all()
