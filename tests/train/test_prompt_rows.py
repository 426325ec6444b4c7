"""Rows of prompts that carry loss beside answers: which they are, what they weigh, and that evaluation has none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lemo import attach
from lemo.config import RunConfig
from lemo.core.plan import Plan
from lemo.errors import ConfigError, LabelsError
from lemo.runtime.head import row_losses
from lemo.train.checks import check_run
from lemo.train.collate import WindowDataset
from lemo.train.data import PromptRows, WindowCollator
from lemo.train.planning import training_collator, validation_batches
from lemo.train.windows import Window
from tests.runtime.oracle import tiny_model

BLOCK, SPAN = 4, 8


def sample(name: str, tokens: int = 64, answers: tuple[tuple[int, int], ...] = ((52, 58),), lengths=None) -> dict:
    ids = np.random.default_rng(len(name)).integers(3, 90, tokens)
    learned = np.zeros(tokens, bool)
    for start, end in answers:
        learned[start:end] = True
    window = Window(name, ids, learned, lengths or (tokens,))
    return WindowDataset([window])[0]


def collator(share=0.25, weight=1.0, **changes) -> PromptRows:
    options = {"block_size": BLOCK, "span": SPAN, "weight_of": "row"} | changes
    return PromptRows(WindowCollator(), share, weight, **options)


def parts(batch: dict, plain: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of answers and drawn rows of prompts, (B, T)."""
    had, has = (b["labels"] != -100 for b in (plain, batch))
    assert (has | ~had).all(), "no answer lost its label"
    return had.roll(-1, 1), (has & ~had).roll(-1, 1)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_drawn_rows_are_whole_blocks_of_the_prompt_and_predict_the_next_token(share):
    features = [sample("a"), sample("bb", answers=((20, 24), (40, 50)))]
    plain, batch = WindowCollator()([dict(f) for f in features]), collator(share)(features)
    answers, drawn = parts(batch, plain)
    assert not (answers & drawn).any()
    blocks = drawn.view(2, -1, BLOCK)
    whole = blocks.all(-1)
    last_row_excepted = blocks[:, -1].sum(-1) == BLOCK - 1
    assert (whole.sum(1) + last_row_excepted == round(share * 64 / BLOCK)).all()
    holds_answer = answers.view(2, -1, BLOCK).any(-1)
    assert not (blocks.any(-1) & holds_answer).any(), "a block with an answer has its loss already"
    labels, ids = batch["labels"], batch["input_ids"]
    assert (labels[labels != -100] == ids[labels != -100]).all()


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_weights_are_those_asked_for_and_add_up_to_the_rows(weight):
    batch = collator(weight=weight)([sample("a")])
    answers, drawn = parts(batch, WindowCollator()([dict(sample("a"))]))
    weights = batch["loss_weights"]
    assert (weights > 0).equal(answers | drawn)
    assert float(weights.sum()) == pytest.approx(float((answers | drawn).sum()))
    torch.testing.assert_close(weights[drawn] / weights[answers][0], torch.full((int(drawn.sum()),), weight))


@pytest.mark.parametrize(("weight", "most"), [(0.5, 1.0), (2.0, 1.0)])
def test_weights_of_samples_follow_their_answers(weight, most):
    """Each sample's drawn rows weigh so much together as its answers do, unless a row would weigh more than theirs."""
    features = [sample("a", answers=((56, 58),)), sample("bb", answers=((8, 44),))]
    plain = WindowCollator()([dict(f) for f in features])
    batch = collator(weight=weight, weight_of="answers")(features)
    answers, drawn = parts(batch, plain)
    for own, more, weights in zip(answers, drawn, batch["loss_weights"], strict=True):
        unit = weights[own][0]
        assert (weights[own] == unit).all() and (weights[more] == weights[more][0]).all()
        expected = min(most, weight * int(own.sum()) / int(more.sum()))
        assert float(weights[more][0] / unit) == pytest.approx(expected)
    few, many = (int(a.sum()) for a in answers)
    assert few * weight < int(drawn[0].sum()) and (weight < 2 or many * weight > int(drawn[1].sum()))


def test_the_draw_is_of_sample_seed_and_epoch_alone():
    features = [sample("a"), sample("bb")]
    draw = collator()
    both, alone = draw(features)["labels"], torch.cat([draw([f])["labels"] for f in features])
    assert both.equal(alone)
    assert not collator(seed=1)(features)["labels"].equal(both)
    draw.set_epoch(1)
    assert not draw(features)["labels"].equal(both)


