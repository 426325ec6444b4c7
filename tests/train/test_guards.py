"""A number that is not finite costs a step, not the run; weights that are not finite are never saved."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import Trainer

from lemo.eval.perplexity import evaluate_loss
from lemo.train.guards import DivergedError
from lemo.train.run import train
from tests.train.test_run import adapter_of, recipe


def spoil(monkeypatch, steps, value=math.nan, *, loss=False):
    """Gradients, or losses alone, are not finite in these steps."""
    step = Trainer.training_step

    def spoiled(self, model, inputs, *args, **kwargs):
        found = step(self, model, inputs, *args, **kwargs)
        if self.state.global_step + 1 in steps:
            if loss:
                return torch.full_like(found, value)
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = value
        return found

    monkeypatch.setattr(Trainer, "training_step", spoiled)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("loss", [False, True])
def test_a_step_that_is_not_finite_is_skipped_and_said(base, tmp_path, screen, monkeypatch, value, loss):
    spoil(monkeypatch, {2}, value, loss=loss)
    seen = {}
    step = torch.optim.AdamW.step

    def watch(self, *args, **kwargs):
        number = len(seen) + 1
        before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        if len(before) == 1:  # tried out before the model is loaded
            return step(self, *args, **kwargs)
        found = step(self, *args, **kwargs)
        after = [p for group in self.param_groups for p in group["params"]]
        seen[number] = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    training = {"warmup_steps": 0, "weight_decay": 0.5}
    result = train(recipe(base, tmp_path / "run", training=training), evaluate_loss, console=screen)
    assert seen == {1: False, 2: True, 3: False, 4: False}
    assert all(torch.isfinite(x).all() for x in adapter_of(tmp_path / "run").values())
    assert result.losses["dense after"] < result.losses["dense before"]
    assert any("1 step was skipped" in note and note.endswith(": 2") for note in result.notes)
    said = [line for line in screen.file.getvalue().splitlines() if "not finite" in line]
    assert len(said) == 1 and "in step 2 (samples train.txt#" in said[0]
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [e for e in entries if "learning_rate" in e]
    assert [e.get("skipped_steps") for e in logged] == [None, 1, 1, 1]
    # Trainer's sum of losses would stay NaN.
    assert all(math.isfinite(e["loss"]) for e in logged) and logged[0]["loss"] != logged[2]["loss"]


def test_three_in_a_row_end_the_run_and_its_checkpoints_are_good(base, tmp_path, screen, monkeypatch):
    spoil(monkeypatch, {2, 4, 5, 6})
    run = recipe(base, tmp_path / "run", training={"max_steps": 9, "save_steps": 1, "save_total_limit": None})
    with pytest.raises(DivergedError, match=r"in step 6 .*as in the 2 steps before; training ends here"):
        train(run, evaluate_loss, console=screen)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {p.name for p in checkpoints.iterdir()} == {f"checkpoint-{step}" for step in (1, 2, 3, 4, 5)}
    from safetensors.torch import load_file

    for path in checkpoints.iterdir():
        assert all(torch.isfinite(x).all() for x in load_file(path / "adapter_model.safetensors").values())
    assert not (tmp_path / "run" / "adapter").exists() and not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("saves", [True, False])
def test_weights_that_are_not_finite_are_not_saved(base, tmp_path, screen, monkeypatch, saves):
    """The last step ruins them: no gradient tells."""
    step = torch.optim.AdamW.step

    def ruin(self, *args, **kwargs):
        found = step(self, *args, **kwargs)
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 4:
            self.param_groups[0]["params"][0].data.view(-1)[0] = math.nan
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", ruin)
    run = recipe(base, tmp_path / "run", training={"save_steps": 2 if saves else None})
    what = "step 4" if saves else "the adapter"
    with pytest.raises(DivergedError, match=f"{what} is not saved: trained weights are not finite"):
        train(run, evaluate_loss, console=screen)
    checkpoints = tmp_path / "run" / "checkpoints"
    found = [p.name for p in checkpoints.iterdir()] if checkpoints.exists() else []
    assert found == (["checkpoint-2"] if saves else []) and not (tmp_path / "run" / "adapter").exists()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Where two gloo processes left runs in which the second has a number that is not finite."""
    from tests.distributed.test_wrapped import run_ranks
    from tests.distributed.train_worker import prepare

    folder = tmp_path_factory.mktemp("guard-ranks")
    prepare(folder)
    run_ranks(folder, "tests.train.guard_worker")
    return folder


@pytest.mark.parametrize("name", ["loss", "gradient"])
def test_two_processes_skip_alike(ranks, name):
    first, second = (json.loads((ranks / f"{name}.{rank}.json").read_text()) for rank in (0, 1))
    assert first.get("error") is None, first["error"]
    assert first["steps"] == second["steps"] == 4 and first["losses"] == second["losses"]
    assert first["skipped"] == second["skipped"] == [2] and first["weights"] == second["weights"]
    assert "not finite in step 2" in first["screen"] and second["screen"] == ""
    assert all(torch.isfinite(x).all() for x in adapter_of(ranks / name).values())


def test_two_processes_are_stopped_in_the_same_batch_and_go_on_to_the_same_bits(ranks):
    first, second = (json.loads((ranks / f"cut.{rank}.json").read_text()) for rank in (0, 1))
    assert [(one.get("interrupted"), one.get("steps")) for one in (first, second)] == [(True, 2)] * 2, first
    resumed, whole = (json.loads((ranks / f"{name}.0.json").read_text()) for name in ("resumed", "whole"))
    assert resumed["steps"] == 4 and resumed["losses"] == whole["losses"] and resumed["weights"] == whole["weights"]
