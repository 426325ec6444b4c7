"""LemoCallback: what a training run says while it runs. Works with plain Trainer, LemoTrainer and TRL alike."""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from lemo.errors import ConfigError
from lemo.measure.memory import GIB, Peak, resident_bytes, track_peak
from lemo.runtime.attach import Handle
from lemo.train.files import replace_text, share_files
from lemo.train.lora import write_context
from lemo.train.prompt_rows import PromptRows
from lemo.train.row_draw import RowDraw

STATE_FILE = "lemo.json"
COUNTS = ("sparse_batches", "dense_batches")


class LemoCallback(TrainerCallback):
    """Logs tokens per second, memory and row ratios; keeps `LossRows` or `PromptRows` at the right epoch.

    Each of the Trainer's log entries becomes one line on the terminal and, with `metrics_path`, one JSON line. On a
    terminal a live line beneath says where training stands between entries. Tokens are those of the batches as the
    model gets them, padding included, of all processes; time is that of training, evaluation left out.

    With `loss_rows`, labels change while training only: evaluation sees the samples' own. A plain Trainer evaluates
    with the training collator, so this callback opens it when the Trainer is about to evaluate and closes it
    afterwards. Several evaluation sets at once need `LemoTrainer`, which does it around `evaluate` itself.

    Attributes:
        peak: peak memory of the training so far.
        tokens: tokens trained on since training began or resumed.
        seconds: time of it, evaluation left out.
    """

    def __init__(
        self,
        handle: Handle | None = None,
        *,
        loss_rows: RowDraw | None = None,
        metrics_path: str | Path | None = None,
        console: Any = None,
        opens_evaluation: bool = True,
    ) -> None:
        """Makes a callback for one Trainer.

        Args:
            handle: the attached plan; None logs a dense run.
            loss_rows: the training collator, when it is one.
            metrics_path: file that gets a JSON line per log entry; lines are appended.
            console: rich Console for the lines; None for standard error.
            opens_evaluation: switch `loss_rows` off around evaluation.
        """
        self.handle = handle
        self.loss_rows = loss_rows
        self.metrics_path = None if metrics_path is None else Path(metrics_path)
        self.console = console
        self.opens_evaluation = opens_evaluation and loss_rows is not None
        self.peak = Peak()
        self.tokens = 0
        self.seconds = 0.0
        self._stack = ExitStack()
        self._started = self._marked = 0.0
        self._marked_tokens = 0
        self._evaluated_step = -1
        self._epoch, self._restored = 0, False
        self._device: torch.device | None = None
        self._status: Any = None
        self._logged: dict[str, Any] = {}
        self._unwritten = False

    # What the Trainer calls, in the order in which it does.

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluation before any training sees all labels."""
        self._open_labels(True)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Starts clock, token count and memory tracking; takes up what a checkpoint has of the draws."""
        # The Trainer may evaluate before the first step; `on_evaluate` masks labels again.
        self._open_labels(bool(getattr(args, "eval_on_start", False)))
        self._epoch = math.floor((state.epoch or 0) + 1e-6)
        if state.global_step and not self._restored:
            named = args.resume_from_checkpoint
            own = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.restore(named if isinstance(named, str) else own, args.process_index)
        if self.opens_evaluation and isinstance(self.loss_rows, PromptRows):
            self._warn_of_parts(args)
        self._device = next(model.parameters()).device
        self._stack = ExitStack()
        self.peak = self._stack.enter_context(track_peak(self._device))
        hook = model.register_forward_pre_hook(self._count, with_kwargs=True)
        self._stack.callback(hook.remove)
        self.tokens = self._marked_tokens = 0
        self._started = self._marked = time.perf_counter()
        if state.is_world_process_zero and self._terminal().is_terminal:
            self._status = self._stack.enter_context(self._terminal().status("training starts"))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Loss rows are drawn anew in each epoch. They are counted here: of data without a length nobody knows them."""
        if self.loss_rows is not None:
            self.loss_rows.set_epoch(self._epoch)
        self._epoch += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Updates the live line."""
        self.seconds = time.perf_counter() - self._started
        steps = self._steps(state)
        if self._status is not None:
            speed = self.tokens * args.world_size / max(self.seconds, 1e-9)
            left = (state.max_steps - state.global_step) * self.seconds / max(1, steps)
            now = {**self._logged, **self._memory(), "step": state.global_step, "tokens_per_s": speed}
            self._status.update(f"{_line(now, state.max_steps)}  {_clock(left)} left")
        if control.should_evaluate:
            self._open_labels(True)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer may evaluate now."""
        if control.should_evaluate:
            self._open_labels(True)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict | None = None, **kwargs: Any) -> None:
        """Back to training.

        Raises:
            ConfigError: a second evaluation set followed, whose labels were masked.
        """
        if not self._status_of_training():
            return
        # The clock stands still while the Trainer evaluates.
        paused = sum(value for key, value in (metrics or {}).items() if key.endswith("_runtime"))
        self._started += paused
        self._marked += paused
        if not self.opens_evaluation:
            return
        if self._evaluated_step == state.global_step:
            raise ConfigError(
                "LemoCallback(loss_rows=...) supports one evaluation set; use LemoTrainer to evaluate several"
            )
        self._evaluated_step = state.global_step
        self._open_labels(False)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """One line for people, one for programs."""
        if not logs or not state.is_world_process_zero:
            return
        entry: dict[str, Any] = {"step": state.global_step, **{k: v for k, v in logs.items() if k != "total_flos"}}
        if "loss" in logs:
            # LemoTrainer adds the figures itself, so that trackers get them too.
            entry |= {} if "tokens_per_s" in logs else self.figures(args)
            if self.handle is not None:
                ratios = self.handle.ratios().items()
                entry["layer_ratios"] = {str(layer): [round(x, 4) for x in pair] for layer, pair in ratios}
            self._logged = entry
            self.say(_line(entry, state.max_steps))
        elif "eval_loss" in logs:
            self.say(f"step {state.global_step}  validation loss {logs['eval_loss']:.4f}")
        if self.metrics_path is not None:
            self._write(self.metrics_path, json.dumps(entry) + "\n")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds to the checkpoint how the context was extended, and the handle's counts, on which draws depend."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            if args.process_index == 0:
                share_files(folder)
                if kwargs.get("model") is not None:
                    write_context(kwargs["model"], folder)
            counts = {} if self.handle is None else {name: getattr(self.handle, name) for name in COUNTS}
            replace_text(folder / state_file(args.process_index), json.dumps(counts) + "\n")

    def restore(self, checkpoint: str | Path, process: int = 0) -> None:
        """Takes up the counts of a checkpoint, if it has them: those of this process, where there are several."""
        self._restored = True
        path = Path(checkpoint) / state_file(process)
        if self.handle is not None and path.exists():
            for name, value in json.loads(path.read_text(encoding="utf-8")).items():
                setattr(self.handle, name, value)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops clock, hook and tracking."""
        self.close()

    def close(self) -> None:
        """Ends what `on_train_begin` began; also after an error, when the Trainer does not say that training ended."""
        if self._started:
            self.seconds = time.perf_counter() - self._started
        self._status = None
        self._stack.close()
        self._started = 0.0
        self._restored = False
        self._open_labels(True)

    def mean_ratios(self) -> tuple[float, float]:
        """(forward, backward) share of rows, mean over all layers, in the last sparse forward; (1, 1) when dense."""
        if self.handle is None:
            return 1.0, 1.0
        layers = len(self.handle.plan.layers)
        ratios = self.handle.ratios()
        dense = layers - len(ratios)
        return tuple((dense + sum(r[i] for r in ratios.values())) / layers for i in (0, 1))  # type: ignore[return-value]

    def figures(self, args: Any) -> dict[str, float]:
        """Speed since this was last asked, memory now and at most, ratios of the last forward: one number each."""
        now = time.perf_counter()
        seconds, tokens = now - self._marked, self.tokens - self._marked_tokens
        self._marked, self._marked_tokens = now, self.tokens
        forward, backward = self.mean_ratios()
        found = {
            "tokens_per_s": tokens * args.world_size / seconds if seconds > 0 else 0.0,
            "seconds": now - self._started,
            **self._memory(),
            "forward_ratio": forward,
            "backward_ratio": backward,
        }
        if self.handle is not None:
            found["dense_batches"] = self.handle.dense_batches
        return found

    def _write(self, path: Path, line: str) -> None:
        """Appends a line to the log, the whole of it or nothing. Training goes on where it cannot be written."""
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, size)
            if not self._unwritten:
                self.say(f"{path} cannot be written ({error}): training goes on, this log lacks entries", markup=False)
            self._unwritten = True

    def _memory(self) -> dict[str, int]:
        """Memory now, and at most since training began."""
        cuda = self._device is not None and self._device.type == "cuda"
        current = torch.cuda.memory_allocated(self._device) if cuda else resident_bytes()
        peak = torch.cuda.max_memory_allocated(self._device) if cuda else max(self.peak.peak_bytes, current)
        return {"memory_bytes": current, "peak_memory_bytes": peak}

    def _count(self, module: Any, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the model: counts the tokens of training forwards."""
        if module.training and torch.is_grad_enabled():
            source = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
            if source is not None:
                self.tokens += source.shape[0] * source.shape[1]

    def _open_labels(self, on: bool) -> None:
        """Shows all labels, or masks them again."""
        if self.opens_evaluation:
            self.loss_rows.enabled = not on  # type: ignore[union-attr]

    def _warn_of_parts(self, args: Any) -> None:
        """Says what a plain Trainer does to rows of prompts where a step has several parts."""
        if max(args.gradient_accumulation_steps, args.world_size) > 1:
            self.say(
                "PromptRows: under a plain Trainer each part of a step counts by its rows with loss, so that answers "
                "weigh more in parts with few of them; LemoTrainer weighs all rows of a step alike"
            )

    def _status_of_training(self) -> bool:
        """Whether training is under way."""
        return self._started > 0

    def _steps(self, state: Any) -> int:
        """Steps since training began or resumed; the first seen step is remembered."""
        if not hasattr(self, "_first_step") or self._first_step > state.global_step:
            self._first_step = state.global_step - 1
        return state.global_step - self._first_step

    def say(self, line: str, *, markup: bool = True) -> None:
        """Prints one line, however long."""
        self._terminal().print(line, highlight=False, soft_wrap=True, markup=markup)

    def _terminal(self) -> Any:
        """The console for lines."""
        if self.console is None:
            from rich.console import Console

            self.console = Console(stderr=True)
        return self.console


def state_file(process: int) -> str:
    """Where a process keeps its counts: each has batches of its own."""
    return STATE_FILE if process == 0 else f"lemo-{process}.json"


def _line(entry: dict[str, Any], max_steps: int) -> str:
    """One log entry for people; figures that are not known yet are left out."""
    memory, peak = entry["memory_bytes"] / GIB, entry["peak_memory_bytes"] / GIB
    parts = [f"step {entry['step']}/{max_steps}"]
    if "loss" in entry:
        parts.append(f"loss {float(entry['loss']):.4f}  lr {float(entry.get('learning_rate', math.nan)):.2e}")
    parts += [f"{entry['tokens_per_s']:,.0f} tokens/s", f"memory {memory:.2f} GiB, peak {peak:.2f}"]
    if "forward_ratio" in entry:
        parts.append(f"rows {entry['forward_ratio']:.0%} forward, {entry['backward_ratio']:.0%} backward")
    if entry.get("dense_batches"):
        parts.append(f"{entry['dense_batches']} batches dense")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    """h:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
