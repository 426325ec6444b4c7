"""One turn of one method in a process of its own: `python -m benchmarks.training_cell`, a job as JSON on its input.

The process imports its libraries first and then waits for the job, so that the next turn can get ready while this one
runs. The result goes into the file that the job names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.peer import Prepared, Setting, Unsupported, load_method
from lemo.errors import LemoError
from lemo.measure.memory import GIB, track_peak
from lemo.measure.record import commit, device_name, versions
from lemo.train.rehearsal import random_batch, shape_config


@dataclass(frozen=True)
class Job:
    """What one process does.

    Attributes:
        setting: of the comparison.
        method: `PEER:KEY=VALUE,...`.
        turn: 0 or 1: which of the method's turns.
        steps: timed steps.
        warmup: steps before, not timed.
        probe: run one more step with the method's own measurements.
    """

    setting: Setting
    method: str
    turn: int
    steps: int
    warmup: int
    probe: bool = False


class PhaseClock:
    """Seconds between marks, by CUDA events where there is a GPU: they do not hold up the step."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.marks = cuda, []

    def mark(self) -> None:
        """Ends a phase."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of each phase; the device must be done."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [a.elapsed_time(b) / 1e3 if self.cuda else b - a for a, b in pairs]


class Trainer:
    """Steps of one prepared method, over a few batches that take turns."""

    PHASES = ("forward", "backward", "optimizer")

    def __init__(
        self,
        prepared: Prepared,
        setting: Setting,
        vocabulary: int,
        batches: int,
        span: int | None = None,
        local_share: float = 0.0,
    ) -> None:
        self.prepared, self.cuda = prepared, setting.device.startswith("cuda")
        trained = [p for p in prepared.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=self.cuda)
        self.batches = [
            {name: x.to(setting.device) for name, x in batch.items()}
            for batch in make_batches(setting, vocabulary, batches, span, local_share)
        ]
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.phases: dict[str, list[float]] = {name: [] for name in self.PHASES}
        self.held_bytes: list[int] = []
        self.steps = 0

    def step(self, *, timed: bool) -> None:
        """Forward, backward, AdamW, gradients back to None."""
        batch = self.batches[self.steps % len(self.batches)]
        self.steps += 1
        self._synchronize()
        before = torch.cuda.memory_allocated() if self.cuda else 0
        clock, start = PhaseClock(self.cuda), time.perf_counter()
        clock.mark()
        loss = self.prepared.forward(batch)
        held = (torch.cuda.memory_allocated() if self.cuda else 0) - before
        clock.mark()
        loss.backward()
        clock.mark()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        clock.mark()
        self._synchronize()
        seconds = time.perf_counter() - start
        self.losses.append(float(loss.detach()))
        if timed:
            self.seconds.append(seconds)
            self.held_bytes.append(held)
            for name, spent in zip(self.PHASES, clock.seconds(), strict=True):
                self.phases[name].append(spent)

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def make_batches(
    setting: Setting, vocabulary: int, count: int, span: int | None = None, local_share: float = 0.0
) -> Iterator[dict[str, torch.Tensor]]:
    """The same batches for every method of a setting.

    Args:
        setting: what methods share.
        vocabulary: V.
        count: of batches.
        span: rows of a run of supervised blocks.
        local_share: of blocks that are supervised besides, and attend locally.
    """
    text = None if setting.data is None else np.load(setting.data)["tokens"]
    for index in range(count):
        ids = None
        if text is not None:
            if len(text) < setting.tokens:
                raise Unsupported(
                    f"{Path(setting.data or '').name} has {len(text)} tokens, {setting.tokens} are needed"
                )
            start = index * setting.tokens % (len(text) - setting.tokens + 1)
            ids = torch.from_numpy(text[start : start + setting.tokens].astype(np.int64)) % vocabulary
        yield random_batch(
            vocabulary,
            setting.tokens,
            share=setting.supervised_share,
            seed=1000 * setting.seed + index,
            block_size=setting.block_size,
            ids_T=ids,
            span=span,
            local_share=local_share,
        )


def run_job(job: Job) -> dict[str, Any]:
    """Runs a turn. Out of memory, and a peer that cannot run, are results."""
    setting, started = job.setting, time.perf_counter()
    result: dict[str, Any] = {"method": job.method, "turn": job.turn, "warmup": job.warmup, "versions": all_versions()}
    result |= {"device": device_name(), "commit": commit(), "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")}
    try:
        peer, options = load_method(job.method)
        if "share" in options:
            setting = replace(setting, supervised_share=float(options["share"]))
        config = shape_config(setting.shape, tokens=setting.tokens, layers=setting.layers)
        prepared = peer.prepare(config, setting, options)
        # As many as warm-up steps: kernels are compiled for every number of rows before a step is timed.
        vocabulary, span = config.get_text_config().vocab_size, int(options["span"]) if "span" in options else None
        local = float(options.get("local", 0))
        trainer = Trainer(prepared, setting, vocabulary, max(1, job.warmup), span, local)
        result |= {"options": options, "build_s": time.perf_counter() - started}
        with _kept_by(trainer, result):
            _measure(trainer, job, result)
        result["status"] = "ok"
    except torch.OutOfMemoryError as error:
        result |= {"status": "out of memory", "reason": str(error).splitlines()[0]}
    except LemoError as error:
        result |= {"status": "unsupported", "reason": str(error)}
    result["total_s"] = time.perf_counter() - started
    return result


def _measure(trainer: Trainer, job: Job, result: dict[str, Any]) -> None:
    for _ in range(job.warmup):
        trainer.step(timed=False)
    with track_peak(job.setting.device) as peak:
        for _ in range(job.steps):
            trainer.step(timed=True)
    result |= {"peak_gib": peak.peak_gib, "memory_source": peak.source}
    if trainer.cuda:
        result["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    result["describe"] = trainer.prepared.describe()
    if job.probe:
        with trainer.prepared.probe() as probed:
            trainer.step(timed=False)
        result["probe"] = probed
    if not all(np.isfinite(trainer.losses)):
        raise FloatingPointError(f"losses are not finite: {trainer.losses}")


@contextmanager
def _kept_by(trainer: Trainer, result: dict[str, Any]) -> Iterator[None]:
    """Writes what was measured into the result, also when a step failed."""
    try:
        yield
    finally:
        result |= {"seconds": trainer.seconds, "phases": trainer.phases, "held_bytes": trainer.held_bytes}
        result["losses"] = trainer.losses


def all_versions() -> dict[str, str]:
    """Versions of what a Record names, and of the peers."""
    found = versions()
    for package in ("liger-kernel", "unsloth"):
        if importlib.util.find_spec(package.replace("-", "_")) is not None:
            found[package] = metadata.version(package)
    return found


def read_job(line: str) -> tuple[Job, Path]:
    """A job and the file for its result."""
    data = json.loads(line)
    return Job(**{**data["job"], "setting": Setting(**data["job"]["setting"])}), Path(data["result"])


def main() -> int:
    import peft  # noqa: F401  most of the start is spent in these imports, before the job is known
    import transformers

    import lemo.runtime.attach  # noqa: F401

    transformers.logging.set_verbosity_error()
    line = sys.stdin.readline()
    if not line.strip():
        return 0  # the parent stopped before this turn
    job, path = read_job(line)
    result = run_job(job)
    path.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
