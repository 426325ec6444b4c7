"""How long a whole run will take: its optimizer steps, as far as they are known, times what a batch takes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from lemo.config import RunConfig
from lemo.measure.card import Card
from lemo.measure.step_time import forward_time, step_time
from lemo.train.data_gain import DataGain
from lemo.train.forecast import Forecast

UNKNOWN = "training.max_steps is not set, so the data says how many steps a run has: --data counts them"


@dataclass(frozen=True)
class RunTime:
    """Time of a run on one card. Loading, calibration and checkpoints are not in it.

    Attributes:
        steps: optimizer steps; with early stopping the most.
        batches: in all of them.
        accumulation: batches of a step, but for the last of an epoch.
        training_s: seconds of the batches.
        evaluations: measurements of the validation loss: before, after, and while training.
        evaluation_windows: windows of each, at most.
        evaluation_s: seconds of all of them.
        windows: of the training data; None where nobody has looked at them, so that each is taken to be of full length.
        may_stop: whether early stopping may end the run before.
    """

    steps: int
    batches: int
    accumulation: int
    training_s: float
    evaluations: int
    evaluation_windows: int
    evaluation_s: float
    windows: int | None
    may_stop: bool

    @property
    def total_s(self) -> float:
        """Training and evaluation."""
        return self.training_s + self.evaluation_s

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "total_s": self.total_s}


def run_time(run: RunConfig, found: Forecast, card: Card, data: DataGain | None = None) -> RunTime | None:
    """Time of a recipe's run by one process; None where the recipe names no steps and nobody has looked at its data.

    Args:
        run: the recipe.
        found: its forecast.
        card: where it runs.
        data: its windows, which then count with their own lengths.
    """
    training = run.training
    windows = None if data is None else data.training_windows
    counted = count_steps(run, windows)
    if counted is None:
        return None
    steps, batches = counted
    tokens, batch_s = found.setting.tokens, 0.0
    if data is None:
        batch_s = step_time(found.sizes, found.setting, card).total_s
    else:
        tokens, batch_s = round(data.mean_tokens), training.batch_size * data.mean_s
    evaluations = 0
    if run.data.validation_sources:
        both = 2 if found.setting.forward_ratio < 1 else 1  # densely, and with rows left out
        while_training = math.ceil(steps / training.eval_steps) if training.eval_steps else 0  # the last step counts
        evaluations = 2 * both + while_training
    one = run.data.validation_windows * forward_time(found.sizes, tokens, card)
    return RunTime(
        steps=steps,
        batches=batches,
        accumulation=training.gradient_accumulation_steps,
        training_s=batches * batch_s,
        evaluations=evaluations,
        evaluation_windows=run.data.validation_windows if evaluations else 0,
        evaluation_s=evaluations * one,
        windows=windows,
        may_stop=training.early_stopping_evals is not None,
    )


def count_steps(run: RunConfig, windows: int | None) -> tuple[int, int] | None:
    """Optimizer steps of a run and batches in them, as Trainer counts: an epoch's last step may have fewer batches.

    Args:
        run: the recipe.
        windows: of the training data; None for unknown.

    Returns:
        Both, or None where the number of windows would have to be known.
    """
    training = run.training
    together = training.gradient_accumulation_steps
    if windows is None:
        return None if training.max_steps < 0 else (training.max_steps, training.max_steps * together)
    per_epoch = math.ceil(windows / training.batch_size)
    steps_per_epoch = math.ceil(per_epoch / together)
    steps = training.max_steps if training.max_steps > 0 else math.ceil(training.epochs * steps_per_epoch)
    epochs, more = divmod(steps, steps_per_epoch)
    return steps, epochs * per_epoch + min(more * together, per_epoch)


def say_duration(seconds: float) -> str:
    """A time as people say it, in its two largest units: `about 3 h 20 min`."""
    if seconds < 1:
        return "less than a second"
    minute, hour, day = 60, 3600, 86400
    for unit, name, part, part_name in ((day, "d", hour, "h"), (hour, "h", minute, "min"), (minute, "min", 1, "s")):
        count, rest = divmod(round(seconds / part) * part, unit)
        if count:
            return f"about {count} {name}" + (f" {rest // part} {part_name}" if rest else "")
    return f"about {round(seconds)} s"
