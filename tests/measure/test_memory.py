"""Peaks are seen, attributed to their block, and survive errors; timers count what ran."""

from __future__ import annotations

import pytest
import torch

from lemo.measure.memory import GIB, resident_bytes, track_peak
from lemo.measure.profile import StepTimer, alternate

MIB = 2**20


def test_a_temporary_tensor_shows_in_the_peak_of_its_block():
    with track_peak(interval_s=0.001) as peak:
        held = torch.ones(64 * MIB, dtype=torch.uint8)
        for _ in range(20):
            held.add_(1)
        del held
    assert peak.source == "resident"
    assert peak.peak_bytes - peak.start_bytes >= 48 * MIB
    assert peak.peak_gib == peak.peak_bytes / GIB


def test_an_idle_block_has_no_large_peak():
    with track_peak() as peak:
        pass
    assert 0 < peak.start_bytes <= peak.peak_bytes < peak.start_bytes + 16 * MIB


def test_the_peak_is_known_when_the_block_fails():
    with pytest.raises(RuntimeError), track_peak() as peak:
        raise RuntimeError
    assert peak.peak_bytes >= peak.start_bytes > 0


def test_resident_size_is_that_of_a_process_with_torch():
    assert 50 * MIB < resident_bytes() < 64 * GIB


def test_steps_are_counted_unless_they_fail():
    timer = StepTimer()
    for _ in range(3):
        with timer.step():
            pass
    with pytest.raises(ValueError), timer.step():
        raise ValueError
    assert len(timer.seconds) == 3 and min(timer.seconds) >= 0


def test_variants_take_turns_in_both_orders():
    calls: list[str] = []
    variants = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = alternate(variants, rounds=2, warmup=1)
    assert "".join(calls) == "ab" + "ab" + "ba"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


@pytest.mark.gpu
def test_the_allocator_peak_is_exact_on_cuda():
    with track_peak("cuda") as peak:
        held = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
        del held
    assert peak.source == "cuda" and peak.peak_bytes - peak.start_bytes == 64 * MIB
