"""Peak memory of a stretch of code: most that the CUDA allocator held, or the largest resident size of the process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2**30


@dataclass
class Peak:
    """Filled in when the `track_peak` block ends.

    Attributes:
        peak_bytes: most memory held during the block.
        start_bytes: memory held when it began.
        source: `cuda` (bytes allocated by torch) or `resident` (of this process).
    """

    peak_bytes: int = 0
    start_bytes: int = 0
    source: str = ""

    @property
    def peak_gib(self) -> float:
        """Peak in GiB."""
        return self.peak_bytes / GIB


@contextmanager
def track_peak(device: Any = None, *, interval_s: float = 0.01) -> Iterator[Peak]:
    """Measures the peak memory of a block.

    On a CUDA device the allocator's own peak counter is reset and read: exact. On a CPU a thread samples the resident
    size of this process; a peak shorter than `interval_s` can be missed, and memory freed by earlier code may still be
    resident, so variants that are compared run in a process each.

    Args:
        device: torch device or its name; None for the CPU.
        interval_s: time between samples on a CPU.
    """
    peak = Peak()
    if device is not None and str(device).startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        peak.source, peak.start_bytes = "cuda", torch.cuda.memory_allocated(device)
        try:
            yield peak
        finally:
            torch.cuda.synchronize(device)
            peak.peak_bytes = torch.cuda.max_memory_allocated(device)
        return
    peak.source, peak.start_bytes = "resident", resident_bytes()
    peak.peak_bytes = peak.start_bytes
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(interval_s):
            peak.peak_bytes = max(peak.peak_bytes, resident_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        peak.peak_bytes = max(peak.peak_bytes, resident_bytes())
        stop.set()
        thread.join()


def resident_bytes() -> int:
    """Memory of this process that is resident now, in bytes.

    Raises:
        OSError: the system offers no such number.
    """
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        return int(statm.read_text().split()[1]) * resource.getpagesize()
    import psutil  # comes with accelerate

    return psutil.Process().memory_info().rss
