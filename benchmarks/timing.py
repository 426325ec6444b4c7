"""Milliseconds and bytes of calls on one device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

Samples = dict[str, list[float]]
# About half a millisecond of waiting on the device.
QUEUE_CYCLES = 1_000_000


def alternating(functions: dict[str, Callable[[], Any]], device: str, repeats: int, queued: bool = False) -> Samples:
    """Milliseconds of each function, called in turn.

    Args:
        functions: by name.
        device: `cpu` or `cuda`.
        repeats: samples of each.
        queued: the device is kept waiting while a call is launched, so that launching is not timed. In a training step
            the host runs ahead in the same way.
    """
    samples: Samples = {name: [] for name in functions}
    for round_ in range(repeats + 3):
        for name, function in functions.items():
            elapsed = _milliseconds(function, device, queued)
            if round_ >= 3:  # the first rounds compile and warm up
                samples[name].append(elapsed)
    return samples


def _milliseconds(function: Callable[[], Any], device: str, queued: bool) -> float:
    if device == "cpu":
        begin = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - begin)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if queued:
        torch.cuda._sleep(QUEUE_CYCLES)
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def peak_bytes(function: Callable[[], Any], device: str) -> int | None:
    """Bytes that a call allocates on top of what lives before it."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
