"""The examples run, skip rows, and leave nothing behind."""

from __future__ import annotations

import importlib

import pytest
import torch


@pytest.mark.parametrize("name", ["trainer", "trl_sft"])
def test_example_trains_with_skipped_rows(name, capsys):
    if name == "trl_sft":
        pytest.importorskip("trl")
    handle = importlib.import_module(f"examples.{name}").main()
    assert handle.sparse_batches == 4 and handle.dense_batches == 0
    assert min(backward for _, backward in handle.ratios().values()) < 1
    assert "with gradient" in capsys.readouterr().out
    # Detached: a training forward without labels, which lemo refuses, runs again.
    model = handle.model.train()
    assert model(input_ids=torch.full((1, 8), 3)).logits.shape[:2] == (1, 8)
