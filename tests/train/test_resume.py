"""Runs that are stopped, cut off or requeued: what they keep, how they go on, and what they refuse to go on with."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal

import pytest
import torch

from lemo.errors import ConfigError
from lemo.eval.perplexity import evaluate_loss
from lemo.train import checkpoint as checkpoint_module
from lemo.train.checkpoint import RunFolder, SaveOnRequest
from lemo.train.identity import run_identity
from lemo.train.run import train
from lemo.train.trainer import LemoTrainer
from tests.train.test_run import adapter_of, recipe
from tests.train.tiny import save_empty_checkpoint, words


def stop_at(monkeypatch, step):
    """Training is asked to stop in this step."""
    after = SaveOnRequest.on_step_end

    def ask(self, args, state, control, **kwargs):
        self.asked = self.asked or state.global_step == step
        return after(self, args, state, control, **kwargs)

    monkeypatch.setattr(SaveOnRequest, "on_step_end", ask)


def stopped(run, step, screen):
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step)
        return train(run, evaluate_loss, console=screen)


@pytest.fixture
def worse_from_the_start(monkeypatch):
    """Validation losses that rise from the first step on, whatever is learned: the number of the step."""
    loop = LemoTrainer.evaluation_loop

    def measure(self, *given, **options):
        output = loop(self, *given, **options)
        output.metrics["eval_loss"] = float(self.state.global_step)
        return output

    monkeypatch.setattr(LemoTrainer, "evaluation_loop", measure)


def same_adapter(a, b):
    first, second = adapter_of(a), adapter_of(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def evaluation_fails_after(console=None):
    calls = []

    def evaluate(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            raise OSError("out of room")
        return evaluate_loss(*args, **kwargs)

    return evaluate


def test_the_adapter_is_saved_before_the_final_evaluation(base, tmp_path, screen):
    train(recipe(base, tmp_path / "whole"), evaluate_loss, console=screen)
    run = recipe(base, tmp_path / "run", training={"save_steps": 4})
    with pytest.raises(OSError, match="out of room"):
        train(run, evaluation_fails_after(), console=screen)
    assert "final evaluation failed; measure it with lemo eval" in screen.file.getvalue()
    assert same_adapter(tmp_path / "run", tmp_path / "whole")
    assert not (tmp_path / "run" / "summary.json").exists()
    # Its last checkpoint is the end of training: nothing is trained twice.
    resumed = train(run, evaluate_loss, resume=True, console=screen)
    assert resumed.steps == 4 and set(resumed.losses) == {"dense before", "dense after"}
    assert same_adapter(tmp_path / "run", tmp_path / "whole")


def test_an_adapter_without_its_evaluation_is_not_trained_over(base, tmp_path, screen):
    run = recipe(base, tmp_path / "run")
    with pytest.raises(OSError, match="out of room"):
        train(run, evaluation_fails_after(), console=screen)
    for resume in (False, "if possible"):
        with pytest.raises(ConfigError, match="final evaluation did not end: measure it with lemo eval"):
            train(run, evaluate_loss, resume=resume, console=screen)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_twice_saves_and_stops(base, tmp_path, screen, monkeypatch, number):
    """torchrun passes on what the process group has got already; SIGTERM may come any number of times."""
    from lemo.train.callback import LemoCallback

    after_step = LemoCallback.on_step_end

    def twice(self, args, state, control, **kwargs):
        if state.global_step == 1:
            for _ in range(3):
                os.kill(os.getpid(), number)
        return after_step(self, args, state, control, **kwargs)

    monkeypatch.setattr(LemoCallback, "on_step_end", twice)
    result = train(recipe(base, tmp_path / "run"), evaluate_loss, console=screen)
    assert result.interrupted and result.steps == 2
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-2").is_dir()


def test_ctrl_c_once_more_aborts_and_sigterm_does_not(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoint_module.time, "monotonic", lambda: now[0])
    saver = SaveOnRequest(tmp_path)
    saver.announce = lambda text: None
    with saver.signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert saver.asked
        now[0] += 5
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_in_the_last_step_lets_the_run_finish(base, tmp_path, screen):
    result = stopped(recipe(base, tmp_path / "run"), 4, screen)
    assert not result.interrupted and result.steps == 4 and (tmp_path / "run" / "summary.json").exists()


def test_signals_are_caught_until_the_adapter_is_saved(base, tmp_path, screen, monkeypatch):
    from lemo.train import run as run_module

    save = run_module.save_adapter

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return save(*args, **kwargs)

    monkeypatch.setattr(run_module, "save_adapter", interrupted)
    result = train(recipe(base, tmp_path / "run"), evaluate_loss, console=screen)
    assert not result.interrupted and adapter_of(tmp_path / "run")


def test_a_log_line_that_was_cut_off_does_not_stop_a_resume(base, tmp_path, screen):
    run = recipe(base, tmp_path / "run")
    stopped(run, 2, screen)
    metrics = tmp_path / "run" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 3, "lo')
    resumed = train(run, evaluate_loss, resume=True, console=screen)
    assert resumed.steps == 4 and "the last line was cut off in writing" in screen.file.getvalue()
    lines = metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "learning_rate" in line] == [1, 2, 3, 4]


def test_a_broken_line_in_the_middle_of_a_log_is_named(base, tmp_path, screen):
    run = recipe(base, tmp_path / "run")
    stopped(run, 2, screen)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text('{"st\n' + metrics.read_text())
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, row 1: no log entry; repair or remove that line"):
        train(run, evaluate_loss, resume=True, console=screen)


def test_keys_that_change_memory_alone_may_change_on_resume(base, tmp_path, screen):
    run = recipe(base, tmp_path / "run")
    stopped(run, 2, screen)
    changes = {"segment_rows": 64, "gradient_checkpointing": False, "engine": "fused", "recompute": "layer"}
    other = dataclasses.replace(run, training=dataclasses.replace(run.training, **changes, save_total_limit=7))
    assert run_identity(other) == run_identity(run)
    assert train(other, evaluate_loss, resume=True, console=screen).steps == 4


def test_keys_that_differ_are_named_with_both_values(base, tmp_path):
    RunFolder.open(recipe(base, tmp_path / "run")).begin("{}\n")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    other = recipe(base, tmp_path / "run", training={"max_steps": 9}, lora={"rank": 3})
    with pytest.raises(ConfigError) as error:
        RunFolder.open(other, resume=True)
    assert "lora.rank is 2 there and 3 here" in str(error.value)
    assert "training.max_steps is 4 there and 9 here" in str(error.value)


def test_old_checkpoints_are_deleted(base, tmp_path, screen):
    for limit, kept in ((2, {3, 4}), (1, {4}), (None, {1, 2, 3, 4})):
        run = recipe(base, tmp_path / f"{limit}", training={"save_steps": 1, "save_total_limit": limit})
        train(run, evaluate_loss, console=screen)
        found = {int(p.name.rpartition("-")[2]) for p in (tmp_path / f"{limit}" / "checkpoints").iterdir()}
        assert found == kept
    with pytest.raises(ConfigError, match=r"training\.save_total_limit must be positive"):
        train(recipe(base, tmp_path / "run", training={"save_total_limit": 0}), evaluate_loss, console=screen)


@pytest.mark.usefixtures("worse_from_the_start")
def test_a_resumed_run_stops_early_where_the_whole_one_does(base, tmp_path, screen):
    training = {"max_steps": 12, "eval_steps": 1, "early_stopping_evals": 3, "learning_rate": 0.01}
    training |= {"lr_scheduler": "constant", "warmup_steps": 0}
    whole = train(recipe(base, tmp_path / "whole", training=training), evaluate_loss, console=screen)
    assert whole.steps == 4
    said = screen.file.getvalue()
    assert "stopped early, after step 4 of 12\nthe adapter is that of step 1, whose validation loss was lowest" in said
    assert "training goes on from" not in said
    # In the step of its last evaluation, and with one and two evaluations counted.
    for before in (0, 1, 2):
        run = recipe(base, tmp_path / f"cut-{before}", training=training)
        assert stopped(run, whole.steps - before, screen).interrupted
        resumed = train(run, evaluate_loss, resume=True, console=screen)
        assert resumed.steps == whole.steps and resumed.losses == whole.losses
        assert same_adapter(tmp_path / f"cut-{before}", tmp_path / "whole")
    assert "training goes on from checkpoint-2\n" in screen.file.getvalue()


def test_a_checkpoint_without_a_process_is_passed_over(base, tmp_path):
    run = recipe(base, tmp_path / "run")
    RunFolder.open(run).begin("{}\n", 2)
    for step in (2, 4):
        save_empty_checkpoint(tmp_path / "run" / "checkpoints" / f"checkpoint-{step}", 2)
    assert RunFolder.open(run, resume=True, processes=2).resume_from.name == "checkpoint-4"
    for name in ("rng_state_1.pth", "lemo-1.json"):
        (tmp_path / "run" / "checkpoints" / "checkpoint-4" / name).unlink()
        opened = RunFolder.open(run, resume=True, processes=2)
        assert opened.resume_from.name == "checkpoint-2"
        assert opened.notes[0].startswith("checkpoint-4 is incomplete and passed over: it has no ") and name in str(
            opened.notes
        )


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor", "adagrad"])
def test_a_resumed_bf16_run_comes_to_the_same_bits(base, tmp_path, screen, optimizer):
    """PEFT loads adapters in fp32; the Trainer's parameters stay of 16 bits, and their fp32 copies go on."""
    sections = {"model": {"dtype": "bfloat16"}, "training": {"optimizer": optimizer, "max_steps": 6}}
    whole = train(recipe(base, tmp_path / "whole", **sections), evaluate_loss, console=screen)
    run = recipe(base, tmp_path / "run", **sections)
    stopped(run, 3, screen)
    resumed = train(run, evaluate_loss, resume=True, console=screen)
    assert resumed.losses == whole.losses and same_adapter(tmp_path / "run", tmp_path / "whole")
    assert {x.dtype for x in adapter_of(tmp_path / "run").values()} == {torch.bfloat16}


