"""Rows of prompts that carry loss beside answers: which they are, what they weigh, and that evaluation has none."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from lemo import attach
from lemo.config import LoraConfig, RunConfig, TrainingConfig, resolved
from lemo.core.plan import LayerPlan, Plan
from lemo.errors import ConfigError, LabelsError
from lemo.eval.perplexity import evaluate_loss
from lemo.runtime.head import row_losses
from lemo.train.checks import check_run
from lemo.train.collate import WindowDataset
from lemo.train.data import PromptRows, WindowCollator, load_windows
from lemo.train.model import load_tokenizer
from lemo.train.planning import describe_rows, training_collator, validation_batches
from lemo.train.run import train
from lemo.train.trainer import LemoTrainer
from lemo.train.windows import Window
from tests.runtime.oracle import tiny_model
from tests.train.tiny import save_tiny_model, words

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


@pytest.mark.parametrize("weight_of", ["answers", "row"])
def test_a_step_of_several_batches_learns_what_one_batch_would(tmp_path, weight_of):
    """Samples of few and of many answers, together and one by one."""
    windows = []
    for i, answers in enumerate([3, 40, 5, 1]):
        learned = np.zeros(64, bool)
        learned[-answers:] = True
        windows.append(Window(f"w{i}", np.random.default_rng(i).integers(3, 90, 64), learned))
    made = []
    for size in (4, 1, 2):
        model = tiny_model("llama")
        plan = Plan.uniform(model, backward_ratio=0.5, gradient="keys", scorer="recent", block_size=BLOCK)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 2}
        arguments = TrainingArguments(
            str(tmp_path), optim="sgd", learning_rate=1.0, max_grad_norm=0.0, report_to="none", use_cpu=True, **options
        )
        draw = collator(weight=1.0 if weight_of == "row" else 2.0, weight_of=weight_of)
        with attach(model, plan, self_test=False) as handle:
            trainer = LemoTrainer(
                model=model, args=arguments, data_collator=draw, train_dataset=WindowDataset(windows), handle=handle
            )
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        made.append((losses, torch.cat([p.detach().flatten() for p in model.parameters()])))
    for losses, weights in made[1:]:
        assert losses == pytest.approx(made[0][0], rel=1e-5)
        torch.testing.assert_close(weights, made[0][1], rtol=1e-4, atol=1e-6)


def recipe(sparsity=(), **rows) -> RunConfig:
    run = RunConfig()
    return replace(
        run,
        output="out",
        model=replace(run.model, path="model"),
        data=replace(run.data, answer_only=True, train=("x.jsonl",)),
        loss_rows=replace(run.loss_rows, **({"prompt_share": 0.25} | rows)),
        sparsity=replace(run.sparsity, **dict(sparsity)),
    )


def test_a_recipe_makes_the_collator():
    made = training_collator(recipe(prompt_weight=0.3), None)
    assert isinstance(made, PromptRows) and (made.share, made.weight, made.weight_of) == (0.25, 0.3, "answers")
    assert training_collator(recipe(), None).weight == 2
    assert isinstance(training_collator(recipe(prompt_share=0.0), None), WindowCollator)


def exact(layers=2, **choices) -> Plan:
    return Plan((LayerPlan(1.0, 0.12),) * layers, **({"gradient": "keys", "context_window": 128} | choices))


@pytest.mark.parametrize(
    ("sparsity", "plan", "local"),
    [
        ({}, None, True),
        ({"context_window": 128}, None, True),
        ({"context_window": 0}, None, False),
        ({"gradient": "rows", "context_window": 128}, None, False),
        ({"forward_ratio": 0.12}, None, False),
        ({"enabled": False}, None, False),
        ({"plan": "folder"}, None, False),
        ({"context_window": 0}, exact(), True),
        ({"plan": "folder", "gradient": "rows"}, exact(), True),
        ({}, exact(context_window=None), False),
        ({}, exact(gradient="rows"), False),
        ({}, replace(exact(), layers=(LayerPlan(1.0, 1.0),) * 2), False),
        ({"enabled": False}, exact(), False),
    ],
)
def test_drawn_rows_of_a_recipe_are_local_where_its_plan_can_have_them(sparsity, plan, local):
    """The plan at hand decides, or the recipe where there is none; the labels and weights are the same ones."""
    run = recipe(sparsity, span=64)
    features = [sample("a", tokens=1024, answers=((900, 940),))]
    batch = training_collator(run, None, plan=plan)(features)
    _, drawn = parts(batch, WindowCollator()([dict(f) for f in features]))
    assert drawn.any() and ("local_rows" in batch) == local
    assert not local or batch["local_rows"].equal(drawn)
    other = training_collator(recipe({"enabled": False}, span=64), None)(features)
    assert all(batch[name].equal(other[name]) for name in ("labels", "loss_weights"))


def test_what_local_prompt_rows_attend_to_in_forward_can_be_said():
    """`local_forward` is of recipes with local rows of either kind; a resolved recipe says it and can be read again."""
    for given, said in ((None, "near"), ("near", "near"), ("all", "all")):
        run = recipe({"local_forward": given})
        check_run(run)
        assert run.local_forward == resolved(run)["sparsity"]["local_forward"] == said
        check_run(replace(run, sparsity=replace(run.sparsity, **{"enabled": False})))
    for far in (recipe({"context_window": 0}), recipe(prompt_share=0.0)):
        assert far.local_forward is None is resolved(far)["sparsity"]["local_forward"]
        with pytest.raises(ConfigError, match=r"does not have: leave it null, or set loss_rows\.prompt_share"):
            check_run(replace(far, sparsity=replace(far.sparsity, local_forward="all")))


@pytest.mark.parametrize(
    ("sparsity", "tokens", "end"),
    [
        ({}, 8192, "weight and attend within chunks of 2048"),
        ({"context_window": 128, "local_forward": "all"}, 4096, "weight and pass gradient within chunks of 128"),
        ({}, 4096, "weight"),
        ({"context_window": 0}, 4096, "weight"),
        ({"enabled": False}, 4096, "weight"),
        ({"plan": "folder"}, 4096, "weight and are local where the plan allows local loss rows"),
        ({"plan": "folder", "enabled": False}, 4096, "weight"),
    ],
)
def test_a_run_says_what_drawn_rows_weigh_and_attend_to(sparsity, tokens, end):
    run = recipe(sparsity)
    (line,) = describe_rows(replace(run, data=replace(run.data, window_tokens=tokens)))
    assert line == (
        "beside answers, 25% of blocks, drawn among those of prompts, carry loss of up to 2x the answers' " + end
    )
    assert "up to 0.3x" in describe_rows(recipe(prompt_weight=0.3))[0]
    assert describe_rows(recipe(prompt_share=0.0)) == []


@pytest.mark.parametrize("enabled", [True, False])
def test_a_run_trains_on_them(tmp_path, monkeypatch, enabled):
    """Two steps on documents with answers: the model gets marks where rows skip, and evaluation has answers alone."""
    from rich.console import Console

    save_tiny_model(tmp_path / "model", layers=3)
    rows = [{"text": words(20, seed=i), "qas": [{"question": "q", "answers": ["an answer"]}]} for i in range(4)]
    (tmp_path / "qas.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sparsity = {"enabled": enabled, "context_window": 32, "block_size": 16, "backward_ratio": 0.2}
    run = recipe(sparsity, span=32)
    run = replace(
        run,
        output=str(tmp_path / "run"),
        model=replace(run.model, path=str(tmp_path / "model"), dtype="float32"),
        data=replace(
            run.data,
            train=(str(tmp_path / "qas.jsonl"),),
            validation=(str(tmp_path / "qas.jsonl"),),
            window_tokens=256,
        ),
        lora=LoraConfig(rank=2),
        training=TrainingConfig(max_steps=2, eval_steps=1),
    )
    seen, step = [], LemoTrainer.training_step

    def look(self, model, inputs, *args, **kwargs):
        seen.append(inputs)
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LemoTrainer, "training_step", look)
    said = io.StringIO()
    result = train(run, evaluate_loss, console=Console(file=said))
    assert result.steps == len(seen) == 2 and result.dense_batches == 0
    assert ("and attend within chunks of 32" in said.getvalue()) == enabled
    dataset, _ = load_windows(run.data, load_tokenizer(run.model), "train")
    (answers,) = {int((dataset[i]["labels"] != -100).sum()) for i in range(len(dataset))}
    for inputs in seen:
        drawn = int((inputs["labels"] != -100).sum()) - answers
        assert drawn > 0 == drawn % 16 and ("local_rows" in inputs) == enabled
        assert not enabled or int(inputs["local_rows"].sum()) == drawn
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    evaluated = [json.loads(line) for line in metrics if "eval_loss" in line]
    assert len(evaluated) == 2 and evaluated[-1]["eval_loss"] == pytest.approx(result.losses["dense after"], rel=1e-4)
    if enabled:
        other = replace(run.sparsity, plan=str(tmp_path / "run" / "plan"), block_size=32)
        straddling = replace(run, sparsity=other, loss_rows=replace(run.loss_rows, share=1.0))
        with pytest.raises(ConfigError, match="straddle"):
            train(replace(straddling, output=str(tmp_path / "other")), evaluate_loss, console=Console(file=said))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda r: replace(r, data=replace(r.data, answer_only=False)), "answer_only"),
        (lambda r: replace(r, training=replace(r.training, loss="model")), "segmented"),
        (lambda r: replace(r, loss_rows=replace(r.loss_rows, prompt_share=1.0)), "prompt_share"),
        (lambda r: replace(r, loss_rows=replace(r.loss_rows, prompt_weight=0.0)), "prompt_weight"),
        (lambda r: replace(r, loss_rows=replace(r.loss_rows, prompt_weight=-2.0)), "prompt_weight must be positive"),
        (lambda r: replace(r, loss_rows=replace(r.loss_rows, prompt_share=0.0, prompt_weight=1.0)), "prompt_weight"),
    ],
)
def test_recipes_that_cannot_be_are_refused(change, word):
    check_run(recipe())
    check_run(recipe(prompt_weight=5.0))
    check_run(recipe(prompt_share=0.0, prompt_weight=2.0))
    with pytest.raises(ConfigError, match=word):
        check_run(change(recipe()))


def test_bad_arguments_and_batches_are_refused():
    for wrong in ({"share": 0.0}, {"share": True}, {"weight": 2.0}, {"weight": 0}, {"span": 6}, {"weight_of": "x"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            collator(**wrong)
    for wrong in (float("inf"), float("nan"), True, -1.0):
        with pytest.raises(ConfigError, match="weight of prompt rows must be a number above 0"):
            collator(weight=wrong, weight_of="answers")
    nothing = PromptRows(lambda features: {"input_ids": torch.zeros(1, 8).long()}, 0.5, 1.0)
    with pytest.raises(LabelsError, match="labels"):
        nothing([sample("a")])
