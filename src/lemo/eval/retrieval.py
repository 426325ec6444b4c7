"""Accuracy of retrieval by task, length and depth, dense or sparse, on paired prompts that follow from a seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lemo.errors import ConfigError
from lemo.eval.needle import exact_matches
from lemo.eval.ruler import TASKS, paired_prompts
from lemo.runtime.attach import Handle

ALIASES = {"needle": "single"}
DEFAULT_PROMPTS = 32


@dataclass(frozen=True)
class RetrievalCell:
    """Prompts of one task, length and depth bin.

    Attributes:
        task: name of the task.
        length: tokens of a prompt.
        depth: where the first fact that is needed lies, 0 (start) to 1 (end): the middle of its bin.
        right: of each prompt, whether its answer is right in every token.
    """

    task: str
    length: int
    depth: float
    right: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        """Share of prompts with the right answer."""
        return fmean(self.right)


@dataclass(frozen=True)
class RetrievalReport:
    """Cells of all tasks and lengths.

    Attributes:
        mode: `dense`, or `sparse (look-ahead)`.
        seed: of the prompts.
        cells: by task, length and depth, in this order.
    """

    mode: str
    seed: int
    cells: tuple[RetrievalCell, ...]

    @property
    def rows(self) -> dict[tuple[str, int], list[RetrievalCell]]:
        """Cells by task and length, depth after depth."""
        grouped = itertools.groupby(self.cells, key=lambda cell: (cell.task, cell.length))
        return {key: list(cells) for key, cells in grouped}

    @property
    def depths(self) -> list[float]:
        """Middles of the depth bins."""
        return sorted({cell.depth for cell in self.cells})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        cells = [
            {"task": c.task, "length": c.length, "depth": c.depth, "accuracy": c.accuracy, "right": list(c.right)}
            for c in self.cells
        ]
        return {"mode": self.mode, "seed": self.seed, "cells": cells}


def parse_tasks(text: str) -> dict[str, int]:
    """Prompts by task, from `passkey:64,two_hop`.

    Raises:
        ConfigError: an unknown task, one named twice, or a count that is no positive number.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, count = part.strip().partition(":")
        task = ALIASES.get(name, name)
        if task not in TASKS:
            raise ConfigError(f"--retrieval: unknown task {name!r}; known are {', '.join([*ALIASES, *TASKS])}")
        if task in found:
            raise ConfigError(f"--retrieval: {name} is named twice")
        if count and not (count.isdecimal() and int(count) > 0):
            raise ConfigError(f"--retrieval: {part.strip()!r}: prompts must be a positive number")
        found[task] = int(count) if count else DEFAULT_PROMPTS
    return found


def parse_lengths(text: str, context_tokens: int | None) -> list[int]:
    """Lengths in ascending order, from `4096,8192`.

    Raises:
        ConfigError: what is no positive number, or beyond the model's context.
    """
    parts = [part.strip().replace("_", "") for part in text.split(",")]
    if wrong := [part for part in parts if not (part.isdecimal() and int(part) > 0)]:
        raise ConfigError(f"--lengths: {wrong[0]!r} is no positive number of tokens")
    lengths = sorted({int(part) for part in parts})
    if context_tokens is not None and lengths[-1] > context_tokens:
        raise ConfigError(
            f"--lengths: {lengths[-1]} exceeds the model's context of {context_tokens}; name shorter ones, or set "
            "model.context_length and model.rope_scaling"
        )
    return lengths


def check_prompts(tasks: Mapping[str, int], depths: int) -> None:
    """Raises ConfigError unless every task has a prompt for each depth."""
    for task, count in tasks.items():
        if count < depths:
            raise ConfigError(
                f"{task}: {count} prompts are fewer than the {depths} depths; ask for more prompts, or for fewer "
                "depths (--bins)"
            )


def evaluate_retrieval(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, int],
    lengths: Sequence[int],
    *,
    seed: int = 0,
    depths: int = 5,
    sparse: Handle | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> RetrievalReport:
    """Asks every task at every length, the fact at every depth.

    Args:
        model: a Transformers causal language model, PEFT-wrapped or not.
        tokenizer: of the model.
        tasks: prompts by name of `lemo.eval.ruler.TASKS`, split over the depths; at least one to each.
        lengths: tokens of prompts.
        seed: of the prompts; the same prompts come from the same seed, whatever is asked.
        depths: equal bins of [0, 1).
        sparse: an attached plan, to select rows as training does; rows that predict the answer are kept, so selection
            is look-ahead. None asks densely.
        progress: called with task and length before each.

    Raises:
        ConfigError: fewer prompts than depths, or lengths without room for a haystack.
    """
    check_prompts(tasks, depths)
    cells = []
    for task, count in tasks.items():
        for length in lengths:
            if progress is not None:
                progress(task, length)
            prompts = paired_prompts(tokenizer, length, task=task, count=count, seed=seed, depths=depths)
            right = exact_matches(model, prompts, handle=sparse, sparse=sparse is not None)
            for depth in range(depths):
                # The bin of prompt i, as paired_prompts deals them out.
                mine = tuple(r for i, r in enumerate(right) if i * depths // count == depth)
                cells.append(RetrievalCell(task, length, (depth + 0.5) / depths, mine))
    return RetrievalReport("dense" if sparse is None else "sparse (look-ahead)", seed, tuple(cells))
