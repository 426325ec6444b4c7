"""Arithmetic on rows of a batch on the host, on one thread.

torch shares these sums out to its pool of threads, however small they are. Waking the pool takes longer than the sum,
and much longer where workers that load data keep the processors busy: while a step begins, the device waits for it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def repeat(values: Tensor, counts: Tensor) -> Tensor:
    """Each of the values so many times, as `torch.repeat_interleave`; both on the CPU."""
    return torch.from_numpy(np.repeat(values.numpy(), counts.numpy()))


def search(rising: Tensor, values: Tensor, *, right: bool = False) -> Tensor:
    """(N,) int64 how many of the numbers that ascend are below each value, or with `right` not above it; on the CPU."""
    return torch.from_numpy(np.searchsorted(rising.numpy(), values.numpy(), side="right" if right else "left"))
