"""Guards of long runs: steps that are not finite are skipped, and weights that are not finite are not saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from lemo.errors import LemoError

SKIPS = 3


class DivergedError(LemoError):
    """Training went to numbers that are not finite; the message names the step."""


class StepGuard(TrainerCallback):
    """Skips optimizer steps whose loss or gradient is not finite, and ends a run that has too many of them in a row.

    A skipped step leaves weights and the optimizer's state as they were; the schedule goes on. Several processes skip
    alike. Under fp16 autocast the Trainer's gradient scaler does this, and the guard does nothing.

    Attributes:
        most: skipped steps in a row that end the run.
        skipped: steps that were skipped since training began or resumed.
        say: prints a line.
        find: ids of samples by their tokens.
    """

    def __init__(
        self, say: Callable[[str], None], find: Callable[[Sequence[Tensor]], list[str]], *, most: int = SKIPS
    ) -> None:
        """Guards one Trainer, which calls `watch` with every loss."""
        self.say, self.find, self.most = say, find, most
        self.skipped: list[int] = []
        self._in_row = 0
        self._watched: list[tuple[Tensor, Any]] = []

    def watch(self, loss: Tensor, inputs: Any) -> None:
        """Remembers the loss of a batch, and whose it was, until the step; without waiting for the device."""
        ids = inputs.get("input_ids") if hasattr(inputs, "get") else None
        self._watched.append((torch.isfinite(loss.detach()).all(), ids))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forgets the step before."""
        self._watched = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Drops the gradients of a step that is not finite: an optimizer leaves parameters without a gradient alone.

        Raises:
            DivergedError: too many such steps in a row.
        """
        if getattr(args, "fp16", False):
            return
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        good = [finite for finite, _ in self._watched]
        if _agreed(all_finite([parameter.grad for parameter in parameters], good), args):
            self._in_row = 0
            return
        for parameter in parameters:
            parameter.grad = None
        step = state.global_step + 1
        self.skipped.append(step)
        self._in_row += 1
        text = f"loss or gradient not finite in step {step}{self._samples()}"
        if self._in_row >= self.most:
            raise DivergedError(
                f"{text}, as in the {self.most - 1} steps before; training ends here, the checkpoints so far are good. "
                "Lower training.learning_rate, lengthen training.warmup_steps, or look at the samples: lemo inspect"
            )
        if state.is_world_process_zero:
            self.say(f"{text}: the step is skipped, weights stay as they are")

    def notes(self) -> list[str]:
        """What a run's summary says."""
        if not self.skipped:
            return []
        shown = ", ".join(map(str, self.skipped[:10])) + (", ..." if len(self.skipped) > 10 else "")
        count = "1 step was" if len(self.skipped) == 1 else f"{len(self.skipped)} steps were"
        return [f"{count} skipped, as loss or gradient was not finite: {shown}"]

    def _samples(self) -> str:
        """The samples of the batches with a bad loss, or of the whole step when all losses were finite."""
        bad = [ids for finite, ids in self._watched if not finite] or [ids for _, ids in self._watched]
        found = self.find([row for ids in bad if isinstance(ids, Tensor) for row in ids])
        shown = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
        return f" (samples {shown})" if found else ""


def all_finite(tensors: Iterable[Tensor], flags: Iterable[Tensor] = ()) -> Tensor:
    """0-d bool tensor: whether the norm of every tensor is finite, and every flag true. Of shards, those here."""
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    found = [torch.isfinite(torch.nn.utils.get_total_norm(local))] if local else []
    found += [flag.to(found[0].device) if found else flag for flag in flags]
    return torch.stack(found).all() if found else torch.tensor(True)


def check_weights(model: Any, what: str, args: Any = None) -> None:
    """Refuses to save weights that are not finite.

    Args:
        model: whose trained parameters are looked at.
        what: would be saved.
        args: of the Trainer, where each process has a part of the weights; all of them must call this then.

    Raises:
        DivergedError: a trained parameter has NaN or infinity.
    """
    trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    good = all_finite(trained)
    if not (bool(good) if args is None else _agreed(good, args)):
        raise DivergedError(
            f"{what} is not saved: trained weights are not finite. Lower training.learning_rate or lengthen "
            "training.warmup_steps; checkpoints from before are good"
        )


def _agreed(good: Tensor, args: Any) -> bool:
    """The same answer in all processes: true where it is true in each."""
    if args.world_size > 1 and torch.distributed.is_initialized():
        flag = good.to(args.device, torch.int32)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
        return bool(flag)
    return bool(good)
