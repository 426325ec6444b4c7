"""Whole runs on a tiny model: what they write, refuse, resume, and that supervised rows are never skipped."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal

import pytest
import torch

import lemo
from lemo.config import (
    CalibrationConfig,
    DataConfig,
    LoraConfig,
    LossRowsConfig,
    ModelConfig,
    RunConfig,
    SparsityConfig,
    TrainingConfig,
)
from lemo.core.plan import Plan
from lemo.errors import ConfigError, DataError, PlanError
from lemo.eval.perplexity import evaluate_loss
from lemo.train.checkpoint import RunFolder
from lemo.train.collate import WindowCollator
from lemo.train.data import load_windows
from lemo.train.identity import run_identity
from lemo.train.model import load_model, load_tokenizer
from lemo.train.planning import skeleton_plan, training_collator, validation_batches
from lemo.train.run import train
from tests.architecture.rules import ROOT
from tests.train.tiny import save_empty_checkpoint


@pytest.fixture
def quiet():
    from rich.console import Console

    return Console(file=open(os.devnull, "w"))


def recipe(base, output, **sections):
    run = RunConfig(
        output=str(output),
        model=ModelConfig(path=str(base / "model"), dtype="float32"),
        data=DataConfig(
            train=(str(base / "train.txt"),),
            validation=(str(base / "validation.txt"),),
            window_tokens=128,
            validation_windows=2,
        ),
        loss_rows=LossRowsConfig(share=0.3),
        sparsity=SparsityConfig(
            forward_ratio=1.0, backward_ratio=0.6, scorer="random", block_size=16, dense_layers=(0, -1)
        ),
        lora=LoraConfig(rank=2),
        training=TrainingConfig(max_steps=4, learning_rate=1e-2, batch_size=2, warmup_steps=1),
    )
    for name, changes in sections.items():
        run = dataclasses.replace(run, **{name: dataclasses.replace(getattr(run, name), **changes)})
    return run


def adapter_of(output):
    from safetensors.torch import load_file

    return load_file(output / "adapter" / "adapter_model.safetensors")


def test_exact_forward_run_learns_and_writes_everything(base, tmp_path, quiet):
    result = train(recipe(base, tmp_path / "run"), evaluate_loss, console=quiet)
    assert result.losses["dense after"] < result.losses["dense before"]
    assert set(result.losses) == {"dense before", "dense after"}
    assert result.steps == 4 and not result.interrupted
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names >= {"adapter", "plan", "recipe.yaml", "metrics.jsonl", "summary.json", "run.json"}
    assert "checkpoints" not in names or not list((tmp_path / "run" / "checkpoints").iterdir())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        assert line["tokens_per_s"] > 0 and line["peak_memory_bytes"] >= line["memory_bytes"] * 0.5
        assert line["forward_ratio"] == 1.0
        # First and last of three layers are dense, the middle one passes 5 of 8 blocks at least.
        assert 0 < line["backward_ratio"] < 1
        assert {k for k, (forward, backward) in line["layer_ratios"].items() if backward < 1} == {"1"}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["losses"] == result.losses and summary["steps"] == 4
    assert Plan.load(tmp_path / "run" / "plan").layers[1].backward_ratio == 0.6
    assert result.tokens_per_s > 0 and result.dense_batches == 0


def test_a_run_repeats_bit_for_bit_and_saving_does_not_change_it(base, tmp_path, quiet):
    first = train(recipe(base, tmp_path / "a"), evaluate_loss, console=quiet)
    second = train(recipe(base, tmp_path / "b", training={"save_steps": 2}), evaluate_loss, console=quiet)
    assert first.losses == second.losses
    a, b = adapter_of(tmp_path / "a"), adapter_of(tmp_path / "b")
    assert all(torch.equal(a[key], b[key]) for key in a) and len(a) == len(b)


def test_interrupted_run_resumes_to_the_same_result(base, tmp_path, quiet, monkeypatch):
    whole = train(recipe(base, tmp_path / "whole"), evaluate_loss, console=quiet)

    from lemo.train.callback import LemoCallback

    after_step = LemoCallback.on_step_end

    def stop_at_two(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return after_step(self, args, state, control, **kwargs)

    run = recipe(base, tmp_path / "cut")
    handlers = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(LemoCallback, "on_step_end", stop_at_two)
        stopped = train(run, evaluate_loss, console=quiet)
    assert signal.getsignal(signal.SIGINT) is handlers
    assert stopped.interrupted and stopped.steps == 2
    assert not (tmp_path / "cut" / "summary.json").exists()
    with pytest.raises(ConfigError, match=r"checkpoint-2 of this run; take it up with --resume"):
        train(run, evaluate_loss, console=quiet)
    resumed = train(run, evaluate_loss, resume=True, console=quiet)
    assert resumed.steps == 4 and not resumed.interrupted
    assert resumed.losses == whole.losses
    a, b = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_save_now_writes_one_full_checkpoint(base, tmp_path, quiet, monkeypatch):
    from lemo.train.checkpoint import SaveOnRequest

    after_step = SaveOnRequest.on_step_end

    def touch(self, args, state, control, **kwargs):
        if state.global_step == 2:
            (tmp_path / "run" / "save-now").touch()
        return after_step(self, args, state, control, **kwargs)

    monkeypatch.setattr(SaveOnRequest, "on_step_end", touch)
    train(recipe(base, tmp_path / "run"), evaluate_loss, console=quiet)
    checkpoints = list((tmp_path / "run" / "checkpoints").iterdir())
    assert [p.name for p in checkpoints] == ["checkpoint-2"]
    files = {p.name for p in checkpoints[0].iterdir()}
    assert files >= {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"}
    assert not (tmp_path / "run" / "save-now").exists()


def test_several_processes_that_cannot_be_joined_are_refused_before_anything_is_written(
    base, tmp_path, quiet, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK is not set"):
        train(recipe(base, tmp_path / "run"), evaluate_loss, console=quiet)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="FSDP"):
        train(recipe(base, tmp_path / "run"), evaluate_loss, console=quiet)
    assert not (tmp_path / "run").exists()


def test_output_folders_are_never_overwritten(base, tmp_path, quiet):
    run = recipe(base, tmp_path / "run", training={"max_steps": 1})
    train(run, evaluate_loss, console=quiet)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="is finished; name another folder"):
        train(run, evaluate_loss, console=quiet)
    other = dataclasses.replace(run, training=dataclasses.replace(run.training, learning_rate=1e-3))
    with pytest.raises(ConfigError, match="belongs to another run"):
        train(other, evaluate_loss, console=quiet)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"files that are no run \(thesis.txt"):
        train(dataclasses.replace(run, output=str(tmp_path / "full")), evaluate_loss, console=quiet)
    with pytest.raises(ConfigError, match="holds no run to resume"):
        train(dataclasses.replace(run, output=str(tmp_path / "new")), evaluate_loss, resume=True, console=quiet)
    with pytest.raises(ConfigError, match="output is empty"):
        train(dataclasses.replace(run, output=""), evaluate_loss, console=quiet)
    assert not (tmp_path / "new").exists()


def test_a_resumed_run_logs_each_step_once(base, tmp_path):
    run = recipe(base, tmp_path / "run")
    RunFolder.open(run).begin("{}\n")
    save_empty_checkpoint(tmp_path / "run" / "checkpoints" / "checkpoint-2")
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3)))
    RunFolder.open(run, resume=True).begin("{}\n")
    assert (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() == ['{"step": 1}', '{"step": 2}']
    assert (tmp_path / "run" / "metrics.aborted.jsonl").read_text().splitlines() == ['{"step": 3}']


def test_a_folder_of_a_run_that_was_refused_before_it_began_is_free(base, tmp_path):
    RunFolder.open(recipe(base, tmp_path / "run")).begin("{}\n")
    other = recipe(base, tmp_path / "run", lora={"rank": 3})
    folder = RunFolder.open(other)
    folder.begin("{}\n")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config_hash"] == run_identity(other)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="another run"):
        RunFolder.open(recipe(base, tmp_path / "run"))


def test_identity_ignores_where_and_how_often_one_looks():
    run = RunConfig(output="a")
    same = dataclasses.replace(run, output="b", training=TrainingConfig(logging_steps=9, save_steps=3, eval_steps=2))
    assert run_identity(run) == run_identity(same)
    assert run_identity(run) != run_identity(dataclasses.replace(run, lora=LoraConfig(rank=3)))


def test_a_cut_off_checkpoint_is_not_resumed(base, tmp_path):
    run = recipe(base, tmp_path / "run")
    RunFolder.open(run).begin("{}\n")
    (tmp_path / "run" / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        RunFolder.open(run, resume=True)
    assert RunFolder.open(run).resume_from is None


def test_mistakes_in_data_and_plan_write_nothing(base, tmp_path, quiet):
    (base / "broken.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    broken = recipe(base, tmp_path / "run", data={"train": (str(base / "broken.jsonl"),)})
    with pytest.raises(DataError, match=r"broken\.jsonl, row 2"):
        train(broken, evaluate_loss, console=quiet)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"training: .*no_such"):
        train(recipe(base, tmp_path / "opt", training={"optimizer": "no_such"}), evaluate_loss, console=quiet)
    Plan.uniform(7).save(tmp_path / "plan")
    other = recipe(base, tmp_path / "plan-run", sparsity={"plan": str(tmp_path / "plan")})
    with pytest.raises((PlanError, ConfigError)):
        train(other, evaluate_loss, console=quiet)


def test_skipping_run_calibrates_and_evaluates_sparsely(base, tmp_path, quiet):
    run = recipe(
        base,
        tmp_path / "run",
        sparsity={"forward_ratio": 0.6, "scorer": "predictor"},
        training={"max_steps": 2},
        # Loss rows at the end: every skipped row stands before them, so that skipping must show in their loss.
        loss_rows={"placement": "tail"},
    )
    calibration = CalibrationConfig(
        windows=2,
        tune_windows=1,
        pooled_features=8,
        predictor_width=8,
        predictor_rank=4,
        predictor_steps=5,
        bypass_rank=4,
    )
    result = train(dataclasses.replace(run, calibration=calibration), evaluate_loss, console=quiet)
    names = ("dense", "dense, loss rows", "sparse, loss rows")
    assert set(result.losses) == {f"{name} {when}" for name in names for when in ("before", "after")}
    assert result.losses["sparse, loss rows after"] != result.losses["dense, loss rows after"]
    plan = Plan.load(tmp_path / "run" / "plan")
    assert plan.layers[1].bypass is not None and plan.layers[1].predictor is not None
    assert {layer for layer, (forward, _) in result.ratios.items() if forward < 1} == {1}


def test_dense_run_skips_nothing_and_plain_model_loss_agrees(base, tmp_path, quiet):
    losses = {}
    for loss in ("segmented", "model"):
        run = recipe(base, tmp_path / loss, sparsity={"enabled": False}, training={"loss": loss})
        losses[loss] = train(run, evaluate_loss, console=quiet).losses["dense after"]
    assert losses["segmented"] == pytest.approx(losses["model"], rel=1e-5)


def test_supervised_rows_are_never_skipped(base, tmp_path, quiet, monkeypatch):
    from lemo.runtime.batch import supervised_rows
    from lemo.train.trainer import LemoTrainer

    seen = []
    step = LemoTrainer.training_step

    def check(self, model, inputs, *args, **kwargs):
        rows = supervised_rows(inputs).reshape(-1).nonzero().squeeze(-1)
        output = step(self, model, inputs, *args, **kwargs)
        chosen = [s.backward.chosen() for s in self.handle.selections.values() if not s.is_dense]
        assert all(torch.isin(rows, each).all() for each in chosen)
        seen.extend(len(rows) for _ in chosen)
        return output

    monkeypatch.setattr(LemoTrainer, "training_step", check)
    train(recipe(base, tmp_path / "run", sparsity={"backward_ratio": 0.4}), evaluate_loss, console=quiet)
    assert len(seen) == 4 and min(seen) > 0


def test_the_calls_in_the_readme_are_what_a_recipe_without_keys_does(base):
    run = RunConfig(model=ModelConfig(path=str(base / "model"), dtype="float32"))
    model = load_model(run.model)
    text = (ROOT / "README.md").read_text()
    calls = {name: re.search(rf"{name} = (lemo\.\w.*?\))(  #.*)?$", text, re.M)[1] for name in ("plan", "collator")}
    known = {"lemo": lemo, "model": model, "collator": WindowCollator(pad_id=0)}
    plan, collator = (eval(calls[name], known) for name in ("plan", "collator"))
    assert plan == skeleton_plan(model, run)
    made = [{k: v for k, v in vars(c).items() if k != "collator"} for c in (collator, training_collator(run, None))]
    assert made[0] == made[1]


def test_local_loss_rows_pass_gradient_besides_the_others(base, tmp_path, quiet):
    sparsity = {"context_window": 32, "gradient": "keys", "backward_ratio": 0.3, "dense_layers": ()}
    loss_rows = {"share": 0.25, "span": None}
    ratios = {}
    for share in (0.0, 0.4):
        run = recipe(
            base,
            tmp_path / f"run-{share}",
            sparsity=sparsity,
            loss_rows=loss_rows | {"local_share": share},
            training={"max_steps": 1},
        )
        ratios[share] = [backward for _, backward in train(run, evaluate_loss, console=quiet).ratios.values()]
    assert all(more > few + 0.2 for few, more in zip(*ratios.values(), strict=True))
    dataset, _ = load_windows(run.data, load_tokenizer(run.model), "validation")
    batches = validation_batches(run, None, dataset, loss_rows=True)
    assert all("local_rows" not in batch and (batch["labels"] != -100).any() for batch in batches)
    plan = Plan.load(tmp_path / "run-0.4" / "plan")
    assert plan.local_forward == "near"
    dataclasses.replace(plan, context_window=None).save(tmp_path / "blind")
    blind = recipe(
        base, tmp_path / "refused", sparsity={"plan": str(tmp_path / "blind")}, loss_rows=vars(run.loss_rows)
    )
    with pytest.raises(ConfigError, match=r"local_share needs sparsity\.context_window"):
        train(blind, evaluate_loss, console=quiet)


def test_local_loss_rows_are_the_same_in_small_batches(base, tmp_path, quiet):
    """Each sample brings its own; the loss is a mean over both kinds of rows of the whole step."""
    sections = {
        "sparsity": {"context_window": 32, "backward_ratio": 0.3, "dense_layers": (), "local_forward": "all"},
        "loss_rows": {"share": 0.25, "span": None, "local_share": 0.4},
    }
    found = []
    for batch in (2, 1):
        training = {"batch_size": batch, "gradient_accumulation_steps": 2 // batch, "max_steps": 2, "engine": "fused"}
        run = recipe(base, tmp_path / f"run-{batch}", training=training, **sections)
        train(run, evaluate_loss, console=quiet)
        found.append(adapter_of(tmp_path / f"run-{batch}"))
        assert Plan.load(tmp_path / f"run-{batch}" / "plan").local_forward == "all"
    assert all(torch.allclose(found[0][name], x, atol=1e-5) for name, x in found[1].items())
    assert any(x.abs().max() > 1e-3 for name, x in found[0].items() if "lora_B" in name), "both have learned"
