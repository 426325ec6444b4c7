"""Needles in haystacks: prompts whose answer stands once, far away from the question, and how they are scored.

Every prompt is a function of (seed, tokenizer, length). Text is put together as tokens, so lengths are exact.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lemo.errors import ConfigError, DataError
from lemo.eval.perplexity import last_hidden
from lemo.runtime.attach import Handle
from lemo.runtime.model import causal_model

Span = tuple[int, int]
_DRAWS = 50  # attempts at values that the haystack does not hold by chance
_SUBJECTS = "The river|A small dog|My neighbour|The old clock|Every morning the wind|A red kite|The baker|Our train"
_VERBS = "follows|watches|forgets|crosses|remembers|admires|passes|leaves"
_OBJECTS = "the quiet harbour|a wooden bridge|the empty square|the green hills|a stone wall|the northern road|the mill"


@dataclass(frozen=True)
class Fact:
    """One sentence that is put into the haystack.

    Attributes:
        text: the sentence.
        value: the part of it that answers a question; None for distractors' sake only.
        depth: where in the haystack, from 0 (start) to 1 (end).
    """

    text: str
    value: str | None
    depth: float


@dataclass(frozen=True)
class Prompt:
    """A haystack with facts, questions, and answers to be learned or predicted.

    Attributes:
        task: name of the generator.
        tokens_T: (T,) int64, T exactly as asked for.
        answers: token spans [start, end) of the answers.
        facts: token spans of the facts that the first question needs, in order.
        depth: place of the first of these facts: its start over the start of the question.
        question: start of the first question; what stands before is the context.
    """

    task: str
    tokens_T: np.ndarray
    answers: tuple[Span, ...]
    facts: tuple[Span, ...]
    depth: float
    question: int

    @property
    def labels_T(self) -> np.ndarray:
        """(T,) int64: tokens of the answers, -100 elsewhere."""
        labels_T = np.full(len(self.tokens_T), -100, dtype=np.int64)
        for start, end in self.answers:
            labels_T[start:end] = self.tokens_T[start:end]
        return labels_T

    def without_context(self) -> Prompt:
        """Questions and answers alone: what can be had without reading."""
        shifted = tuple((start - self.question, end - self.question) for start, end in self.answers)
        return replace(self, tokens_T=self.tokens_T[self.question :], answers=shifted, facts=(), depth=0.0, question=0)


@dataclass(frozen=True)
class Riddle:
    """What a task asks, before it is buried.

    Attributes:
        facts: in any order; those that the first question needs are `evidence`.
        evidence: indices into `facts`.
        turns: (question, answer) pairs.
    """

    facts: tuple[Fact, ...]
    evidence: tuple[int, ...]
    turns: tuple[tuple[str, str], ...]


Task = Callable[[random.Random, float], Riddle]


def make_prompt(
    task: str,
    riddle: Task,
    tokenizer: Any,
    length: int,
    *,
    seed: int,
    depth: float | None = None,
    haystack: np.ndarray | None = None,
) -> Prompt:
    """A prompt of exactly `length` tokens.

    Args:
        task: name, part of what is drawn.
        riddle: draws facts, questions and answers from a generator and the depth of the first fact needed.
        tokenizer: Transformers tokenizer.
        length: tokens, answers included.
        seed: of everything drawn.
        depth: of the first fact that is needed, from 0 to 1; drawn when None.
        haystack: tokens to bury the facts in, at least `length`; sentences without meaning or digits when None.

    Raises:
        ConfigError: a length that facts and questions alone exceed, or a depth outside [0, 1].
        DataError: a haystack that is too short or holds the answers.
    """
    if depth is not None and not 0 <= depth <= 1:
        raise ConfigError(f"depth must lie in [0, 1], got {depth!r}")
    for attempt in range(_DRAWS):
        rng = random.Random(f"{seed}|{task}|{length}|{attempt}")
        drawn = rng.random()
        found = riddle(rng, drawn if depth is None else depth)
        prompt = _bury(task, found, tokenizer, length, rng, haystack)
        if prompt is not None:
            return prompt
    raise DataError(f"{task}: the haystack holds the answers by itself; give one without long numbers")


def _bury(
    task: str, riddle: Riddle, tokenizer: Any, length: int, rng: random.Random, haystack: np.ndarray | None
) -> Prompt | None:
    """The prompt, or None when the haystack holds a value by chance."""
    facts = [_encode(tokenizer, f" {fact.text}") for fact in riddle.facts]
    turns = [(_encode(tokenizer, f"\n{q}"), _encode(tokenizer, f" {a}")) for q, a in riddle.turns]
    needed = sum(map(len, facts)) + sum(len(q) + len(a) for q, a in turns)
    room = length - needed
    if room < 1:
        raise ConfigError(f"{task}: facts and questions have {needed} tokens, so {length} leave no room for a haystack")
    hay, borders = _haystack(tokenizer, room, rng, haystack)
    hay_T = np.asarray(hay, dtype=np.int64)
    for fact in riddle.facts:
        if fact.value is not None and _count(hay_T, _encode(tokenizer, f" {fact.value}")):
            return None
    order = sorted(range(len(facts)), key=lambda i: riddle.facts[i].depth)
    pieces: list[int] = []
    spans: dict[int, Span] = {}
    done = 0
    for index in order:
        place = max(done, _border(borders, riddle.facts[index].depth * room))
        pieces += hay[done:place]
        spans[index] = (len(pieces), len(pieces) + len(facts[index]))
        pieces += facts[index]
        done = place
    pieces += hay[done:]
    question, answers = len(pieces), []
    for asked, answer in turns:
        pieces += asked
        answers.append((len(pieces), len(pieces) + len(answer)))
        pieces += answer
    evidence = tuple(sorted(spans[i] for i in riddle.evidence))
    tokens_T = np.asarray(pieces, dtype=np.int64)
    return Prompt(task, tokens_T, tuple(answers), evidence, evidence[0][0] / question, question)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _haystack(
    tokenizer: Any, room: int, rng: random.Random, given: np.ndarray | None
) -> tuple[list[int], np.ndarray | None]:
    """`room` tokens, and where sentences begin."""
    if given is not None:
        if len(given) < room:
            raise DataError(f"the haystack has {len(given)} tokens, {room} are needed")
        start = rng.randrange(len(given) - room + 1)
        return [int(x) for x in given[start : start + room]], None
    sentences = _sentences(tokenizer)
    hay: list[int] = []
    borders = [0]
    while len(hay) < room:
        hay += rng.choice(sentences)
        borders.append(len(hay))
    return hay[:room], np.asarray([b for b in borders if b <= room])


@functools.lru_cache(maxsize=4)
def _sentences(tokenizer: Any) -> tuple[list[int], ...]:
    """Tokens of every sentence of the haystack."""
    parts = [text.split("|") for text in (_SUBJECTS, _VERBS, _OBJECTS)]
    return tuple(_encode(tokenizer, f" {' '.join(words)}.") for words in itertools.product(*parts))


def _border(borders: np.ndarray | None, place: float) -> int:
    """The sentence border next to a place."""
    if borders is None:
        return round(place)
    return int(borders[np.abs(borders - place).argmin()])


def _count(tokens: Sequence[int] | np.ndarray, wanted: Sequence[int]) -> int:
    """How often a run of tokens occurs."""
    tokens_T, size = np.asarray(tokens, dtype=np.int64), len(wanted)
    if len(tokens_T) < size or size == 0:
        return 0
    windows = np.lib.stride_tricks.sliding_window_view(tokens_T, size)
    return int((windows == np.asarray(wanted, dtype=np.int64)).all(1).sum())


def _numbers(rng: random.Random, count: int) -> list[str]:
    """Different numbers of six digits."""
    return [str(x) for x in rng.sample(range(100_000, 1_000_000), count)]


_NOUNS_TEXT = (
    "anchor basket candle dragon engine falcon garden hammer island jacket kettle ladder magnet needle orange pencil "
    "quartz rocket saddle temple umbrella violin window yogurt zipper bottle carpet desert feather glacier"
)
_NOUNS = tuple(_NOUNS_TEXT.split())


def passkey(rng: random.Random, depth: float) -> Riddle:
    """One pass key in meaningless text."""
    (key,) = _numbers(rng, 1)
    fact = Fact(f"The pass key is {key}. Remember it: the pass key is needed later.", key, depth)
    return Riddle((fact,), (0,), (("What is the pass key? The pass key is", key),))


def single(rng: random.Random, depth: float) -> Riddle:
    """One named number."""
    return multi_key(rng, depth, keys=1)


def multi_key(rng: random.Random, depth: float, keys: int = 8, questions: int = 1) -> Riddle:
    """Several named numbers, of which some are asked for; the others distract."""
    names, values = rng.sample(_NOUNS, keys), _numbers(rng, keys)
    places = [depth, *(rng.random() for _ in range(keys - 1))]
    facts = tuple(_named(*item) for item in zip(names, values, places, strict=True))
    turns = tuple((_ask(names[i]), values[i]) for i in range(questions))
    return Riddle(facts, (0,), turns)


def multi_value(rng: random.Random, depth: float, values: int = 3, distractors: int = 3) -> Riddle:
    """Several numbers under one name, all asked for in the order in which they stand."""
    names, numbers = rng.sample(_NOUNS, 1 + distractors), _numbers(rng, values + distractors)
    places = sorted([depth, *(depth + (1 - depth) * rng.random() for _ in range(values - 1))])
    facts = [_named(names[0], number, place) for number, place in zip(numbers, places, strict=False)]
    for name, number in zip(names[1:], numbers[values:], strict=True):
        facts.append(_named(name, number, rng.random()))
    answer = ", ".join(numbers[:values])
    question = f"What are all the numbers of the {names[0]}, in order? They are"
    return Riddle(tuple(facts), tuple(range(values)), ((question, answer),))


def _named(name: str, value: str, depth: float) -> Fact:
    return Fact(f"The number of the {name} is {value}.", value, depth)


def _ask(name: str) -> str:
    return f"What is the number of the {name}? The number of the {name} is"


NEEDLES: Mapping[str, Task] = {
    "passkey": passkey,
    "single": single,
    "multi_key": multi_key,
    "multi_value": multi_value,
}


@torch.no_grad()
def exact_matches(
    model: Any, prompts: Sequence[Prompt], *, handle: Handle | None = None, sparse: bool = False
) -> list[bool]:
    """Whether each prompt's answers are all predicted, token by token, given the tokens before (teacher forced).

    That equals greedy generation being right: the first wrong token ends both. Only rows that predict answers go
    through the head.

    Args:
        model: a Transformers causal language model, PEFT-wrapped or not, in any mode.
        prompts: scored one at a time.
        handle: the attached plan, needed when `sparse`.
        sparse: select rows as training does; answer rows are always kept.

    Raises:
        ConfigError: `sparse` without a handle.
    """
    if sparse and handle is None:
        raise ConfigError("a sparse evaluation needs the handle of an attached plan")
    base, was_training = causal_model(model), model.training
    device = base.get_input_embeddings().weight.device
    head = base.get_output_embeddings()
    model.eval()
    found = []
    try:
        for prompt in prompts:
            tokens_1T = torch.from_numpy(prompt.tokens_T).to(device)[None]
            rows = torch.cat([torch.arange(s - 1, e - 1) for s, e in prompt.answers]).to(device)
            mask_1T = torch.zeros_like(tokens_1T, dtype=torch.bool)
            mask_1T[0, rows] = True
            hidden_TM = last_hidden(model, {"input_ids": tokens_1T}, mask_1T, handle=handle, sparse=sparse)[0]
            predicted_N = head(hidden_TM[rows]).argmax(-1)  # logit scale and soft cap keep the order
            found.append(bool((predicted_N == tokens_1T[0, rows + 1]).all()))
    finally:
        model.train(was_training)
    return found
