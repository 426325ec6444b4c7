"""Time of training steps, and of variants that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class StepTimer:
    """Wall time of steps; on a CUDA device between synchronisations. `with timer.step(): ...`, then `timer.seconds`."""

    def __init__(self, device: Any = None) -> None:
        self.device = device if device is not None and str(device).startswith("cuda") else None
        self.seconds: list[float] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Times one step. A step that raises is not counted."""
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self.seconds.append(time.perf_counter() - start)

    def _synchronize(self) -> None:
        if self.device is not None:
            import torch

            torch.cuda.synchronize(self.device)


def alternate(
    variants: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1, device: Any = None
) -> dict[str, list[float]]:
    """Seconds per call of several variants that take turns in one process, so that drifts of the machine hit all alike.

    Args:
        variants: what is called, by name.
        rounds: timed calls of each.
        warmup: calls of each before, not timed.
        device: torch device that must be done before the clock stops; None for the CPU.
    """
    for _ in range(warmup):
        for run in variants.values():
            run()
    timers = {name: StepTimer(device) for name in variants}
    for turn in range(rounds):
        # Every second round goes backwards, so that no variant always runs in the wake of the same other one.
        order = list(variants) if turn % 2 == 0 else list(variants)[::-1]
        for name in order:
            with timers[name].step():
                variants[name]()
    return {name: timer.seconds for name, timer in timers.items()}
