"""The output folder of a run: whose it is, what is in it, and how a run is saved, stopped and taken up again."""

from __future__ import annotations

import datetime
import hashlib
import json
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import TrainerCallback

import lemo
from lemo.config import RunConfig
from lemo.errors import ConfigError
from lemo.measure.record import config_hash
from lemo.train.callback import COUNTS, state_file
from lemo.train.chat import chat_date
from lemo.train.files import LOCK_FILE, faults, replace_text
from lemo.train.identity import run_settings, why_another

RUN_FILE, SAVE_FILE = "run.json", "save-now"
ONCE_S = 1.0
Resume = bool | Literal["if possible"]


class FinishedRunError(ConfigError):
    """The output folder holds this very run, and nothing of it is left to do."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run. Nothing is written before `begin`.

    Attributes:
        path: the output folder.
        identity: hash of everything that changes what is trained.
        settings: all of that, nested.
        resume_from: checkpoint to take up, or None.
        notes: what the user should know about checkpoints that cannot be taken up.
    """

    path: Path
    identity: str
    settings: Mapping[str, Any]
    resume_from: Path | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, run: RunConfig, *, resume: Resume = False, processes: int = 1) -> RunFolder:
        """Decides whether a run may use its output folder, without writing anything.

        Args:
            run: the recipe.
            resume: take up the last checkpoint; "if possible" begins anew where there is none.
            processes: how many train; a checkpoint's place in the data holds for as many as wrote it.

        Raises:
            FinishedRunError: the run is finished.
            ConfigError: no output is named; the folder holds another run, or files of something else;
                a checkpoint is there and `resume` was not asked for; `resume` without a checkpoint; an adapter without
                a checkpoint.
        """
        if not run.output:
            raise ConfigError("output is empty: name the folder that receives the run")
        settings = run_settings(run)
        folder = cls(Path(run.output), config_hash(settings), settings)
        if folder.path.exists() and not folder.path.is_dir():
            raise ConfigError(f"output: {folder.path} is a file")
        found = [p.name for p in folder.path.iterdir()] if folder.path.is_dir() else []
        present = sorted(name for name in found if name not in (f"{RUN_FILE}.new", LOCK_FILE))
        if not present:
            if resume is True:
                raise ConfigError(f"output: {folder.path} holds no run to resume")
            return folder
        if RUN_FILE not in present and {"calibration.json", "plan"} <= set(present):
            plan = folder.path / "plan"
            raise ConfigError(
                f"output: {folder.path} holds a calibration; name another folder, and sparsity.plan={plan} to train "
                "under its plan"
            )
        if RUN_FILE not in present:
            raise ConfigError(f"output: {folder.path} holds files that are no run ({present[0]}, ...); name another")
        if set(present) <= {RUN_FILE, "recipe.yaml"} and resume is not True:
            return folder  # a run that was refused before it did anything
        folder._check_identity()
        if folder.summary.exists():
            raise FinishedRunError(f"output: the run in {folder.path} is finished; name another folder to run again")
        count = folder._started()["processes"]
        checkpoint, notes = folder.last_checkpoint(count), folder._incomplete(count)
        if checkpoint is not None and not resume:
            raise ConfigError(f"output: {folder.path} holds {checkpoint.name} of this run; take it up with --resume")
        if resume and folder._steps() and count != processes:
            raise ConfigError(
                f"output: the run in {folder.path} has {count} processes, not {processes}; resume with as many"
            )
        if checkpoint is None and resume is True:
            raise ConfigError("; ".join([f"output: {folder.path} holds no complete checkpoint to resume", *notes]))
        if checkpoint is None and folder.adapter.exists():
            raise ConfigError(
                f"output: {folder.path} holds the adapter of this run, whose final evaluation did not end: measure it "
                f"with lemo eval {folder.path}, or name another folder to train again"
            )
        return cls(folder.path, folder.identity, settings, checkpoint, notes)

    def _started(self) -> dict[str, Any]:
        """What the run noted when it began."""
        try:
            stored = json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))
            return {"processes": 1, "config_hash": stored["config_hash"], **stored}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"output: {self.path / RUN_FILE} cannot be read") from error

    def date(self) -> datetime.date:
        """The day that the run began, which chat templates may write into samples; today for one that begins."""
        if not (self.path / RUN_FILE).exists():
            return chat_date()
        return datetime.date.fromisoformat(self._started().get("date", chat_date().isoformat()))

    def _check_identity(self) -> None:
        started = self._started()
        if started["config_hash"] == self.identity:
            return
        differ = why_another(started.get("settings"), self.settings)
        if differ is not None:
            raise ConfigError(f"output: {self.path} belongs to another run{differ}; name another folder")

    def begin(self, recipe: str, processes: int = 1, data: Mapping[str, Any] | None = None) -> list[str]:
        """Marks the folder as this run's and stores the resolved recipe.

        Args:
            recipe: the resolved recipe.
            processes: how many train.
            data: `data_fingerprint` of each split, which must be that of the run's first start.

        Returns:
            What was found amiss and mended.

        Raises:
            ConfigError: other data than at the first start, or a log that cannot be read.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._check_data(data)
        described = {
            "config_hash": self.identity,
            "processes": processes,
            "lemo": lemo.__version__,
            "time": time.strftime("%FT%TZ", time.gmtime()),
            "date": chat_date().isoformat(),
            "data": data,
            "settings": self.settings,
        }
        notes = self._set_aside_metrics()
        if self.resume_from is None:
            replace_text(self.path / RUN_FILE, json.dumps(described, indent=1) + "\n")
        replace_text(self.path / "recipe.yaml", recipe)
        return notes

    def _check_data(self, data: Mapping[str, Any] | None) -> None:
        """Refuses to go on with what was calibrated, evaluated or trained on other data."""
        used = ("before.json", "plan", "checkpoints")
        if data is None or not any((self.path / name).exists() for name in used):
            return
        stored = self._started().get("data")
        if stored is not None and stored != data:
            changes = [
                f"{split} data had {describe_fingerprint(stored.get(split))} and has "
                f"{describe_fingerprint(data.get(split))}"
                for split in dict.fromkeys([*stored, *data])
                if stored.get(split) != data.get(split)
            ]
            raise ConfigError(
                f"output: the data of the run in {self.path} has changed since it began: {'; '.join(changes)}. Bring "
                "the files back as they were, or name another folder"
            )

    def _set_aside_metrics(self) -> list[str]:
        """Log entries of steps that will be done again go to metrics.aborted.jsonl."""
        if not self.metrics.exists():
            return []
        done = 0 if self.resume_from is None else int(self.resume_from.name.rpartition("-")[2])
        lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept, again, notes = [], [], []
        for row, line in enumerate(lines, start=1):
            try:
                (again if json.loads(line)["step"] > done else kept).append(line.rstrip("\n") + "\n")
            except (ValueError, KeyError, TypeError) as error:
                if row < len(lines) or not isinstance(error, ValueError):
                    raise ConfigError(f"{self.metrics}, row {row}: no log entry; repair or remove that line") from error
                notes.append(f"{self.metrics}: the last line was cut off in writing, and is dropped")
        if again:
            with (self.path / "metrics.aborted.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(again)
        if again or notes:
            replace_text(self.metrics, "".join(kept))
        return notes

    def last_checkpoint(self, processes: int = 1) -> Path | None:
        """The newest checkpoint that every process wrote to its end."""
        found = [(step, path) for step, path in self._steps() if not _missing(path, processes)]
        return max(found)[1] if found else None

    def _steps(self) -> list[tuple[int, Path]]:
        """Folders of checkpoints by step, complete or not."""
        paths = self.checkpoints.glob("checkpoint-*")
        return [(int(found[1]), path) for path in paths if (found := re.fullmatch(r"checkpoint-(\d+)", path.name))]

    def _incomplete(self, processes: int) -> tuple[str, ...]:
        """What to say of checkpoints that are passed over."""
        return tuple(
            f"{path.name} is incomplete and passed over: it has no {', '.join(missing)}"
            for _, path in sorted(self._steps())
            if (missing := _missing(path, processes))
        )

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


def data_fingerprint(windows: Sequence[Any]) -> dict[str, Any]:
    """Number of windows and tokens, and a hash of ids, tokens and what is learned of them."""
    digest = hashlib.blake2b(digest_size=16)
    for window in windows:
        digest.update(f"{window.sample_id}|{len(window.tokens_T)}|{window.lengths}|".encode())
        digest.update(np.ascontiguousarray(window.tokens_T, dtype="<u4").data)
        if window.learned_T is not None:
            digest.update(np.packbits(window.learned_T).data)
    tokens = sum(len(window.tokens_T) for window in windows)
    return {"windows": len(windows), "tokens": tokens, "hash": digest.hexdigest()}


def _missing(checkpoint: Path, processes: int) -> list[str]:
    """What a checkpoint lacks. Trainer writes its state last, and lemo its own after that."""
    return faults(checkpoint, [state_file(rank) for rank in range(processes)], processes)


def describe_fingerprint(split: Mapping[str, Any] | None) -> str:
    """A `data_fingerprint` in words; None for a split without data."""
    if split is None:
        return "nothing"
    return f"{split['windows']:,} windows of {split['tokens']:,} tokens (hash {split['hash'][:8]})"


class SaveOnRequest(TrainerCallback):
    """Full checkpoints on request: touch `save-now` in the output folder to save, press Ctrl-C to save and stop.

    A checkpoint has adapter, optimizer, schedule, random state and position in the data.

    Attributes:
        asked: whether training was asked to stop, in this process.
        interrupted: whether training stopped for it before its last step.
    """

    def __init__(self, folder: str | Path) -> None:
        """Watches for `save-now` in `folder`."""
        self.request = Path(folder) / SAVE_FILE
        self.asked = self.interrupted = False
        self.announce: Any = print
        # Several processes must save and stop at the same step: each flag counts when any of them has it.
        self.agree: Callable[..., tuple[bool, ...]] = lambda *flags: flags
        # Counts that a checkpoint keeps; they go back to the step's beginning with the random state.
        self.handle: Any = None
        self._asked_s = 0.0
        self._begun: tuple[Any, ...] = ()
        self._before_epoch: tuple[Any, ...] | None = None
        self._epochs = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes how often to log, evaluate and save from the recipe as it is now, not from the checkpoint."""
        state.compute_steps(args, state.max_steps)
        self._epochs = 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remembers what the epoch's data draws from: a resumed run that begins with the epoch draws it again."""
        self._epochs += 1
        if args.gradient_accumulation_steps > 1 and self._epochs > 1:
            self._before_epoch = self._draws()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remembers what batches of a step change before its end, in case it has to be given up."""
        if args.gradient_accumulation_steps > 1:
            self._begun, self._before_epoch = self._before_epoch or self._draws(), None

    def _draws(self) -> tuple[Any, ...]:
        """Where random numbers and the handle's counts stand."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        counts = {} if self.handle is None else {name: getattr(self.handle, name) for name in COUNTS}
        return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda, counts

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gives up a step of several batches when asked to stop: the checkpoint is that of the step before."""
        (asked,) = self.agree(self.asked)
        if not asked or state.global_step == 0:
            return  # before the first step there is nothing to save: it is done first
        python, numpy, cpu, cuda, counts = self._begun
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        for name, value in counts.items():
            setattr(self.handle, name, value)
        self.interrupted = control.should_training_stop = True
        # Where it is there already, it stays as it is: a launcher may not wait for another.
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (control.should_save,) = self.agree(bool(_missing(folder, args.world_size)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks the Trainer to save, and to stop, after this step."""
        requested, asked = self.agree(self.request.exists(), self.asked)
        if requested:
            control.should_save = True
            self.request.unlink(missing_ok=True)
        if asked and state.global_step < state.max_steps:
            self.interrupted = control.should_save = control.should_training_stop = True

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Inside, the first SIGINT or SIGTERM saves and stops after the batch at hand; a later SIGINT aborts at once.

        A SIGTERM never aborts, and a SIGINT not within a second of the first signal: launchers pass on what a whole
        process group has got already.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        caught = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in caught}

        def handle(number: int, frame: Any) -> None:
            if not self.asked:
                self.asked, self._asked_s = True, time.monotonic()
                self.announce("stopping after this batch with a full checkpoint; Ctrl-C again aborts")
            elif number == signal.SIGINT and time.monotonic() - self._asked_s >= ONCE_S:
                signal.default_int_handler(number, frame)

        try:
            for number in caught:
                signal.signal(number, handle)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
