"""The benchmark of far loss rows on planted repeats, with a rigged loss, and end to end on a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import check_bars, far_rows
from benchmarks.far_rows import DRAWN, REPEATS
from lemo.measure.record import read_records
from lemo.train.data import write_npz

TOKENS, WINDOW, BLOCK = 512, 32, 8
PASSAGES = ((160, 32), (288, 32), (416, 48))  # rows that repeat the beginning


def planted_text(seed: int) -> np.ndarray:
    """Tokens that never repeat three in a row, but for passages copied from the beginning."""
    ids = 64 + np.random.default_rng(seed).permutation(TOKENS)
    for start, length in PASSAGES:
        ids[start : start + length] = ids[:length]
    return ids


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_npz(tmp_path / "planted-train.npz", [planted_text(seed) for seed in range(3)])
    return tmp_path


def arguments(data: Path, *more: str) -> list[str]:
    where = ["--data", str(data), "--domains", "planted", "--out", str(data / "r.jsonl"), "--device", "cpu"]
    sizes = ["--tokens", str(TOKENS), "--window", str(WINDOW), "--block", str(BLOCK), "--windows", "2"]
    return [*where, *sizes, "--seeds", "12", *more]


def read_values(data: Path) -> dict[str, float]:
    records = read_records(data / "r.jsonl")
    assert not any(check_bars.find_problems(record, {}) for record in records)
    assert all(len(record.samples) == record.setting["windows"] == 2 for record in records)
    assert not any(str(data) in str(record.setting) for record in records)
    return {record.name.removeprefix("far_rows/"): record.value for record in records}


def test_places_lie_in_the_window(data):
    assert far_rows.main(arguments(data)) == 0
    values = read_values(data)
    assert set(values) == {f"{name}/planted/{TOKENS}" for name in ("place/drawn", "place/repeats", "cost")}
    for by in (DRAWN, REPEATS):
        (record,) = (r for r in read_records(data / "r.jsonl") if f"place/{by}" in r.name)
        assert all(0 <= place <= 1 for place in record.samples)
    # The first passage that a local view cannot repeat lies behind a quarter of the window.
    assert values[f"place/{REPEATS}/planted/{TOKENS}"] > values[f"place/{DRAWN}/planted/{TOKENS}"]


def test_repeats_take_away_more_of_a_loss_that_follows_them(data, monkeypatch):
    """Rigged: rows of a passage lose a nat from its third on, when it can be told; all others lose nothing."""
    lost_R = torch.zeros(TOKENS - 1, dtype=torch.float64)
    for start, length in PASSAGES:
        lost_R[start + 2 : start + length] = 1
    monkeypatch.setattr(far_rows, "lost_nats", lambda *_: lost_R)
    monkeypatch.setattr(far_rows, "load_model", lambda *_, **__: torch.nn.Identity())
    far_rows.main(arguments(data, "--model", "none"))
    values = read_values(data)
    for name in ("correlation", "correlation_beyond"):
        assert values[f"{name}/planted"] == pytest.approx(1)
    assert 0.15 < values["taken/drawn/planted"] < 0.5, "about the far share of loss rows"
    assert values["taken/repeats/planted"] > values["taken/drawn/planted"] + 0.2
    assert values["lost/planted"] == pytest.approx(lost_R.mean().item())


@pytest.fixture
def model(data):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64 + TOKENS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": TOKENS}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.5)).eval()
    model.save_pretrained(data / "model")
    return model


def test_a_local_view_hides_only_what_is_far(model):
    """By its own words: rows of two chunks lose nothing, and what a later row cannot see does not reach its loss."""
    view = far_rows.local_view(TOKENS, WINDOW, BLOCK, torch.device("cpu"))[0, 0]
    row = 5 * WINDOW + 3
    assert view[row].nonzero().squeeze(-1).tolist() == [*range(BLOCK), *range(4 * WINDOW, row + 1)]
    ids_T = torch.from_numpy(planted_text(0))
    full, local = far_rows.row_losses(model, ids_T, None), far_rows.row_losses(model, ids_T, view[None, None])
    assert torch.allclose(full[: 2 * WINDOW], local[: 2 * WINDOW], atol=1e-5)
    assert (full[2 * WINDOW :] - local[2 * WINDOW :]).abs().max() > 1e-3
    expected = model(input_ids=ids_T[None], labels=ids_T[None]).loss.item()
    assert full.mean().item() == pytest.approx(expected, abs=1e-5)


def test_the_command_measures_a_model(data, model, capsys):
    assert far_rows.main(arguments(data, "--model", str(data / "model"))) == 0
    (lost,) = (r for r in read_records(data / "r.jsonl") if r.name == "far_rows/lost/planted")
    assert lost.setting["model"] == "model" and lost.setting["gram"] == 3 and lost.setting["tokens"] == TOKENS
    assert "far_rows/correlation/planted" in capsys.readouterr().out


def test_draws_that_lose_nothing_have_no_share():
    rows = far_rows.Rows(torch.ones(9, dtype=torch.bool), torch.ones(9, dtype=torch.bool), 0.0)
    assert far_rows.taken_share([rows], torch.zeros(9)) is None
    assert far_rows.taken_share([rows], torch.ones(9)) == 1


def test_correlation_is_of_sums_over_runs():
    values = torch.arange(199).double()
    assert far_rows.correlation(torch.zeros(199), values, 32) is None
    assert far_rows.correlation(values, values, 32, first=6) is None, "a single run"
    ups, downs = torch.tensor([[1.0, -1.0]] * 2), torch.tensor([[5.0, -5.0], [6.0, -6.0]])
    assert far_rows.correlation(ups.flatten(), downs.flatten(), 2) is None, "rows within a run do not count"
    first, second = torch.tensor([0.0, 0, 0, 0, 1, 1, 3, 2, 4]), torch.tensor([9.0, 9, 0, 0, -2, 0, -5, 0, -4])
    assert far_rows.correlation(first, second, 2, first=2) == pytest.approx(np.corrcoef([2, 5, 4], [-2, -5, -4])[0, 1])
