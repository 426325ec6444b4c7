"""The time of a whole run: as many steps as training does, each as long as estimated; no number where none is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from lemo.cli.main import app
from lemo.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from lemo.measure.card import CARDS
from lemo.measure.step_memory import StepSetting
from lemo.measure.step_time import forward_time, step_time
from lemo.train.forecast import forecast
from lemo.train.run_time import count_steps, run_time, say_duration
from tests.integration.pages import DOCS
from tests.train.test_chat import PLAIN, TALK
from tests.train.tiny import byte_tokenizer, save_tiny_model, words


def lemo(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def estimate(*arguments):
    return json.loads(lemo("estimate", *arguments, "--json", "--card", "l4"))


def recipe(tokens=8192, **training):
    return RunConfig(
        model=ModelConfig("smollm2-135m"), data=DataConfig(window_tokens=tokens), training=TrainingConfig(**training)
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    save_tiny_model(tmp_path / "model", layers=2)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "book.txt").write_text(words(1000))
    talks = ([{**TALK[0], "content": f"Be brief, {i:02}." * (i % 3)}, *TALK[1:]] for i in range(20))
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    monkeypatch.chdir(tmp_path)
    for data in ("book.txt", "chat.jsonl"):
        lemo("init", "model", data, "--out", f"{data}.yaml", "--machine", "cpu", "--window", 256, "--run", "run")
    return tmp_path


@pytest.mark.parametrize(
    ("windows", "options", "counted"),
    [
        (None, {"max_steps": 7, "gradient_accumulation_steps": 4}, (7, 28)),
        (None, {"epochs": 2.0}, None),
        (10, {"epochs": 2.0}, (20, 20)),
        (10, {"epochs": 2.0, "gradient_accumulation_steps": 4}, (6, 20)),  # of an epoch's steps the last has 2 batches
        (10, {"epochs": 2.0, "batch_size": 3}, (8, 8)),
        (10, {"epochs": 0.5, "gradient_accumulation_steps": 4}, (2, 8)),
        (10, {"max_steps": 4, "gradient_accumulation_steps": 4}, (4, 14)),
        (3, {"gradient_accumulation_steps": 8}, (1, 3)),
    ],
)
def test_steps_and_batches(windows, options, counted):
    assert count_steps(recipe(**options), windows) == counted


@pytest.mark.parametrize("data", ["book.txt", "chat.jsonl"])
@pytest.mark.parametrize("more", [(), ("data.max_windows=3", "training.epochs=2.5")])
def test_counted_steps_are_those_of_training(folder, data, more):
    options = [*more, "training.max_steps=-1", "training.gradient_accumulation_steps=2", "training.eval_steps=2"]
    found = estimate(f"{data}.yaml", *options, "--data")["run"]
    assert found["windows"] == (3 if more else found["windows"])
    lemo("train", f"{data}.yaml", *options, "training.save_steps=null")
    steps = json.loads((folder / "run" / "summary.json").read_text())["steps"]
    assert found["steps"] == steps == math.ceil((2.5 if more else 1) * math.ceil(found["windows"] / 2))
    logged = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert found["evaluations"] == 2 + sum("eval_loss" in entry for entry in logged) > 2


def test_steps_that_nobody_has_counted_are_not_guessed(folder):
    without = estimate("book.txt.yaml", "training.max_steps=-1")
    assert without["run"] is None and any("--data counts them" in note for note in without["notes"])
    assert "run:" not in lemo("estimate", "book.txt.yaml", "training.max_steps=-1")
    model = estimate("smollm2-135m")
    assert model["run"] is None and not any("steps" in note for note in model["notes"]), "a model has no run"


def test_a_run_takes_as_long_as_its_batches_and_evaluations(folder):
    options = "training.max_steps=50", "training.gradient_accumulation_steps=4", "training.eval_steps=10"
    found = estimate("book.txt.yaml", *options)
    run = found["run"]
    assert (run["steps"], run["batches"], run["windows"], run["evaluations"]) == (50, 200, None, 7)
    assert estimate("book.txt.yaml", *options, "training.max_steps=51")["run"]["evaluations"] == 8
    assert run["training_s"] == pytest.approx(200 * found["estimate"]["step_s"])
    assert run["total_s"] == run["training_s"] + run["evaluation_s"] > run["training_s"]
    alone = estimate("book.txt.yaml", *options, "data.held_out_share=0", "training.eval_steps=null")["run"]
    assert (alone["evaluations"], alone["total_s"]) == (0, run["training_s"])
    assert estimate("book.txt.yaml", *options, "data.validation_windows=4")["run"]["evaluation_s"] == pytest.approx(
        2 * run["evaluation_s"]
    )


def test_windows_of_the_data_count_with_their_own_lengths():
    """Data of half the length takes less than windows of full length, and no more than such windows would."""
    run, card = recipe(8192, max_steps=10, batch_size=2), CARDS["l4"]
    found = forecast(run)

    class Data:
        training_windows, mean_tokens = 40, 4096.0
        mean_s = step_time(found.sizes, replace(found.setting, tokens=4096, batch=1), card).total_s

    full, own = run_time(run, found, card), run_time(run, found, card, Data)
    assert own.training_s == pytest.approx(10 * 2 * Data.mean_s) and own.training_s < 0.7 * full.training_s
    assert (full.windows, own.windows) == (None, 40)


def test_evaluation_is_a_forward_alone():
    """Less than half of a dense step whose backward costs as much in products, and 2.5 times as much in attention."""
    sizes, card = forecast(recipe()).sizes, CARDS["h200"]
    for tokens in (16384, 131072):
        dense = StepSetting(
            tokens, loss_share=1.0, forward_ratio=1.0, backward_ratio=1.0, engine="plain", recompute="none"
        )
        assert 0.2 < forward_time(sizes, tokens, card) / step_time(sizes, dense, card).total_s < 0.5
    assert forward_time(sizes, 131072, card) > 2 * forward_time(sizes, 65536, card)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "less than a second"),
        (1.4, "about 1 s"),
        (59.7, "about 1 min"),
        (200, "about 3 min 20 s"),
        (3599.9, "about 1 h"),
        (12_010, "about 3 h 20 min"),
        (86_390, "about 1 d"),
        (90_000, "about 1 d 1 h"),
    ],
)
def test_durations_have_two_units(seconds, text):
    assert say_duration(seconds) == text


def test_the_line_says_what_was_counted(folder):
    text = lemo("estimate", "book.txt.yaml", "training.max_steps=14", "training.eval_steps=3", "--card", "l4")
    line = next(line for line in text.splitlines() if line.startswith("run: "))
    assert " for 14 steps, every window full; of that " in line
    assert line.endswith(" for validation, 7 times up to 2 windows")
    stopping = "training.early_stopping_evals=2", "training.save_steps=null"
    text = lemo("estimate", "chat.jsonl.yaml", *stopping, "--data", "--card", "l4")
    assert "run: at most " in text and " windows an epoch; of that " in text
    text = lemo("estimate", "book.txt.yaml", "training.max_steps=9", "--probe", "--card", "l4")
    assert "\n  9 of them, the batches of the run: " in text


def test_the_example_of_the_guide_is_true():
    keys = "data.window_tokens=65536", "training.max_steps=1250", "training.gradient_accumulation_steps=4"
    line = next(x for x in lemo("estimate", "llama3-8b", *keys, "--card", "h100").splitlines() if x.startswith("run:"))
    page = (DOCS / "guide" / "estimate.md").read_text(encoding="utf-8")
    assert f"\n{line}\n" in page and "lemo estimate llama3-8b " + " ".join(keys) in page