def test_the_best_adapter_of_a_bf16_run_is_in_bf16(base, tmp_path, screen):
    training = {"early_stopping_evals": 1, "eval_steps": 1, "max_steps": 2}
    run = recipe(base, tmp_path / "run", model={"dtype": "bfloat16"}, training=training)
    train(run, evaluate_loss, console=screen)
    assert {x.dtype for x in adapter_of(tmp_path / "run").values()} == {torch.bfloat16}


def test_what_an_interrupted_run_saved_stays_beside_the_best(base, tmp_path, screen):
    """With a limit of one, Trainer keeps the best checkpoint alone when training ends."""
    training = {"early_stopping_evals": 5, "eval_steps": 1, "save_total_limit": 1, "learning_rate": 1.0}
    stopped(recipe(base, tmp_path / "run", training={**training, "warmup_steps": 0}), 3, screen)
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-3").is_dir()


def test_who_is_stopped_where_it_would_evaluate_saves_before(base, tmp_path, screen, monkeypatch):
    """A launcher that kills after some seconds would lose the steps: validation takes longer."""
    sections = {"training": {"max_steps": 6, "eval_steps": 3, "save_steps": None}}
    whole = train(recipe(base, tmp_path / "whole", **sections), evaluate_loss, console=screen)
    run = recipe(base, tmp_path / "run", **sections)
    with monkeypatch.context() as patch:
        patch.setattr(LemoTrainer, "evaluation_loop", lambda *given, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stopped(run, 3, screen)
    resumed = train(run, evaluate_loss, resume=True, console=screen)
    assert resumed.losses == whole.losses and same_adapter(tmp_path / "run", tmp_path / "whole")
    stopped(recipe(base, tmp_path / "other", **sections), 3, screen)
    state = json.loads((tmp_path / "other" / "checkpoints" / "checkpoint-3" / "trainer_state.json").read_text())
    assert any("eval_loss" in entry for entry in state["log_history"]), "and once more when it has evaluated"


def test_how_often_to_save_and_log_may_change_on_resume(base, tmp_path, screen):
    free = {"max_steps": 6, "save_total_limit": None, "save_steps": None, "logging_steps": 1}
    stopped(recipe(base, tmp_path / "run", training=free), 2, screen)
    changed = {**free, "save_steps": 1, "logging_steps": 2, "eval_steps": 3}
    train(recipe(base, tmp_path / "run", training=changed), evaluate_loss, resume=True, console=screen)
    found = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert found == {f"checkpoint-{step}" for step in (2, 3, 4, 5, 6)}
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "learning_rate" in x] == [1, 2, 4, 6]
    assert [x["step"] for x in lines if "eval_loss" in x] == [3, 6]


