"""RefitCallback: measuring recall changes no weight, refits are in force from the step that they are made."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console

import lemo
from lemo.calibrate.session import calibrate
from lemo.calibrate.windows import Window
from lemo.config import CalibrationConfig
from lemo.core.plan import Plan
from lemo.errors import ConfigError
from lemo.eval.perplexity import evaluate_loss
from lemo.train.collate import WindowCollator
from lemo.train.loss_rows import LossRows
from lemo.train.refit import RefitCallback
from lemo.train.run import train
from lemo.train.trainer import LemoTrainer
from tests.train.test_trainer import arguments, dataset
from tests.train.tiny import save_tiny_model, tiny_llama, words

CONFIG = CalibrationConfig(pooled_features=4, predictor_width=4, predictor_rank=2, predictor_steps=4, bypass_rank=4)
COLLATOR = LossRows(WindowCollator(), 0.25, block_size=8)


def _made():
    torch.manual_seed(0)
    model = tiny_llama(layers=3)
    skeleton = Plan.uniform(model, forward_ratio=0.5, backward_ratio=0.5, dense_layers=(0,), block_size=8)
    batches = []
    for sample in dataset(2, seed=1):
        labels = COLLATOR([sample])["labels"]
        supervised = torch.cat([labels[:, 1:] != -100, torch.zeros(1, 1, dtype=torch.bool)], 1)
        batches.append({"input_ids": torch.as_tensor(sample["input_ids"])[None], "supervised": supervised})
    plan = calibrate(model, batches[:1], CONFIG, plan=skeleton, held_out=batches[1:], progress=False)
    window = Window(batches[1]["input_ids"], batches[1]["supervised"], None, None, "a", True)
    return model, plan, window


def _train(folder, **options):
    """(final weights, callback, log entries, plan before, plan after)."""
    model, plan, window = _made()
    with lemo.attach(model, plan, self_test=False) as handle:
        callbacks = []
        if options:
            windows = [window] if options.get("recall_steps") else []
            kept = {"recall_windows": windows, "config": CONFIG, "plan_folder": folder / "plan"}
            callbacks = [RefitCallback(handle, **kept, **options)]
        trainer = LemoTrainer(
            model=model,
            args=arguments(folder, max_steps=5),
            train_dataset=dataset(5),
            data_collator=COLLATOR,
            callbacks=callbacks,
            handle=handle,
            metrics_path=folder / "metrics.jsonl",
            console=Console(file=io.StringIO()),
        )
        trainer.train()
        after = handle.plan
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return model.state_dict(), callbacks, [e for e in entries if "loss" in e], plan, after


def test_recall_is_logged_and_changes_no_weight(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    plain, *_ = _train(tmp_path / "a")
    weights, (callback,), entries, before, after = _train(tmp_path / "b", recall_steps=2)
    assert all(torch.equal(plain[key], weights[key]) for key in plain)
    assert after is before and not (tmp_path / "b" / "plan").exists()
    assert [step for step, _ in callback.recalls] == [0, 2, 4]
    assert all(0 <= value <= 1 for _, value in callback.recalls)
    # The first value joins the first entry.
    logged = {e["step"]: e["predictor_recall"] for e in entries if "predictor_recall" in e}
    values = [value for _, value in callback.recalls]
    assert list(logged) == [1, 2, 4] and list(logged.values()) == pytest.approx(values)


def test_a_refit_is_in_force_from_its_step_on(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    plain, _, untouched, *_ = _train(tmp_path / "a")
    weights, (callback,), entries, before, after = _train(tmp_path / "b", refit_steps=2)
    assert set(callback.explained) == {1, 2}
    for old, new in zip(before.layers, after.layers, strict=True):
        assert dataclasses.replace(new, bypass=old.bypass) == old
        assert (new.bypass is old.bypass) == (old.bypass is None)
    saved = Plan.load(tmp_path / "b" / "plan")
    torch.testing.assert_close(saved.layers[1].bypass.down_MR, after.layers[1].bypass.down_MR)
    losses = [[e["loss"] for e in part] for part in (untouched, entries)]
    assert losses[0][:2] == losses[1][:2] and losses[0][2] != losses[1][2]
    assert not torch.equal(plain["lm_head.weight"], weights["lm_head.weight"])


def test_bad_settings_are_refused():
    model, plan, window = _made()
    with lemo.attach(model, plan, self_test=False) as handle:
        with pytest.raises(ConfigError, match="positive"):
            RefitCallback(handle, refit_steps=0)
        with pytest.raises(ConfigError, match="recall_windows"):
            RefitCallback(handle, recall_steps=1)
    dense = Plan.uniform(3, forward_ratio=1.0, backward_ratio=0.5, block_size=8)
    with lemo.attach(model, dense, self_test=False) as handle, pytest.raises(ConfigError, match="predictors"):
        RefitCallback(handle, recall_steps=1, recall_windows=[window])


def test_a_recipe_asks_for_refits_recall_and_hard_rows(tmp_path):
    from tests.train.test_run import recipe

    save_tiny_model(tmp_path / "model", layers=3)
    for name in ("train", "validation"):
        (tmp_path / f"{name}.txt").write_text(words(200, seed=len(name)))
    run = recipe(
        tmp_path,
        tmp_path / "out",
        loss_rows={"share": 0.25, "placement": "hardest", "reweight": True},
        sparsity={"forward_ratio": 0.6, "scorer": "predictor", "dense_layers": (0,)},
        calibration={**dataclasses.asdict(CONFIG), "windows": 2, "tune_windows": 1},
        training={"refit_steps": 2, "recall_steps": 2},
    )
    result = train(run, evaluate_loss, console=Console(file=io.StringIO()))
    assert result.steps == 4 and result.dense_batches == 0
    entries = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {e["step"] for e in entries if "predictor_recall" in e} == {1, 2, 4}
    first, last = Plan.load(tmp_path / "out" / "calibration" / "plan"), Plan.load(tmp_path / "out" / "plan")
    assert not torch.equal(first.layers[1].bypass.down_MR, last.layers[1].bypass.down_MR)
