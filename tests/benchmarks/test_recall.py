"""The calibration benchmark runs end to end on a tiny model and writes Records that check_bars believes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import check_bars, recall
from lemo.measure.record import read_records
from lemo.train.data import write_npz


def test_recall_writes_a_sound_record_for_each_bar(tmp_path: Path, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    generator = np.random.default_rng(0)
    for domain in ("a", "b"):
        for split in ("train", "validation"):
            write_npz(tmp_path / f"{domain}-{split}.npz", [generator.integers(0, 64, 1024 * 4)])
    out = tmp_path / "r.jsonl"
    paths = ["--model", str(tmp_path / "model"), "--data", str(tmp_path), "--work", str(tmp_path / "work")]
    sizes = ["--window", "1024", "--windows", "2", "--held-out", "1", "--gain-windows", "2", "--steps", "15"]
    where = ["--domains", "a", "--unseen", "b", "--device", "cpu", "--dtype", "float32", "--tune-steps", "1"]
    recall.main([*paths, *sizes, *where, "--out", str(out)])
    records = {record.bar: record for record in read_records(out)}
    bars = ("recall_in_domain", "recall_shifted", "predictor_share/llama-3-8b", "elastic_size", "threshold_gain")
    assert {f"A.{bar}" for bar in bars} < set(records)
    assert len(records["A.recall_in_domain"].samples) == 2
    assert records["A.elastic_size"].value <= 0.65
    gain = records["A.threshold_gain"].setting
    assert gain["kept_lemo"] == pytest.approx(gain["kept_baseline"], abs=0.08)
    capsys.readouterr()
    assert check_bars.main([str(out)]) == 0