def test_the_first_step_of_an_epoch_is_given_up_and_done_again(base, tmp_path, screen, monkeypatch):
    """The epoch's order is drawn before its first step, and by the resumed run once more; dropout draws after it."""
    training = {"max_steps": -1, "epochs": 3.0, "batch_size": 1, "gradient_accumulation_steps": 4, "warmup_steps": 0}
    sections = {"training": training, "lora": {"dropout": 0.1}, "sparsity": {"enabled": False}}
    whole = train(recipe(base, tmp_path / "whole", **sections), evaluate_loss, console=screen)
    each = whole.steps // 3
    after = SaveOnRequest.on_substep_end

    def signalled(self, args, state, control, **kwargs):
        self.asked = self.asked or state.global_step == each
        return after(self, args, state, control, **kwargs)

    run = recipe(base, tmp_path / "run", **sections)
    with monkeypatch.context() as patch:
        patch.setattr(SaveOnRequest, "on_substep_end", signalled)
        assert train(run, evaluate_loss, console=screen).steps == each
    resumed = train(run, evaluate_loss, resume=True, console=screen)
    assert resumed.losses == whole.losses and same_adapter(tmp_path / "run", tmp_path / "whole")


def test_a_warmup_as_long_as_the_run_is_said(base, tmp_path, screen):
    train(recipe(base, tmp_path / "run", training={"max_steps": 2, "warmup_steps": 2}), evaluate_loss, console=screen)
    assert "warmup_steps (2) is not below training.max_steps (2)" in screen.file.getvalue()


