"""Retrieval prompts are deterministic, exact in length and depth, and hold their answer once."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import lemo
from lemo.core.plan import Plan
from lemo.errors import ConfigError, DataError
from lemo.eval.needle import _count, exact_matches, make_prompt, multi_key
from lemo.eval.ruler import TASKS, paired_prompts
from tests.train.tiny import byte_tokenizer, tiny_llama

LENGTH = 2048


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [900, 2049])
def test_lengths_are_exact_and_prompts_follow_from_the_seed(tokenizer, task: str, length: int):
    made = [make_prompt(task, TASKS[task], tokenizer, length, seed=s) for s in (7, 7, 8)]
    assert all(len(p.tokens_T) == length for p in made)
    assert np.array_equal(made[0].tokens_T, made[1].tokens_T) and made[0] is not made[1]
    assert not np.array_equal(made[0].tokens_T, made[2].tokens_T)
    labelled = made[0].labels_T >= 0
    assert labelled.sum() == sum(e - s for s, e in made[0].answers) and not labelled[: made[0].question].any()


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_stands_in_the_context_once_and_the_question_alone_lacks_it(tokenizer, task: str):
    for seed in range(5):
        prompt = make_prompt(task, TASKS[task], tokenizer, LENGTH, seed=seed)
        context = prompt.tokens_T[: prompt.question]
        (start, end) = prompt.answers[0]
        answer = tokenizer.decode(prompt.tokens_T[start:end]).strip()
        alone = prompt.without_context()
        shown = tokenizer.decode(alone.tokens_T[: alone.answers[0][0]])
        for part in answer.split(", "):
            numeric = part.isdigit()
            uses = _count(context, tokenizer(f" {part}", add_special_tokens=False)["input_ids"])
            assert uses == 1 if numeric else 1 <= uses <= 2, "a variable is assigned, and may be read once"
            assert part not in shown
            facts = [tokenizer.decode(prompt.tokens_T[s:e]) for s, e in prompt.facts]
            assert any(part in fact for fact in facts)
        assert tokenizer.decode(alone.tokens_T[slice(*alone.answers[0])]).strip() == answer


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.9])
def test_the_first_fact_lies_at_the_depth_asked_for(tokenizer, task: str, depth: float):
    prompt = make_prompt(task, TASKS[task], tokenizer, 8192, seed=1, depth=depth)
    text = tokenizer.decode(prompt.tokens_T[slice(*prompt.facts[0])])
    if task == "two_hop":  # the second hop may come first
        assert min(s / prompt.question for s, _ in prompt.facts) <= depth + 0.1
    else:
        assert prompt.depth == pytest.approx(depth, abs=0.06), text
    assert prompt.depth == prompt.facts[0][0] / prompt.question


def test_distractors_differ_from_what_is_asked(tokenizer):
    riddle = multi_key(random.Random(0), 0.5, keys=8)
    assert len({f.text for f in riddle.facts}) == len({f.value for f in riddle.facts}) == 8
    for fact in riddle.facts[1:]:
        assert riddle.turns[0][1] not in fact.text
    several = multi_key(random.Random(0), 0.5, keys=8, questions=4)
    assert len({answer for _, answer in several.turns}) == 4 and several.facts == riddle.facts


def test_pairs_cover_every_depth(tokenizer):
    prompts = paired_prompts(tokenizer, 4096, task="single", count=10, seed=3)
    assert [round(p.depth * 5 - 0.5) for p in prompts] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    again = paired_prompts(tokenizer, 4096, task="single", count=10, seed=3)
    assert all(np.array_equal(a.tokens_T, b.tokens_T) for a, b in zip(prompts, again, strict=True))
    assert len({p.tokens_T.tobytes() for p in prompts}) == 10


def test_a_given_haystack_is_used_and_checked(tokenizer):
    text = np.asarray(tokenizer("Lorem ipsum dolor sit amet. " * 200, add_special_tokens=False)["input_ids"])
    prompt = make_prompt("single", TASKS["single"], tokenizer, 1024, seed=0, haystack=text)
    assert len(prompt.tokens_T) == 1024 and "ipsum" in tokenizer.decode(prompt.tokens_T)
    with pytest.raises(DataError, match="are needed"):
        make_prompt("single", TASKS["single"], tokenizer, 1024, seed=0, haystack=text[:100])
    with pytest.raises(ConfigError, match="leave no room"):
        make_prompt("multi_key", TASKS["multi_key"], tokenizer, 64, seed=0)
    with pytest.raises(ConfigError, match="depth"):
        make_prompt("single", TASKS["single"], tokenizer, 512, seed=0, depth=1.5)


def test_matches_need_every_token_of_the_answer(tokenizer):
    torch.manual_seed(0)
    model = tiny_llama(layers=3, max_position_embeddings=1024).eval()
    prompt = make_prompt("passkey", TASKS["passkey"], tokenizer, 512, seed=0)
    assert exact_matches(model, [prompt]) == [False]
    with torch.no_grad():
        predicted = model(torch.from_numpy(prompt.tokens_T)[None]).logits[0].argmax(-1)
    # Answers of the model's own making, token by token, are right; one wrong token is not.
    tokens = prompt.tokens_T.copy()
    (start, end), ids = prompt.answers[0], torch.from_numpy(prompt.tokens_T)[None].clone()
    for place in range(start, end):
        with torch.no_grad():
            ids[0, place] = model(ids[:, :place]).logits[0, -1].argmax()
    tokens[start:end] = ids[0, start:end].numpy()
    right = type(prompt)(**{**prompt.__dict__, "tokens_T": tokens})
    assert exact_matches(model, [right, prompt]) == [True, False] and len(predicted) == 512
    plan = Plan.uniform(model, forward_ratio=0.3, backward_ratio=0.3)
    with lemo.attach(model, plan, unsafe_no_bypass=True) as handle:
        assert exact_matches(model, [right], handle=handle) == [True], "dense although attached"
        exact_matches(model, [right], handle=handle, sparse=True)
        assert handle.selections[1].forward is not None
    with pytest.raises(ConfigError, match="handle"):
        exact_matches(model, [right], sparse=True)
