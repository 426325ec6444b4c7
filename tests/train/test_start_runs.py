"""Runs that go on from a saved adapter: where they begin, how they are resumed, and that they need it no more then."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lemo.cli.main import app
from lemo.cli.recipe import load_recipe
from lemo.core.plan import Plan
from lemo.eval.perplexity import evaluate_loss
from lemo.train.callback import LemoCallback
from lemo.train.master import MASTER
from lemo.train.run import train

RECIPE = """
output: {out}
model: {{path: {base}/model, dtype: {dtype}}}
data: {{train: [{base}/train.txt], validation: [{base}/validation.txt], window_tokens: 128, validation_windows: 2}}
loss_rows: {{share: 0.3, span: 16}}
sparsity: {{backward_ratio: 0.6, block_size: 16, context_window: 32, dense_layers: [0, -1]}}
lora: {lora}
training: {{max_steps: 3, learning_rate: 1e-2, save_steps: 1}}
"""


def write(base, folder, name, lora, dtype="float32"):
    """A recipe whose run goes beside it."""
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.format(base=base, out=folder / name, lora=json.dumps(lora), dtype=dtype))
    return path


def go(recipe, screen, **options):
    """Trains, and returns the result and what was printed."""
    begin = screen.file.tell()
    result = train(load_recipe(recipe), evaluate_loss, console=screen, **options)
    return result, screen.file.getvalue()[begin:]


def adapter_of(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def first_run(base, folder, screen, dtype="float32", **lora):
    result, _ = go(write(base, folder, "first", {"rank": 2, **lora}, dtype), screen)
    return result


@pytest.mark.parametrize("lora", [{}, {"use_dora": True, "use_rslora": True, "modules_to_save": ["norm"]}])
def test_it_begins_at_the_loss_of_the_adapter_with_a_schedule_of_its_own(base, tmp_path, screen, lora):
    first = first_run(base, tmp_path, screen, **lora)
    again = write(base, tmp_path, "again", {"adapter": str(tmp_path / "first" / "adapter")})
    result, said = go(again, screen)
    assert result.losses["dense before"] == first.losses["dense after"]
    assert result.losses["dense after"] != result.losses["dense before"]
    assert f"trainable parameters, going on from {tmp_path}/first/adapter\n" in said
    rates = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert next((x["step"], x["learning_rate"]) for x in rates if "learning_rate" in x) == (1, 1e-2)
    before, after = adapter_of(tmp_path / "first"), adapter_of(tmp_path / "again")
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)


def test_a_checkpoint_serves_as_well_as_an_adapter(base, tmp_path, screen):
    first_run(base, tmp_path, screen)
    last = tmp_path / "first" / "checkpoints" / "checkpoint-3"
    losses = [
        go(write(base, tmp_path, name, {"adapter": str(path)}), screen)[0].losses
        for name, path in (("a", last), ("b", tmp_path / "first" / "adapter"))
    ]
    assert losses[0] == losses[1]


def stop(monkeypatch):
    """Presses Ctrl-C behind the first step: the second is the last."""
    after = LemoCallback.on_step_end

    def press(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return after(self, args, state, control, **kwargs)

    monkeypatch.setattr(LemoCallback, "on_step_end", press)


@pytest.mark.parametrize(("dtype", "dora"), [("float32", False), ("bfloat16", True)])
def test_a_resumed_run_loads_its_checkpoint_and_needs_the_start_no_more(
    base, tmp_path, screen, monkeypatch, dtype, dora
):
    """The same bits as a run that was not stopped, with the folder gone and the stored recipe at hand."""
    first_run(base, tmp_path, screen, dtype=dtype, use_dora=dora)
    start = {"adapter": str(tmp_path / "first" / "adapter")}
    whole, _ = go(write(base, tmp_path, "whole", start, dtype), screen)
    cut = write(base, tmp_path, "cut", start, dtype)
    with monkeypatch.context() as patch:
        stop(patch)
        stored = load_recipe(cut)
        stopped, _ = go(cut, screen)
    assert stopped.interrupted and stopped.steps == 2
    shutil.rmtree(tmp_path / "first")
    refused = CliRunner().invoke(app, ["train", str(cut), "--resume"])
    assert refused.exit_code == 2 and "is no adapter" in refused.stderr
    begin = screen.file.tell()
    resumed = train(stored, evaluate_loss, resume=True, console=screen)
    assert f"going on from {tmp_path}/cut/checkpoints/checkpoint-2\n" in screen.file.getvalue()[begin:]
    assert resumed.losses == whole.losses
    one, other = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_that_was_overwritten_before_the_first_checkpoint_is_measured_again(
    base, tmp_path, screen, monkeypatch
):
    first = first_run(base, tmp_path, screen)
    recipe = write(base, tmp_path, "again", {"adapter": str(tmp_path / "first" / "adapter")})
    with monkeypatch.context() as patch:
        patch.setattr("lemo.train.trainer.LemoTrainer.train", lambda self, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            go(recipe, screen)
    stored = tmp_path / "again" / "before.json"
    assert json.loads(stored.read_text())["dense before"]["nats"] == first.losses["dense after"]
    last = load_file(tmp_path / "first" / "adapter" / "adapter_model.safetensors")
    save_file({k: 3 * v for k, v in last.items()}, tmp_path / "first" / "adapter" / "adapter_model.safetensors")
    result, _ = go(recipe, screen)
    assert result.losses["dense before"] != first.losses["dense after"]
    assert json.loads(stored.read_text())["dense before"]["nats"] == result.losses["dense before"]


def test_the_command_line_resumes_from_the_stored_recipe(base, tmp_path, screen, monkeypatch):
    first_run(base, tmp_path, screen)
    recipe = write(base, tmp_path, "cut", {"adapter": str(tmp_path / "first" / "adapter")})
    with monkeypatch.context() as patch:
        stop(patch)
        assert CliRunner().invoke(app, ["train", str(recipe)]).exit_code == 130
    shutil.rmtree(tmp_path / "first")
    done = CliRunner().invoke(app, ["train", str(tmp_path / "cut" / "recipe.yaml"), "--resume"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "cut" / "summary.json").is_file()


def test_master_weights_begin_at_the_adapter(base, tmp_path, screen):
    """In bf16 training steps fp32 copies, which a run that goes on makes of what was saved."""
    first_run(base, tmp_path, screen, dtype="bfloat16", use_dora=True)
    go(write(base, tmp_path, "again", {"adapter": str(tmp_path / "first" / "adapter")}, "bfloat16"), screen)
    folder = tmp_path / "again" / "checkpoints" / "checkpoint-3"
    states = torch.load(folder / "optimizer.pt")["state"].values()
    saved = {tuple(tensor.shape) for tensor in load_file(folder / "adapter_model.safetensors").values()}
    assert {tuple(state[MASTER].shape) for state in states} == saved
    assert all(state[MASTER].dtype == torch.float32 for state in states)
    before, after = adapter_of(tmp_path / "first"), adapter_of(tmp_path / "again")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    distance = sum(float((after[n].float() - before[n].float()).norm()) for n in after)
    assert distance < sum(float(before[n].float().norm()) for n in before)


def test_what_reads_a_finished_run_needs_its_start_no_more(base, tmp_path, screen):
    """Whether that is gone, or another adapter lies in its place. The recipe itself stands for where it begins."""
    first = first_run(base, tmp_path, screen, use_dora=True)
    recipe = write(base, tmp_path, "again", {"adapter": str(tmp_path / "first" / "adapter")})
    result, _ = go(recipe, screen)

    def nats(*arguments):
        name = tmp_path / f"{len(list(tmp_path.glob('*.json')))}.json"
        done = CliRunner().invoke(app, ["eval", *map(str, arguments), "--output", str(name)])
        assert done.exit_code == 0, done.output
        return json.loads(name.read_text())["dense"]["nats"]

    assert nats(recipe) == pytest.approx(first.losses["dense after"], abs=1e-6)
    assert nats(recipe, "lora={}") == pytest.approx(first.losses["dense before"], abs=1e-6)
    settings = tmp_path / "first" / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "r": 7}))
    assert nats(tmp_path / "again") == pytest.approx(result.losses["dense after"], abs=1e-6)
    shutil.rmtree(tmp_path / "first")
    assert nats(tmp_path / "again") == pytest.approx(result.losses["dense after"], abs=1e-6)
    for verb in (["inspect", "--samples", "1"], ["inspect", "--out", str(tmp_path / "x.png")]):
        done = CliRunner().invoke(app, [verb[0], str(tmp_path / "again"), *verb[1:]])
        assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "again"), "--out", str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
    merged = nats(recipe, "lora={}", f"model.path={tmp_path}/merged")
    assert merged == pytest.approx(result.losses["dense after"], abs=1e-5)


def test_plans_are_fitted_to_the_model_that_training_begins_with(base, tmp_path, screen):
    """By `lemo train` and by `lemo calibrate` alike."""
    first_run(base, tmp_path, screen)
    fitted = (
        "sparsity={forward_ratio: 0.6, backward_ratio: 0.6, block_size: 16, scorer: predictor, dense_layers: [0, -1]}",
        "calibration={windows: 2, tune_windows: 1, pooled_features: 8, predictor_width: 8, predictor_rank: 4, "
        "predictor_steps: 5, bypass_rank: 4}",
        "loss_rows={share: 0.3, span: 16}",
    )
    plans = {}
    for name, lora in (("on", {"adapter": str(tmp_path / "first" / "adapter")}), ("anew", {"rank": 2})):
        recipe = write(base, tmp_path, name, lora)
        for verb in ("train", "calibrate"):
            done = CliRunner().invoke(app, [verb, str(recipe), *fitted, f"output={tmp_path}/{verb}-{name}"])
            assert done.exit_code == 0, done.output
            plans[verb, name] = Plan.load(tmp_path / f"{verb}-{name}" / "plan").layers[1].bypass.down_MR
    assert torch.equal(plans["train", "on"], plans["calibrate", "on"])
    assert torch.equal(plans["train", "anew"], plans["calibrate", "anew"])
    assert not torch.allclose(plans["train", "on"], plans["train", "anew"])
    summary = json.loads((tmp_path / "train-on" / "summary.json").read_text())
    assert summary["steps"] == 3
    done = CliRunner().invoke(app, ["calibrate", str(recipe), *fitted, f"output={tmp_path}/calibrate-on"])
    assert done.exit_code == 2 and "holds a calibration with other options, data or model" in done.stderr


def test_what_is_wrong_is_found_before_anything_is_written(base, tmp_path, screen):
    first_run(base, tmp_path, screen)
    recipe = write(base, tmp_path, "again", {"adapter": str(tmp_path / "first" / "adapter")})
    for override, message in (
        ("lora.rank=3", "error: command line: lora.rank is 3, but the adapter in "),
        ("model.context_length=1024 model.rope_scaling=linear lora.targets=[q_proj]", "lora.targets is [q_proj], but"),
        (f"lora.adapter={tmp_path}/none", "none is no adapter, adapter_config.json is missing"),
    ):
        done = CliRunner().invoke(app, ["train", str(recipe), *override.split()])
        assert done.exit_code == 2 and message in done.stderr, done.output
    stored = load_recipe(recipe)
    other = dataclasses.replace(stored, lora=dataclasses.replace(stored.lora, rank=5))
    with pytest.raises(Exception, match=r"lora\.rank is 5, but .* has 2"):
        train(other, evaluate_loss, console=screen)
    assert not (tmp_path / "again").exists()
