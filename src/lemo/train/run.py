"""One training run from recipe to adapter."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lemo.config import RunConfig, resolved
from lemo.core.plan import Plan
from lemo.errors import ConfigError
from lemo.measure.memory import GIB
from lemo.measure.record import config_hash, device_name, versions
from lemo.runtime.attach import Handle, attach
from lemo.train.arguments import is_trained, stopping, training_arguments, try_arguments
from lemo.train.chat import dated
from lemo.train.checkpoint import FinishedRunError, Resume, RunFolder, SaveOnRequest, data_fingerprint
from lemo.train.checks import check_dropout, check_run, check_training
from lemo.train.data import DataReport, WindowDataset, load_windows
from lemo.train.distributed import Processes
from lemo.train.files import locked, replace_text, share_files
from lemo.train.guards import check_weights
from lemo.train.lora import add_adapter, check_targets, save_adapter, trainable_parameters
from lemo.train.model import load_model, load_tokenizer, resolve_path
from lemo.train.planning import (
    describe_plan,
    describe_rows,
    make_plan,
    skeleton_plan,
    training_collator,
    validation_batches,
)
from lemo.train.refit import refitting
from lemo.train.sources import list_sources, needs_tokenizer
from lemo.train.start_adapter import KEYS, describe_start, settle
from lemo.train.trainer import LemoTrainer

# evaluate(model, batches, *, handle, sparse) -> an object with `nats` and `to_dict()`; `lemo.eval.perplexity` has one.
Evaluate = Callable[..., Any]


@dataclass(frozen=True)
class RunResult:
    """What a run came to. Losses are in nats per token; memory in bytes; None where there is no validation data.

    Attributes:
        output: folder with adapter, plan, recipe and metrics.
        steps: optimizer steps done.
        interrupted: stopped on request; the last checkpoint can be taken up.
        losses: by name. `dense before` and `dense after` count every token. For plans that skip rows in forward also
            `sparse, loss rows` (look-ahead) and, to compare it with, `dense, loss rows`, before and after: rows that
            carry loss are never skipped, so a sparse forward needs labels drawn as in training.
        tokens_per_s: of training, evaluation left out.
        peak_memory_bytes: most memory of a process during training.
        ratios: per layer, (forward, backward) share of rows in the last step.
        dense_batches: training batches that ran densely.
        seconds: of training.
        notes: what lemo did unasked.
        evaluations: the whole report behind each of `losses`: by position, by sequence.
    """

    output: Path
    steps: int
    interrupted: bool
    losses: dict[str, float]
    tokens_per_s: float
    peak_memory_bytes: int
    ratios: dict[int, tuple[float, float]]
    dense_batches: int
    seconds: float
    notes: list[str] = field(default_factory=list)
    evaluations: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**dataclasses.asdict(self), "output": str(self.output)}


def train(
    run: RunConfig, evaluate: Evaluate, *, resume: Resume = False, recipe: str | None = None, console: Any = None
) -> RunResult:
    """Runs a recipe: data, model, plan, adapter, training, evaluation before and after, and everything saved.

    Args:
        run: the recipe.
        evaluate: measures loss, `lemo.eval.perplexity.evaluate_loss`.
        resume: take up the last checkpoint in the output folder; "if possible" begins anew where there is none.
        recipe: the resolved recipe as YAML, stored beside the output; written as JSON (which is YAML) when None.
        console: rich Console; None for standard error.

    Raises:
        FinishedRunError: nothing of the run is left to do.
        LemoError: whatever makes the run impossible; nothing in the output folder is lost or overwritten.
    """
    check_run(run)
    check_training(run)
    processes = Processes.start()
    with processes.together():
        folder = processes.from_main(lambda: _open_folder(run, resume, processes.count))
        if folder is not None and folder.resume_from is None:
            settle(run.lora, KEYS)  # what the recipe goes on from may have changed since it was read
        if not run.data.train:
            raise ConfigError("data.train is empty: name at least one file or folder")
        # A missing file is found before minutes go into loading.
        for paths in (run.data.train, run.data.validation_sources):
            if paths:
                list_sources(paths)
    if folder is None:
        processes.close()
        raise FinishedRunError(f"output: the run in {run.output} is finished")
    console = (console or _console()) if processes.is_main else _console(quiet=True)
    session = _Session(run, folder, evaluate, console, processes)
    result = session.run_all(recipe or json.dumps(resolved(run), indent=1) + "\n")
    processes.close()
    return result


def _open_folder(run: RunConfig, resume: Resume, processes: int) -> RunFolder | None:
    """The output folder; None where its run is finished, which is no error for a job that was queued once more."""
    if run.output and Path(run.output).is_dir():
        with locked(Path(run.output)):
            pass
    try:
        return RunFolder.open(run, resume=resume, processes=processes)
    except FinishedRunError:
        if resume != "if possible":
            raise
        return None


class _Session:
    """The parts of one run, made in order."""

    def __init__(
        self, run: RunConfig, folder: RunFolder, evaluate: Evaluate, console: Any, processes: Processes
    ) -> None:
        self.run, self.folder, self.evaluate, self.console = run, folder, evaluate, console
        self.processes = processes
        self.saver = SaveOnRequest(folder.path)
        self.saver.agree = processes.any
        self.saver.announce = lambda text: console.print(text, style="bold")
        self.losses: dict[str, float] = {}
        self.reports: dict[str, Any] = {}

    def run_all(self, recipe: str) -> RunResult:
        """Everything from loading to saving. The adapter is saved before anything else can fail."""
        for note in self.folder.notes:
            self._say(note)
        with ExitStack() as stack:
            with self.processes.together():
                model, handle, trainer = self._prepare(recipe, stack)
            # An error of one process ends the others here too: their collectives fail, or their launcher stops them.
            with self.saver.signals():
                steps = self._train(trainer)
                saved = not self.saver.interrupted
                with self.processes.together():
                    if saved and self.processes.is_main:
                        self._save(model)
            try:
                with self.processes.together():
                    if saved:
                        self._measure("after", model, handle)
                    result = self._result(trainer, handle, steps)
            except BaseException:
                if saved:
                    self._say(
                        f"the adapter is saved in {self.folder.adapter}, but the final evaluation failed; measure it "
                        f"with lemo eval {self.folder.path}"
                    )
                raise
        with self.processes.together():
            if self.processes.is_main and saved:
                self._write_summary(result)
        return result

    def _train(self, trainer: LemoTrainer) -> int:
        """Trains to the end, or until asked to stop; the steps done so far."""
        checkpoint = self.folder.resume_from
        if checkpoint is not None and is_trained(self.run, checkpoint):
            self._say(f"{checkpoint.name} is the end of training; nothing is left but to save the adapter")
            return trainer.take_up(checkpoint)
        if checkpoint is not None:
            self._say(f"training goes on from {checkpoint.name}")
        steps = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).global_step
        for line in [] if self.saver.interrupted else trainer.end():
            self._say(line)
        return steps

    def _save(self, model: Any) -> None:
        """Saves the adapter, the whole of it or nothing."""
        check_weights(model, "the adapter")
        beside = self.folder.adapter.with_name("adapter.new")
        save_adapter(model, beside, resolve_path(self.run.model.path))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(beside)
        share_files(beside)
        if self.folder.adapter.exists():
            shutil.rmtree(self.folder.adapter)
        beside.replace(self.folder.adapter)

    def _prepare(self, recipe: str, stack: ExitStack) -> tuple[Any, Handle, LemoTrainer]:
        """Everything before the first step."""
        from transformers import set_seed

        run = self.run
        stack.enter_context(dated(self.processes.from_main(self.folder.date)))
        # Whatever can be wrong is found before calibration takes minutes and before anything is written.
        self.arguments = training_arguments(run, self.folder.checkpoints, self.processes)
        try_arguments(self.arguments, run)
        if 0 < run.training.max_steps <= run.training.warmup_steps:
            self._say(
                f"training.warmup_steps ({run.training.warmup_steps}) is not below training.max_steps "
                f"({run.training.max_steps}): the learning rate never reaches training.learning_rate"
            )
        set_seed(run.training.seed)
        self.tokenizer = (
            load_tokenizer(run.model) if needs_tokenizer([*run.data.train, *run.data.validation_sources]) else None
        )
        model = load_model(run.model, window_tokens=run.data.window_tokens, device=self.processes.device)
        if self.folder.resume_from is None:
            check_targets(model, run.lora)
        if run.sparsity.enabled and run.sparsity.plan is None:
            skeleton_plan(model, run)
        vocabulary = model.config.get_text_config().vocab_size
        self.dataset, report = load_windows(run.data, self.tokenizer, "train", vocabulary=vocabulary)
        self._say_data("training data", report)
        self.validation: WindowDataset | None = None
        if run.data.validation_sources:
            self.validation, report = load_windows(run.data, self.tokenizer, "validation", vocabulary=vocabulary)
            self._say_data("validation data", report)
        for note in self.processes.from_main(lambda: self._begin(recipe, stack)):
            self._say(note)
        goes_on = run.lora.adapter is not None  # a plan is fitted to the model that training begins with
        model = self._adapted(model) if goes_on else model
        plan = self._plan(model)
        model = model if goes_on else self._adapted(model)
        names = ("loss", "segment_rows", "engine", "recompute", "offload")
        options = {name: getattr(run.training, name) for name in names}
        handle = stack.enter_context(attach(model, plan, **options))
        check_dropout(run, model, handle)
        self.saver.handle = handle
        trainer = self._trainer(model, handle)
        self._before(model, handle)
        return model, handle, trainer

    def _adapted(self, model: Any) -> Any:
        """The model with its adapter: a new one, the one to go on from, or after a stop that of the checkpoint."""
        lora, checkpoint = self.run.lora, self.folder.resume_from
        model = add_adapter(model, lora, checkpoint)
        begins = f", going on from {checkpoint or lora.adapter}" if lora.adapter is not None else ""
        self._say(f"adapter: {trainable_parameters(model):,} trainable parameters{begins}")
        for line in [] if checkpoint else describe_start(lora, self.run.model, resolve_path(self.run.model.path)):
            self._say(f"  {line}")
        return model

    def _begin(self, recipe: str, stack: ExitStack) -> list[str]:
        """Marks the folder as this run's and locks it; what was found amiss there."""
        self.folder.path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(self.folder.path))
        splits = {"training": self.dataset, "validation": self.validation}
        data = {name: data_fingerprint(found.windows) for name, found in splits.items() if found is not None}
        return self.folder.begin(recipe, self.processes.count, data)

    def _say(self, text: str) -> None:
        """Prints lines, however long."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _plan(self, model: Any) -> Plan:
        """The plan, stored in the output folder; a resumed run takes the stored one."""
        made: list[Plan] = []

        def make() -> None:
            made.append(make_plan(model, self.run, self.tokenizer, self.folder.path / "calibration"))
            made[0].save(self.folder.plan)

        if not self.processes.from_main((self.folder.plan / "plan.json").exists):
            self.processes.from_main(make)
        # Only the first process calibrates; the others read what it saved.
        plan = made[0] if made else Plan.load(self.folder.plan)
        for line in describe_plan(plan, self.run.data.window_tokens):
            self._say(line)
        dense = all(layer.is_dense for layer in plan.layers)
        rows = self.run.loss_rows
        draws = rows.share < 1 or rows.prompt_share > 0
        if not dense and plan.block_size != self.run.sparsity.block_size and draws:
            raise ConfigError(
                f"sparsity.block_size is {self.run.sparsity.block_size}, but the plan has blocks of {plan.block_size}; "
                "loss rows would straddle blocks. Set sparsity.block_size to the plan's"
            )
        return plan

    def _trainer(self, model: Any, handle: Handle) -> LemoTrainer:
        """The Trainer of this run."""
        return LemoTrainer(
            model=model,
            args=self.arguments,
            train_dataset=self.dataset,
            eval_dataset=self.validation,
            data_collator=training_collator(self.run, self.tokenizer, model, handle.plan),
            callbacks=[
                self.saver,
                *stopping(self.run, self.folder.resume_from),
                *refitting(self.run, self.tokenizer, model, handle, self.folder.plan),
            ],
            handle=handle,
            metrics_path=self.folder.metrics,
            console=self.console,
            master_weights=True,
        )

    def _before(self, model: Any, handle: Handle) -> None:
        """Losses before training; a run that was begun before reads those of its first start."""
        stored = self.folder.path / "before.json"
        # An adapter may have been overwritten since, as long as no checkpoint holds it.
        same = self.run.lora.adapter is None or self.folder.resume_from is not None
        if same and self.processes.from_main(stored.exists):
            self.reports = json.loads(stored.read_text(encoding="utf-8"))
            self.losses = {name: report["nats"] for name, report in self.reports.items()}
            return
        self._measure("before", model, handle)
        if self.processes.is_main:
            replace_text(stored, json.dumps(self.reports, indent=1) + "\n")

    def _measure(self, when: str, model: Any, handle: Handle) -> None:
        """Validation losses, dense and, where rows skip layers in forward, sparse."""
        if self.validation is None:
            return
        everything = validation_batches(self.run, self.tokenizer, self.validation)
        options: dict[str, Any] = {"handle": handle}
        if self.processes.count > 1:
            options["combine"] = self.processes.combine
        everything = self.processes.share(everything)
        if all(layer.forward_ratio == 1 for layer in handle.plan.layers):
            self._note(f"dense {when}", "dense", self.evaluate(model, everything, **options))
            return
        drawn = validation_batches(self.run, self.tokenizer, self.validation, loss_rows=True, model=model)
        drawn = self.processes.share(drawn)
        dense = self.evaluate(model, everything, subset=drawn, **options)  # one forward for both
        self._note(f"dense {when}", "dense", dense)
        self._note(f"dense, loss rows {when}", "dense, loss rows", dense.subset)
        found = self.evaluate(model, drawn, sparse=True, **options)
        self._note(f"sparse, loss rows {when}", "sparse (look-ahead), loss rows", found)

    def _note(self, name: str, label: str, report: Any) -> None:
        """Keeps a report and says its loss."""
        self.reports[name], self.losses[name] = report.to_dict(), report.nats
        self._say(f"validation loss {name.split()[-1]} training, {label}: {report.nats:.4f}")

    def _result(self, trainer: LemoTrainer, handle: Handle, steps: int) -> RunResult:
        log = trainer.log_callback
        notes = [*handle.notes, *trainer.guard.notes()]
        parts = self.processes.gather((log.peak.peak_bytes, handle.dense_batches, notes))
        return RunResult(
            output=self.folder.path,
            steps=steps,
            interrupted=self.saver.interrupted,
            losses=dict(self.losses),
            tokens_per_s=log.tokens * trainer.args.world_size / log.seconds if log.seconds else 0.0,
            peak_memory_bytes=max(peak for peak, _, _ in parts),
            ratios=handle.ratios(),
            dense_batches=sum(dense for _, dense, _ in parts),
            seconds=log.seconds,
            notes=list(dict.fromkeys(note for _, _, notes in parts for note in notes)),
            evaluations=dict(self.reports),
        )

    def _write_summary(self, result: RunResult) -> None:
        content = {
            **result.to_dict(),
            "config_hash": self.folder.identity,
            "setting_hash": config_hash(resolved(self.run)),
            "device": device_name(),
            "processes": self.processes.count,
            "versions": versions(),
            "time": time.strftime("%FT%TZ", time.gmtime()),
        }
        replace_text(self.folder.summary, json.dumps(content, indent=1) + "\n")
        self._say(
            f"{result.steps} steps, {result.tokens_per_s:,.0f} tokens/s, "
            f"peak {result.peak_memory_bytes / GIB:.2f} GiB; adapter in {self.folder.adapter}",
        )

    def _say_data(self, title: str, report: DataReport) -> None:
        lines = report.lines()
        if title == "training data":
            lines.extend(describe_rows(self.run))
        self._say(f"{title}: " + "\n  ".join(lines))


def _console(*, quiet: bool = False) -> Any:
    from rich.console import Console

    return Console(quiet=True) if quiet else Console(stderr=True)
