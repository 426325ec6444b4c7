"""Tasks that need several facts: two-hop chains and variable tracking, after the synthetic tasks of RULER.

*Source*: RULER (arXiv 2404.06654), whose wordings are not used.
"""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from typing import Any

import numpy as np

from lemo.eval.needle import NEEDLES, Fact, Prompt, Riddle, Task, make_prompt

_PEOPLE_TEXT = (
    "Alice Boris Clara David Elena Felix Grace Henry Irene Jonas Karin Louis Maria Niels Olivia Peter Quentin Rosa "
    "Simon Tilda Ulrich Vera Walter Xenia Yusuf Zelda"
)
_PEOPLE = tuple(_PEOPLE_TEXT.split())


def two_hop(rng: random.Random, depth: float, chains: int = 4) -> Riddle:
    """Who keeps whose code: the answer's fact is found only through another one. Other chains distract."""
    people = rng.sample(_PEOPLE, 2 * chains)
    codes = [str(x) for x in rng.sample(range(100_000, 1_000_000), chains)]
    facts = []
    for number, code in enumerate(codes):
        asked, keeper = people[2 * number : 2 * number + 2]
        first, second = (depth, rng.random()) if number == 0 else (rng.random(), rng.random())
        facts.append(Fact(f"The code of {asked} is the one that {keeper} keeps.", None, first))
        facts.append(Fact(f"{keeper} keeps the code {code}.", code, second))
    question = f"What is the code of {people[0]}? The code of {people[0]} is"
    return Riddle(tuple(facts), (0, 1), ((question, codes[0]),))


def variable_tracking(rng: random.Random, depth: float, hops: int = 3, chains: int = 2) -> Riddle:
    """Assignments in a chain: which variables hold a value? Other chains distract; assignments stand in order."""
    names = _names(rng, chains * (hops + 1))
    values = [str(x) for x in rng.sample(range(100_000, 1_000_000), chains)]
    facts = []
    for chain, value in enumerate(values):
        mine = names[chain * (hops + 1) : (chain + 1) * (hops + 1)]
        start = depth if chain == 0 else rng.random()
        places = sorted([start, *(start + (1 - start) * rng.random() for _ in range(hops))])
        facts.append(Fact(f"Let {mine[0]} = {value}.", value, places[0]))
        pairs = zip(mine[1:], mine[:-1], places[1:], strict=True)
        facts += [Fact(f"Let {new} = {old}.", None, place) for new, old, place in pairs]
    answer = ", ".join(names[: hops + 1])
    question = f"Which variables hold the value {values[0]}, in order of assignment? They are"
    return Riddle(tuple(facts), tuple(range(hops + 1)), ((question, answer),))


def _names(rng: random.Random, count: int) -> list[str]:
    """Different names of three capital letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(string.ascii_uppercase, k=3))] = None
    return list(found)


TASKS: Mapping[str, Task] = {**NEEDLES, "two_hop": two_hop, "variable_tracking": variable_tracking}


def paired_prompts(
    tokenizer: Any,
    length: int,
    *,
    task: str,
    count: int,
    seed: int,
    depths: int = 5,
    haystack: np.ndarray | None = None,
) -> list[Prompt]:
    """Prompts of one task, the same for whoever asks: `count` of them, depth bin after depth bin.

    Args:
        tokenizer: Transformers tokenizer.
        length: tokens of each prompt.
        task: a name of TASKS.
        count: prompts, split over the bins as evenly as possible.
        seed: of all of them; use another one than for training.
        depths: equal bins of [0, 1); the first fact lies in the middle of its bin.
        haystack: as `make_prompt` takes it.
    """
    found = []
    for number in range(count):
        depth = (number * depths // count + 0.5) / depths
        options = {"seed": 1_000_003 * seed + number, "depth": depth, "haystack": haystack}
        found.append(make_prompt(task, TASKS[task], tokenizer, length, **options))
    return found
