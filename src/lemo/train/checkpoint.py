"""The output folder of a run: whose it is, what is in it, and how a run is saved, stopped and taken up again."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import lemo
from lemo.config import RunConfig, resolved
from lemo.errors import ConfigError
from lemo.measure.record import config_hash
from lemo.train.callback import STATE_FILE

RUN_FILE, SAVE_FILE = "run.json", "save-now"

# Keys that do not change what is trained.
_FREE = ("logging_steps", "eval_steps", "save_steps", "report_to")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run. Nothing is written before `begin`.

    Attributes:
        path: the output folder.
        identity: hash of everything that changes what is trained.
        resume_from: checkpoint to take up, or None.
    """

    path: Path
    identity: str
    resume_from: Path | None = None

    @classmethod
    def open(cls, run: RunConfig, *, resume: bool = False, processes: int = 1) -> RunFolder:
        """Decides whether a run may use its output folder, without writing anything.

        Args:
            run: the recipe.
            resume: take up the last checkpoint.
            processes: how many train; a checkpoint's place in the data holds for as many as wrote it.

        Raises:
            ConfigError: no output is named; the folder holds another run, a finished run, or files of something else;
                a checkpoint is there and `resume` was not asked for; `resume` without a checkpoint.
        """
        if not run.output:
            raise ConfigError("output is empty: name the folder that receives the run")
        folder = cls(Path(run.output), run_identity(run))
        if folder.path.exists() and not folder.path.is_dir():
            raise ConfigError(f"output: {folder.path} is a file")
        present = sorted(p.name for p in folder.path.iterdir()) if folder.path.is_dir() else []
        if not present:
            if resume:
                raise ConfigError(f"output: {folder.path} holds no run to resume")
            return folder
        if RUN_FILE not in present:
            raise ConfigError(f"output: {folder.path} holds files that are no run ({present[0]}, ...); name another")
        if set(present) <= {RUN_FILE, "recipe.yaml"} and not resume:
            return folder  # a run that was refused before it did anything
        folder._check_identity()
        if folder.summary.exists():
            raise ConfigError(f"output: the run in {folder.path} is finished; name another folder to run again")
        checkpoint = folder.last_checkpoint()
        if checkpoint is not None and not resume:
            raise ConfigError(f"output: {folder.path} holds {checkpoint.name} of this run; take it up with --resume")
        if checkpoint is None and resume:
            raise ConfigError(f"output: {folder.path} holds no complete checkpoint to resume")
        if resume and folder._started()["processes"] != processes:
            raise ConfigError(
                f"output: the run in {folder.path} has {folder._started()['processes']} processes, not {processes}; "
                "resume with as many"
            )
        return cls(folder.path, folder.identity, checkpoint)

    def _started(self) -> dict[str, Any]:
        """What the run noted when it began."""
        try:
            stored = json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))
            return {"processes": 1, "config_hash": stored["config_hash"], **stored}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"output: {self.path / RUN_FILE} cannot be read") from error

    def _check_identity(self) -> None:
        if self._started()["config_hash"] != self.identity:
            raise ConfigError(
                f"output: {self.path} belongs to another run (its recipe differs from this one); name another folder"
            )

    def begin(self, recipe: str, processes: int = 1) -> None:
        """Marks the folder as this run's and stores the resolved recipe."""
        self.path.mkdir(parents=True, exist_ok=True)
        described = {
            "config_hash": self.identity,
            "processes": processes,
            "lemo": lemo.__version__,
            "time": time.strftime("%FT%TZ", time.gmtime()),
        }
        if self.resume_from is None:
            (self.path / RUN_FILE).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        (self.path / "recipe.yaml").write_text(recipe, encoding="utf-8")
        self._set_aside_metrics()

    def _set_aside_metrics(self) -> None:
        """Log entries of steps that will be done again go to metrics.aborted.jsonl."""
        if not self.metrics.exists():
            return
        done = 0 if self.resume_from is None else int(self.resume_from.name.rpartition("-")[2])
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        again = [line for line in lines if json.loads(line)["step"] > done]
        if again:
            with (self.path / "metrics.aborted.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(again)
            self.metrics.write_text("".join(line for line in lines if line not in again), encoding="utf-8")

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        found = []
        for path in self.checkpoints.glob("checkpoint-*"):
            number = re.fullmatch(r"checkpoint-(\d+)", path.name)
            # Trainer writes its state last, and lemo its own after that.
            if number and (path / "trainer_state.json").exists() and (path / STATE_FILE).exists():
                found.append((int(number[1]), path))
        return max(found)[1] if found else None

    @property
    def checkpoints(self) -> Path:
        """Folder of the Trainer's checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """Folder of the trained adapter, in PEFT's format."""
        return self.path / "adapter"

    @property
    def plan(self) -> Path:
        """Folder of the plan in force."""
        return self.path / "plan"

    @property
    def metrics(self) -> Path:
        """JSON lines of the log."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """The result; its presence says that the run is finished."""
        return self.path / "summary.json"


def run_identity(run: RunConfig) -> str:
    """Hash of everything that changes what is trained: not the output folder, logging or saving."""
    values = resolved(run)
    del values["output"]
    for key in _FREE:
        del values["training"][key]
    return config_hash(values)


class SaveOnRequest(TrainerCallback):
    """Full checkpoints on request: touch `save-now` in the output folder to save, press Ctrl-C to save and stop.

    A checkpoint has adapter, optimizer, schedule, random state and position in the data.

    Attributes:
        interrupted: whether training stopped because it was asked to.
    """

    def __init__(self, folder: str | Path) -> None:
        """Watches for `save-now` in `folder`."""
        self.request = Path(folder) / SAVE_FILE
        self.interrupted = False
        self.announce: Any = print
        # Several processes must save and stop at the same step: each flag counts when any of them has it.
        self.agree: Callable[..., tuple[bool, ...]] = lambda *flags: flags

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks the Trainer to save, and to stop, after this step."""
        requested, self.interrupted = self.agree(self.request.exists(), self.interrupted)
        if requested:
            control.should_save = True
            self.request.unlink(missing_ok=True)
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Inside, the first SIGINT or SIGTERM saves and stops after the step; the second aborts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        caught = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in caught}

        def handle(number: int, frame: Any) -> None:
            self.interrupted = True
            for each in caught:
                signal.signal(each, signal.default_int_handler)
            self.announce("stopping after this step with a full checkpoint; once more aborts at once")

        try:
            for number in caught:
                signal.signal(number, handle)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
