"""Samples of a domain without end, and samples joined into batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Endless:
    """Samples in a shuffled order, again and again; `draw` says how often they have been through."""

    def __init__(self, samples: Sequence[dict[str, Any]], seed: int) -> None:
        self.samples, self.epoch, self.left = samples, -1, []
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> tuple[dict[str, Any], int]:
        """A sample, and how often all have been drawn before it."""
        if not self.left:
            self.epoch += 1
            self.left = torch.randperm(len(self.samples), generator=self.generator).tolist()
        return self.samples[self.left.pop()], self.epoch


def join(made: list[dict[str, Tensor]], most: int) -> list[dict[str, Tensor]]:
    """Samples of one length in batches of `most`, others each in their own."""
    if len({m["input_ids"].shape for m in made}) > 1:
        return made
    return [{k: torch.cat([m[k] for m in made[i : i + most]]) for k in made[0]} for i in range(0, len(made), most)]


def far_copy(ids_1T: Tensor) -> tuple[Tensor, Tensor]:
    """A window that ends with a copy of what stands near its start, to ask whether a model reads that far.

    Returns:
        (1, T) ids whose last T // 32 are those from T // 16 on, and (1, T) bool, rows that predict them: the first
        quarter left out, which is there to find the place.
    """
    tokens = ids_1T.shape[1]
    count, start = tokens // 32, tokens // 16
    copied_1T, rows_1T = ids_1T.clone(), torch.zeros_like(ids_1T, dtype=torch.bool)
    copied_1T[:, -count:] = ids_1T[:, start : start + count]
    rows_1T[:, tokens - count + count // 4 - 1 : -1] = True
    return copied_1T, rows_1T