def test_other_data_than_at_the_start_is_refused(base, tmp_path, screen):
    text = tmp_path / "train.txt"
    shutil.copy(base / "train.txt", text)
    run = recipe(base, tmp_path / "run", data={"train": (str(text),)})
    stopped(run, 2, screen)
    before = text.read_text()
    text.write_text(before + words(200, seed=9))
    with pytest.raises(ConfigError, match=r"data of the run .* has changed .*: training data had \d+ windows"):
        train(run, evaluate_loss, resume=True, console=screen)
    text.write_text("z" + before[1:])
    with pytest.raises(ConfigError, match="training data had"):
        train(run, evaluate_loss, resume=True, console=screen)
    text.write_text(before)
    assert train(run, evaluate_loss, resume=True, console=screen).steps == 4


def test_a_requeued_job_begins_and_goes_on_with_one_command(base, tmp_path, screen):
    run = recipe(base, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2)
        first = train(run, evaluate_loss, resume="if possible", console=screen)
    assert first.interrupted and first.steps == 2
    second = train(run, evaluate_loss, resume="if possible", console=screen)
    assert second.steps == 4 and not second.interrupted
    whole = train(recipe(base, tmp_path / "whole"), evaluate_loss, console=screen)
    assert same_adapter(tmp_path / "run", tmp_path / "whole") and second.losses == whole.losses


@pytest.mark.parametrize("step", [0, 2])
def test_a_step_of_several_batches_is_given_up_and_done_again(base, tmp_path, screen, monkeypatch, step):
    """A launcher kills after half a minute, which may be less than a step takes. The result is the whole run's."""
    sections = {
        "training": {"batch_size": 1, "gradient_accumulation_steps": 3, "engine": "fused"},
        "lora": {"dropout": 0.2},
        "sparsity": {"gradient": "keys", "scorer": "random"},
    }
    whole = train(recipe(base, tmp_path / "whole", **sections), evaluate_loss, console=screen)
    after, seen = SaveOnRequest.on_substep_end, []

    def signalled(self, args, state, control, **kwargs):
        seen.append(state.global_step)
        if seen.count(step) == 2 and len(seen) < 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return after(self, args, state, control, **kwargs)

    run = recipe(base, tmp_path / "run", **sections)
    with monkeypatch.context() as patch:
        patch.setattr(SaveOnRequest, "on_substep_end", signalled)
        first = train(run, evaluate_loss, console=screen)
    # The first step has no checkpoint before it, and is done to its end.
    assert first.interrupted and first.steps == max(1, step)
    assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{first.steps}").is_dir()
    resumed = train(run, evaluate_loss, resume=True, console=screen)
    assert resumed.steps == 4 and resumed.losses == whole.losses
    assert same_adapter(tmp_path / "run", tmp_path / "whole")
