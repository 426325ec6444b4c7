"""LemoCallback beside Transformers' own Trainer: what is drawn, what evaluation counts, what a resumed run takes up."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from transformers import Trainer, TrainerCallback, TrainingArguments

from lemo import LossRows, PromptRows, attach
from lemo.core.plan import Plan
from lemo.train.callback import LemoCallback
from tests.runtime.oracle import tiny_model

SAMPLES, TOKENS, BLOCK = 4, 128, 4


def samples() -> list[dict]:
    ids = torch.randint(3, 128, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row, "sample_id": str(i)} for i, row in enumerate(ids)]


def collate(features):
    return {key: torch.tensor([feature[key] for feature in features]) for key in ("input_ids", "labels")}


class Stream(torch.utils.data.IterableDataset):
    """The samples, without a length."""

    def __iter__(self):
        return iter(samples())


class Watching(Trainer):
    """Remembers which labels the model got."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.trained, self.evaluated = [], []

    def training_step(self, model, inputs, *args, **options):
        self.trained += [(tuple(ids[:4].tolist()), tuple(rows.tolist())) for ids, rows in self._kept(inputs)]
        return super().training_step(model, inputs, *args, **options)

    def prediction_step(self, model, inputs, *args, **options):
        self.evaluated.append((self.state.global_step, int((inputs["labels"] != -100).sum())))
        return super().prediction_step(model, inputs, *args, **options)

    @staticmethod
    def _kept(inputs):
        return zip(inputs["input_ids"], inputs["labels"] != -100, strict=True)


def trained(folder, data=None, draw=None, stop=None, resume=None, scorer="recent", **options) -> Watching:
    """A finished training, with the text that was printed as `said`."""
    model = tiny_model("llama")
    draw = draw or LossRows(collate, share=0.25, block_size=BLOCK, span=BLOCK)
    screen = Console(file=io.StringIO(), width=200)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            control.should_training_stop |= state.global_step == stop

    given = {"per_device_train_batch_size": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    given |= {"save_strategy": "no", "remove_unused_columns": False, "logging_steps": 1, "learning_rate": 1e-2}
    arguments = TrainingArguments(str(folder), **given | options)
    with attach(model, Plan.uniform(model, block_size=BLOCK, backward_ratio=0.5, scorer=scorer)) as handle:
        trainer = Watching(
            model=model,
            args=arguments,
            train_dataset=samples() if data is None else data,
            eval_dataset=samples()[:1],
            data_collator=draw,
            callbacks=[LemoCallback(handle, loss_rows=draw, console=screen), Stop()],
        )
        trainer.train(resume_from_checkpoint=resume)
    trainer.said = screen.file.getvalue()
    return trainer


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (None, {"num_train_epochs": 3}),
        (None, {"num_train_epochs": 3, "dataloader_num_workers": 1}),
        (None, {"num_train_epochs": 3, "dataloader_num_workers": 1, "dataloader_persistent_workers": True}),
        (Stream(), {"max_steps": 3 * SAMPLES}),
    ],
)
def test_each_pass_over_a_sample_draws_other_rows(tmp_path, data, options):
    """Also in workers that live as long as training, and of data whose length nobody knows."""
    drawn: dict[tuple, set] = {}
    for ids, rows in trained(tmp_path, data, **options).trained:
        drawn.setdefault(ids, set()).add(rows)
    assert [len(rows) for rows in drawn.values()] == [3] * SAMPLES


@pytest.mark.parametrize("options", [{}, {"eval_on_start": True}, {"eval_strategy": "epoch", "eval_on_start": True}])
def test_evaluation_counts_every_token_whenever_it_runs(tmp_path, options):
    found = trained(tmp_path, num_train_epochs=2, **{"eval_strategy": "steps", "eval_steps": 3} | options)
    assert len(found.evaluated) >= 2 and all(count == TOKENS for _, count in found.evaluated)
    assert found.evaluated[0][0] == (0 if options else 3)
    assert all(sum(rows) < TOKENS for _, rows in found.trained)


@pytest.mark.parametrize("scorer", ["recent", "random"])
def test_a_resumed_training_comes_to_the_same_weights(tmp_path, scorer):
    """Random blocks depend on how many batches have been, which the checkpoint knows."""
    options = {"max_steps": 6, "scorer": scorer, "save_strategy": "steps", "save_steps": 3}
    whole = trained(tmp_path / "whole", **options)
    trained(tmp_path / "parts", stop=3, **options)
    rest = trained(tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-3"), **options)
    assert rest.trained == whole.trained[3:]
    for one, other in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("parts", "warns"), [(1, False), (2, True)])
def test_rows_of_prompts_in_a_step_of_parts_are_spoken_of(tmp_path, parts, warns):
    draw = PromptRows(collate, 0.25, 1.0, block_size=BLOCK, span=BLOCK)
    found = trained(tmp_path, draw=draw, max_steps=1, gradient_accumulation_steps=parts)
    assert ("LemoTrainer weighs all rows of a step alike" in found.said) == warns
