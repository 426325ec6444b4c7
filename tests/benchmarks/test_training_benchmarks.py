"""The GPU benchmarks run end to end on a tiny model, write sound Records, and go on where they stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import check_bars, extension, keep_all
from lemo.measure.record import read_records
from lemo.train.data import write_npz


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a tiny model and random tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    for split, windows in (("train", 9), ("validation", 3)):
        write_npz(folder / f"books-{split}.npz", [generator.integers(0, 64, 256 * windows)])
    sizes = ["--window", "256", "--batch", "1", "--rank", "2", "--dtype", "float32", "--device", "cpu"]
    counts = [
        "--validation-windows",
        "2",
        "--calibration-windows",
        "2",
        "--tune-windows",
        "1",
        "--predictor-steps",
        "20",
    ]
    return ["--model", str(folder / "model"), "--data", str(folder), *sizes, *counts]


def _records(file: Path) -> dict[str, list]:
    found: dict[str, list] = {}
    for record in read_records(file):
        found.setdefault(record.name, []).append(record)
    return found


def test_extension_writes_sound_records_and_resumes(inputs: list[str], tmp_path: Path, capsys):
    out, variants = tmp_path / "r.jsonl", "dense_rows,skip,exact_rows,exact_pairs"
    options = [*inputs, "--steps", "2", "--out", str(out), "--work", str(tmp_path / "work"), "--timing-rounds", "1"]
    assert extension.main([*options, "--variants", variants]) == 0
    records = _records(out)
    for name in variants.split(","):
        for what in ("dense_validation_loss", "sparse_validation_loss", "tokens_per_second", "peak_memory"):
            assert len(records[f"extension/{name}/{what}"]) == 1
        assert len(records[f"extension/{name}/training_loss"][0].samples) == 2
    assert records["extension/before/dense_validation_loss"][0].samples
    shares = records["extension/skip/forward_share"][0].samples
    assert shares[0] == shares[-1] == 1 and shares[1] < 1
    assert set(records["extension/exact_rows/forward_share"][0].samples) == {1}
    assert {"baseline", "lemo"} == set(records["extension/skip/speedup"][0].samples)
    assert check_bars.main([str(out)]) == 0
    assert "A.extension_gap_exact/" in capsys.readouterr().out

    assert extension.main([*options, "--variants", "skip", "--timing-rounds", "0"]) == 0
    assert "skip seed 0: done before" in capsys.readouterr().out
    assert len(_records(out)["extension/skip/tokens_per_second"]) == 1


def test_variants_start_from_the_same_losses(inputs: list[str], tmp_path: Path):
    out = tmp_path / "r.jsonl"
    options = [*inputs, "--steps", "1", "--out", str(out), "--work", str(tmp_path / "work"), "--timing-rounds", "0"]
    extension.main([*options, "--variants", "dense_rows,exact_rows"])
    first = [_records(out)[f"extension/{name}/training_loss"][0].samples[0] for name in ("dense_rows", "exact_rows")]
    assert first[0] == pytest.approx(first[1], rel=1e-5), "exact forward sees the same data, rows and weights"


def test_too_little_data_is_said(inputs: list[str], tmp_path: Path):
    with pytest.raises(SystemExit, match="windows needed"):
        extension.main([*inputs, "--steps", "50", "--out", str(tmp_path / "r.jsonl")])


def test_keep_all_compares_in_turns(inputs: list[str], tmp_path: Path):
    out = tmp_path / "r.jsonl"
    assert keep_all.main([*inputs, "--steps", "1", "--rounds", "2", "--out", str(out)]) == 0
    records = _records(out)
    assert {"keep_all/model_loss", "keep_all/segmented_loss"} == set(records)
    assert {name: len(times) for name, times in records["keep_all/model_loss"][0].samples.items()} == {
        "baseline": 2,
        "lemo": 2,
    }
    assert check_bars.main([str(out)]) == 0