def test_local_rows_are_the_drawn_ones_and_train():
    batch = collator(local=True)([sample("a")])
    _, drawn = parts(batch, WindowCollator()([dict(sample("a"))]))
    assert batch["local_rows"].equal(drawn) and "local_rows" not in collator()([sample("a")])
    model = tiny_model("llama")
    choices = {"backward_ratio": 0.25, "gradient": "keys", "scorer": "recent", "dense_layers": ()}
    plan = Plan.uniform(model, block_size=BLOCK, context_window=SPAN, **choices)
    with attach(model, plan, self_test=False, unsafe_no_bypass=True) as handle:
        near = model(**batch).loss
        near.backward()
        far = model(**{k: v for k, v in batch.items() if k != "local_rows"}).loss
        assert near.detach() != far.detach(), "drawn rows see less"
        assert not handle.notes


def test_documents_of_a_packed_window_and_padding_stay_apart():
    packed = sample("p", answers=((20, 24), (50, 54)), lengths=(28, 36))
    batch = collator(0.9)([packed, sample("short", tokens=40, answers=((30, 34),))])
    labels = batch["labels"]
    assert labels[0, 28] == -100, "the last row of a document predicts nothing of the next"
    assert (labels[1, 40:] == -100).all(), "padding carries no loss"
    assert (labels[0, 1:28] != -100).sum() > 10 and (labels[0, 29:] != -100).sum() > 10


def test_evaluation_sees_answers_alone():
    draw, plain = collator(), WindowCollator()([dict(sample("a"))])
    with draw.all_labels():
        assert draw([sample("a")])["labels"].equal(plain["labels"])
    assert not draw([sample("a")])["labels"].equal(plain["labels"])
    run = recipe()
    made = validation_batches(
        run, None, WindowDataset([Window("v", np.arange(64), np.arange(64) > 50)]), loss_rows=True
    )
    assert int((made[0]["labels"] != -100).sum()) == 13 and "loss_weights" not in made[0]


def test_text_whose_rows_all_carry_loss_stays_as_it_is():
    whole = WindowDataset([Window("t", np.arange(3, 67))])[0]
    batch = collator()([dict(whole)])
    assert batch["labels"].equal(WindowCollator()([dict(whole)])["labels"])
    assert (batch["loss_weights"][0, :-1] == 1).all()


def test_the_loss_is_the_weighted_mean():
    model = tiny_model("llama")
    plan = Plan.uniform(model, backward_ratio=0.5, gradient="keys", scorer="recent", block_size=BLOCK, dense_layers=())
    batch = collator(weight=0.3)([sample("a")])
    answers, drawn = parts(batch, WindowCollator()([dict(sample("a"))]))
    hidden = model.base_model(input_ids=batch["input_ids"]).last_hidden_state[0]
    losses = row_losses(model, hidden, batch["labels"].roll(-1, 1)[0].clamp_min(0))
    weight = answers[0].double() + 0.3 * drawn[0].double()
    expected = float((losses.detach() * weight).sum() / weight.sum())
    with attach(model, plan, self_test=False, unsafe_no_bypass=True):
        assert float(model(**batch).loss.detach()) == pytest.approx(expected, rel=1e-5)


def recipe(**rows) -> RunConfig:
    run = RunConfig()
    data = replace(run.data, answer_only=True, train=("x.jsonl",))
    model = replace(run.model, path="model")
    return replace(
        run, output="out", model=model, data=data, loss_rows=replace(run.loss_rows, **({"prompt_share": 0.25} | rows))
    )


def test_a_recipe_makes_the_collator():
    made = training_collator(recipe(prompt_weight=0.3), None)
    assert isinstance(made, PromptRows) and (made.share, made.weight) == (0.25, 0.3)
    assert isinstance(training_collator(recipe(prompt_share=0.0), None), WindowCollator)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda r: replace(r, data=replace(r.data, answer_only=False)), "answer_only"),
        (lambda r: replace(r, training=replace(r.training, loss="model")), "segmented"),
        (lambda r: replace(r, loss_rows=replace(r.loss_rows, prompt_share=1.0)), "prompt_share"),
        (lambda r: replace(r, loss_rows=replace(r.loss_rows, prompt_weight=0.0)), "prompt_weight"),
        (lambda r: replace(r, loss_rows=replace(r.loss_rows, prompt_share=0.0, prompt_weight=0.5)), "prompt_weight"),
    ],
)
def test_recipes_that_cannot_be_are_refused(change, word):
    check_run(recipe())
    with pytest.raises(ConfigError, match=word):
        check_run(change(recipe()))


def test_bad_arguments_and_batches_are_refused():
    for wrong in ({"share": 0.0}, {"share": True}, {"weight": 2.0}, {"weight": 0}, {"span": 6}, {"weight_of": "x"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            collator(**wrong)
    nothing = PromptRows(lambda features: {"input_ids": torch.zeros(1, 8).long()}, 0.5, 1.0)
    with pytest.raises(LabelsError, match="labels"):
        nothing([sample("a")])
