"""LemoTrainer and LemoCallback log and change nothing else; evaluation sees all labels; epochs draw anew."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import Trainer, TrainerCallback, TrainingArguments

import lemo
from lemo.errors import ConfigError
from lemo.eval.perplexity import evaluate_loss
from lemo.train.callback import LemoCallback
from lemo.train.collate import WindowCollator, WindowDataset
from lemo.train.loss_rows import LossRows
from lemo.train.trainer import LemoTrainer
from lemo.train.windows import Window
from tests.train.tiny import tiny_llama


def dataset(count, seed=0, tokens=64):
    rng = np.random.default_rng(seed)
    return WindowDataset([Window(f"{seed}-{i}", rng.integers(3, 250, tokens), lengths=(tokens,)) for i in range(count)])


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "label_names": ["labels"],
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "seed": 0,
        "use_cpu": True,
    }
    return TrainingArguments(**{**settings, **changes})


def seeded_model():
    torch.manual_seed(0)
    return tiny_llama(layers=2)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_lemo_trainer_trains_what_a_plain_trainer_trains(tmp_path, accumulation):
    weights = []
    for kind in (Trainer, LemoTrainer):
        model = seeded_model()
        options = {"console": Console(file=io.StringIO())} if kind is LemoTrainer else {}
        trainer = kind(
            model=model,
            args=arguments(tmp_path / kind.__name__, gradient_accumulation_steps=accumulation),
            train_dataset=dataset(4),
            data_collator=LossRows(WindowCollator(), 0.5, block_size=8),
            **options,
        )
        if kind is Trainer:
            trainer.add_callback(LemoCallback(loss_rows=trainer.data_collator, console=Console(file=io.StringIO())))
            trainer.data_collator.enabled = True
        trainer.train()
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_log_counts_tokens_memory_and_ratios(tmp_path):
    model, text = seeded_model(), io.StringIO()
    plan = lemo.Plan.uniform(model, forward_ratio=1.0, backward_ratio=0.5, block_size=8, dense_layers=(0,))
    with lemo.attach(model, plan, self_test=False) as handle:
        trainer = LemoTrainer(
            model=model,
            args=arguments(tmp_path / "out", gradient_accumulation_steps=2),
            train_dataset=dataset(4),
            data_collator=LossRows(WindowCollator(), 0.3, block_size=8),
            handle=handle,
            metrics_path=tmp_path / "metrics.jsonl",
            console=Console(file=text, width=200),
        )
        trainer.train()
    assert trainer.log_callback.tokens == 2 * 4 * 64
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "loss" in entry]
    assert len(steps) == 4
    for entry in steps:
        assert entry["layer_ratios"]["1"] == [1.0, 0.5]
        assert (entry["forward_ratio"], entry["backward_ratio"]) == (1.0, 0.75)
        assert entry["dense_batches"] == 0
    lines = text.getvalue().splitlines()
    assert sum("rows 100% forward, 75% backward" in line and "tokens/s" in line for line in lines) == 4
    assert trainer.log_callback.peak.peak_bytes > 0


class Recorder(LossRows):
    """Remembers how many labels each batch had."""

    seen: list

    def __call__(self, features):
        batch = super().__call__(features)
        self.seen.append((features[0]["sample_id"], self.epoch, int((batch["labels"] != -100).sum())))
        return batch


def recorder():
    made = Recorder(WindowCollator(), 0.5, block_size=8)
    made.seen = []
    return made


@pytest.mark.parametrize("kind", [Trainer, LemoTrainer])
def test_evaluation_sees_all_labels_and_training_only_drawn_ones(tmp_path, kind):
    rows, quiet = recorder(), Console(file=io.StringIO())
    options = (
        {"console": quiet} if kind is LemoTrainer else {"callbacks": [LemoCallback(loss_rows=rows, console=quiet)]}
    )
    trainer = kind(
        model=seeded_model(),
        args=arguments(tmp_path / "out", eval_strategy="steps", eval_steps=1),
        train_dataset=dataset(3),
        eval_dataset=dataset(2, seed=1),
        data_collator=rows,
        **options,
    )
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    training = [(epoch, count) for name, epoch, count in rows.seen if name.startswith("0-")]
    evaluation = [count for name, _, count in rows.seen if name.startswith("1-")]
    assert len(evaluation) == 2 * (6 + 2) and set(evaluation) == {63}
    # Half of eight blocks of eight rows; the document's last row predicts nothing.
    assert len(training) == 6 and {count for _, count in training} <= {31, 32}
    assert sorted(epoch for epoch, _ in training) == [0] * 3 + [1] * 3


def test_several_evaluation_sets_need_lemo_trainer(tmp_path):
    rows, quiet = recorder(), Console(file=io.StringIO())
    sets = {"a": dataset(1, seed=1), "b": dataset(1, seed=2)}
    common = {
        "args": arguments(tmp_path / "out", eval_strategy="steps", eval_steps=1),
        "train_dataset": dataset(2),
        "eval_dataset": sets,
        "data_collator": rows,
    }
    trainer = Trainer(model=seeded_model(), callbacks=[LemoCallback(loss_rows=rows, console=quiet)], **common)
    with pytest.raises(ConfigError, match="use LemoTrainer to evaluate several"):
        trainer.train()
    rows.seen.clear()
    rows.enabled = True
    LemoTrainer(model=seeded_model(), console=quiet, **common).train()
    assert {count for name, _, count in rows.seen if name[0] in "12"} == {63}


def test_evaluation_loss_is_the_models_own_without_logits(tmp_path):
    model = seeded_model()
    plan = lemo.Plan.uniform(model, backward_ratio=0.5, block_size=8)
    common = {"args": arguments(tmp_path / "out"), "eval_dataset": dataset(2), "data_collator": WindowCollator()}
    plain = Trainer(model=model, **common).evaluate()["eval_loss"]
    with lemo.attach(model, plan, self_test=False) as handle:
        trainer = LemoTrainer(model=model, handle=handle, console=Console(file=io.StringIO()), **common)
        seen = []
        hook = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
        ours = trainer.evaluate()["eval_loss"]
        hook.remove()
    assert ours == pytest.approx(plain, rel=1e-5)
    assert all(shape[-2] <= 64 for shape in seen)


def test_hooks_end_when_training_fails(tmp_path):
    model = seeded_model()
    broken = LemoTrainer(
        model=model,
        args=arguments(tmp_path / "out"),
        train_dataset=dataset(1),
        data_collator=lambda features: {"input_ids": torch.zeros(1, 4, dtype=torch.int64)},
        console=Console(file=io.StringIO()),
    )
    with pytest.raises(ValueError, match="loss"):
        broken.train()
    assert not model._forward_pre_hooks


class Tracker(TrainerCallback):
    """Keeps entries as trackers of Transformers get them."""

    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.entries.append({"step": state.global_step, **logs})


def test_trackers_get_the_figures_of_the_log(tmp_path):
    model, tracker = seeded_model(), Tracker()
    plan = lemo.Plan.uniform(model, forward_ratio=1.0, backward_ratio=0.5, block_size=8)
    with lemo.attach(model, plan, self_test=False) as handle:
        LemoTrainer(
            model=model,
            args=arguments(tmp_path / "out"),
            train_dataset=dataset(3),
            data_collator=LossRows(WindowCollator(), 0.3, block_size=8),
            callbacks=[tracker],
            handle=handle,
            metrics_path=tmp_path / "metrics.jsonl",
            console=Console(file=io.StringIO()),
        ).train()
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(entries) == len(tracker.entries) == 7
    for entry, tracked in zip(entries, tracker.entries, strict=True):
        tracked.pop("total_flos", None)
        assert {key: value for key, value in entry.items() if key != "layer_ratios"} == tracked
        assert all(isinstance(value, int | float) for value in tracked.values())
    names = {"tokens_per_s", "memory_bytes", "peak_memory_bytes", "forward_ratio", "backward_ratio", "dense_batches"}
    assert all(names <= set(entry) for entry in tracker.entries if "learning_rate" in entry)


@pytest.mark.parametrize("batch", [1, 2])
def test_evaluation_loss_is_a_mean_over_tokens(tmp_path, batch):
    """Windows of unequal length and with few labels count by their tokens, as in `evaluate_loss`."""
    rng = np.random.default_rng(3)
    windows = []
    for index, (tokens, learned) in enumerate([(64, 64), (8, 8), (64, 3), (16, 0), (30, 20)]):
        mask = np.arange(tokens) >= tokens - learned
        windows.append(Window(f"{index}", rng.integers(3, 250, tokens), mask, (tokens,)))
    held_out = WindowDataset(windows)
    model = seeded_model()
    trainer = LemoTrainer(
        model=model,
        args=arguments(tmp_path / "out", per_device_eval_batch_size=batch),
        eval_dataset=held_out,
        data_collator=WindowCollator(),
        console=Console(file=io.StringIO()),
    )
    wanted = evaluate_loss(model, [WindowCollator()([held_out[i]]) for i in range(5)])
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(wanted.nats, rel=1e-5)
    assert trainer.predict(held_out).metrics["test_loss"] == pytest.approx(wanted.nats, rel=1e-5)


def test_a_log_that_cannot_be_written_is_said_once_and_training_goes_on(tmp_path, monkeypatch):
    """The disk is full for two entries, and one of them is half written."""
    from pathlib import Path

    opened, text = Path.open, io.StringIO()

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.file.close()

        def write(self, line):
            self.file.write(line[:9])
            self.file.flush()
            raise OSError(28, "No space left on device")

    calls = []

    def full(self, mode="r", **kwargs):
        file = opened(self, mode, **kwargs)
        calls.append(self.name == "metrics.jsonl" and mode == "a")
        return Full(file) if calls[-1] and sum(calls) in (2, 3) else file

    monkeypatch.setattr(Path, "open", full)
    LemoTrainer(
        model=seeded_model(),
        args=arguments(tmp_path / "out", max_steps=5),
        train_dataset=dataset(5),
        data_collator=WindowCollator(),
        metrics_path=tmp_path / "metrics.jsonl",
        console=Console(file=text, width=300),
    ).train()
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 4, 5, 5]
    assert text.getvalue().count("No space left on device") == 1
