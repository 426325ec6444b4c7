"""Several processes of one run, one per GPU: who writes, what all agree on, and how an error of one ends all."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lemo.errors import ConfigError, LemoError

T = TypeVar("T")

# Calibration on one process may take hours, during which the others wait.
_PATIENCE = timedelta(days=2)
_SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


class PeerError(LemoError):
    """Another process of the run stopped; the message says which and why."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as `torchrun` or `accelerate launch` started them. Each holds the whole model (DDP).

    Attributes:
        rank: number of this one; 0 writes.
        count: how many there are.
        local_rank: its number on its machine, which is that of its GPU.
        group: through which they talk, apart from the gradients' collectives; None for a single process.
        owns: whether this run joined them, rather than the program that called it.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    group: Any = None
    owns: bool = False

    @classmethod
    def start(cls) -> Processes:
        """Joins the other processes that the environment names.

        Raises:
            ConfigError: an incomplete environment, a sharding launcher, or more processes than GPUs on a machine.
        """
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE is {count}, but {missing[0]} is not set; start several processes with torchrun or "
                "accelerate launch, or unset WORLD_SIZE"
            )
        for name, sharding in _SHARDING.items():
            if os.environ.get(name, "").lower() in ("1", "true"):
                raise ConfigError(
                    f"a recipe gives every process the whole model and cannot shard it ({sharding}): launch without, "
                    "or use lemo.attach with Trainer, as in examples/trainer.py"
                )
        rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        if torch.cuda.is_available():
            if local_rank >= torch.cuda.device_count():
                raise ConfigError(f"process {local_rank} has no GPU: this machine has {torch.cuda.device_count()}")
            torch.cuda.set_device(local_rank)
        owns = not dist.is_initialized()
        if owns:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if rank > 0:
            # What is to be said is the same in all processes; the first says it.
            logging.getLogger("lemo").setLevel(logging.ERROR)
        return cls(rank, count, local_rank, dist.new_group(backend="gloo", timeout=_PATIENCE), owns)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    @property
    def device(self) -> str | None:
        """Where this process's model goes; None to leave it to whoever loads."""
        return f"cuda:{self.local_rank}" if self.count > 1 and torch.cuda.is_available() else None

    def trainer_arguments(self) -> dict[str, Any]:
        """Keywords of TrainingArguments that several processes need."""
        if self.count == 1:
            return {}
        # Each trained tensor has a gradient in each step: every layer runs, whatever was selected.
        found: dict[str, Any] = {"ddp_find_unused_parameters": False}
        return found if torch.cuda.is_available() else found | {"use_cpu": True, "ddp_backend": "gloo"}

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of a list that all have: every `count`-th item."""
        return items[self.rank :: self.count]

    def gather(self, value: T) -> list[T]:
        """What every process has, in order of rank.

        Raises:
            PeerError: another process stopped instead of coming here.
        """
        return [value] if self.group is None else self._exchange(value)

    def from_main(self, make: Callable[[], T]) -> T:
        """The first process's result of `make`, which the others do not call.

        Raises:
            PeerError: the first process failed; there, its own error.
        """
        if self.group is None:
            return make()
        # An error goes to the others through `together`, around every use of this.
        return self._exchange(make() if self.is_main else None)[0]

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, true where it is true in any process."""
        return (
            flags if self.group is None else tuple(any(column) for column in zip(*self._exchange(flags), strict=True))
        )

    def combine(self, sums: Tensor, counts: Tensor, sequences: list[float]) -> tuple[Tensor, Tensor, list[float]]:
        """Totals by position, and sequences in their order, of an evaluation whose windows `share` dealt out.

        Args:
            sums: (T,) fp64 sums of losses by position, of this process.
            counts: (T',) how many rows they count.
            sequences: mean loss of each of its sequences, one to a batch.
        """
        if self.group is None:
            return sums, counts, sequences
        parts = self._exchange((sums, counts, sequences))
        whole = [torch.zeros(max(len(part[i]) for part in parts), dtype=torch.float64) for i in (0, 1)]
        for part in parts:
            for total, mine in zip(whole, part, strict=False):
                total[: len(mine)] += mine
        longest = max(len(part[2]) for part in parts)
        ordered = [part[2][i] for i in range(longest) for part in parts if i < len(part[2])]
        return whole[0], whole[1], ordered

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, an error of one process ends all: they learn of it where they next wait for it, at the latest here.

        Raises:
            PeerError: another process stopped.
        """
        try:
            yield
        except PeerError:
            raise
        except Exception as error:
            if self.group is not None:
                self._exchange(None, error=f"{type(error).__name__}: {error}")
            raise
        if self.group is not None:
            self._exchange(None)

    def close(self) -> None:
        """Leaves the other processes, at the end of a run that went well.

        With its last reference a group waits for its threads. One that still gave back the tensors of the last
        collective would end the process by SIGABRT, when it asks an interpreter that is shutting down for its lock.
        """
        group = self.group
        if group is not None:
            object.__setattr__(self, "group", None)
            dist.destroy_process_group(None if self.owns else group)

    def _exchange(self, value: Any, error: str | None = None) -> list[Any]:
        """Every process's value. All that processes tell each other passes here, so that calls always match."""
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, (value, error), group=self.group)
        for rank, (_, text) in enumerate(found):
            if text is not None and error is None:
                raise PeerError(f"process {rank} of {self.count} stopped: {text}")
        return [one for one, _ in found]
