"""What the training benchmarks share: model, windows, calibrated plan and the step of one setting."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import lemo
from lemo.config import CalibrationConfig, DataConfig, LoraConfig, ModelConfig
from lemo.core.plan import LayerPlan, Plan
from lemo.measure.record import config_hash
from lemo.runtime.batch import supervised_rows
from lemo.train.data import LossRows, WindowCollator, load_windows
from lemo.train.lora import add_adapter
from lemo.train.model import load_model


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that say what is trained on what."""
    add = parser.add_argument
    add("--model", type=Path, required=True)
    add("--data", type=Path, required=True)
    add("--work", type=Path, default=Path("runs/extension"), help="folder of calibrated plans")
    add("--domains", default="books")
    add("--steps", type=int, default=100)
    add("--window", type=int, default=16384)
    add("--batch", type=int, default=2)
    add("--learning-rate", type=float, default=5e-4)
    add("--rank", type=int, default=16)
    add("--loss-share", type=float, default=0.4)
    add("--keep", type=float, default=0.5)
    add("--kv", choices=("all", "kept"), default="all")
    add("--train-windows", type=int, default=None, help="use only so many windows of the training files")
    add("--validation-windows", type=int, default=16)
    add("--calibration-windows", type=int, default=8)
    add("--tune-windows", type=int, default=2)
    add("--bypass-target", choices=("update", "dense_stream"), default=CalibrationConfig.bypass_target)
    add("--predictor-steps", type=int, default=CalibrationConfig.predictor_steps)
    add("--checkpointing", action="store_true")
    add("--dtype", default="bfloat16")
    add("--device", default="cuda")


class Study:
    """Model, data, plan and Records of one setting."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        kept = ("steps", "window", "batch", "learning_rate", "loss_share", "keep", "rank", "checkpointing", "kv")
        self.setting = {name: getattr(options, name) for name in kept}
        self.setting |= {"domains": options.domains, "dtype": options.dtype, "rope_scaling": "linear", "kv": options.kv}
        self.setting |= {"calibration_windows": options.calibration_windows, "validation": options.validation_windows}
        names = [f"{name}-train.npz" for name in options.domains.split(",")]
        files = DataConfig(
            train=tuple(str(options.data / name) for name in names),
            validation=tuple(str(options.data / name.replace("train", "validation")) for name in names),
            window_tokens=options.window,
        )
        self.train, _ = load_windows(files, None, "train", limit=options.train_windows)
        self.validation, _ = load_windows(files, None, "validation", limit=options.validation_windows)
        self.collator = WindowCollator()
        self.loss_rows = LossRows(self.collator, options.loss_share, seed=0, block_size=64)
        needed = options.steps * options.batch + options.calibration_windows + options.tune_windows
        if needed > len(self.train):
            sys.exit(f"error: {needed} windows needed, the data has {len(self.train)}; fewer steps or more --domains")
        self._plan: Plan | None = None

    def order(self, seed: int) -> list[int]:
        """Windows in the order of training; the last ones are for calibration and are never trained on."""
        drawn = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(1234)).tolist()
        reserved = self.options.calibration_windows + self.options.tune_windows
        free = drawn[: len(drawn) - reserved]
        shuffled = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed)).tolist()
        return [free[i] for i in shuffled] + drawn[len(drawn) - reserved :]

    def base_model(self) -> Any:
        """The model with its context extended."""
        config = ModelConfig(
            path=str(self.options.model),
            dtype=self.options.dtype,
            context_length=self.options.window,
            rope_scaling="linear",
        )
        own = _own_context(self.options.model)
        if own is not None and own >= self.options.window:
            config = replace(config, context_length=None, rope_scaling="none")
        return load_model(config, window_tokens=self.options.window, device=self.device)

    def adapted_model(self, seed: int) -> Any:
        """The model with a fresh adapter, the same for every variant."""
        torch.manual_seed(seed)
        model = add_adapter(self.base_model(), LoraConfig(rank=self.options.rank, alpha=2 * self.options.rank))
        if self.options.checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        return model

    def plan(self) -> Plan:
        """The calibrated plan; made once and kept beside the results."""
        if self._plan is None:
            folder = self.options.work / f"plan-{config_hash(self._plan_setting())}"
            if not (folder / "plan" / "plan.json").exists():
                start = time.perf_counter()
                self._calibrate(folder)
                print(f"calibrated in {time.perf_counter() - start:.0f} s: {folder}", flush=True)
            self._plan = Plan.load(folder / "plan")
        return self._plan

    def _plan_setting(self) -> dict[str, Any]:
        names = (
            "window",
            "loss_share",
            "keep",
            "kv",
            "domains",
            "calibration_windows",
            "predictor_steps",
            "dtype",
            "bypass_target",
        )
        return {name: getattr(self.options, name) for name in names}

    def _calibrate(self, folder: Path) -> Plan:
        options, split = self.options, self.options.calibration_windows
        model = self.base_model().eval()
        skeleton = Plan.uniform(
            model,
            forward_ratio=options.keep,
            backward_ratio=options.keep,
            dense_layers=(0, -1),
            kv=options.kv,
            scorer="predictor",
        )
        batches = [self.calibration_batch(i) for i in self.order(0)[-split - options.tune_windows :]]
        config = CalibrationConfig(
            windows=split,
            tune_windows=options.tune_windows,
            target="attention_mass",
            predictor_steps=options.predictor_steps,
            bypass_target=options.bypass_target,
        )
        return lemo.calibrate(
            model, batches[:split], config, plan=skeleton, held_out=batches[split:], output_dir=folder
        )

    def calibration_batch(self, index: int) -> dict[str, Any]:
        """One window as calibration reads it."""
        batch = self.loss_rows([self.train[index]])
        return {"input_ids": batch["input_ids"], "supervised": supervised_rows(batch), "domain": self.options.domains}

    def plan_of(self, use: str) -> Plan:
        """The calibrated plan, used in one of the ways that variants name."""
        plan, keep = self.plan(), self.options.keep
        if use == "skip":
            return plan
        if use == "random":
            return replace(plan, scorer="random")
        if use == "dense":
            return replace(plan, layers=tuple(LayerPlan() for _ in plan.layers))
        exact = [x if x.is_dense else replace(x, forward_ratio=1.0, backward_ratio=keep) for x in plan.layers]
        return replace(plan, layers=tuple(exact), gradient=use)

    def batch(self, indices: Sequence[int], loss_rows: bool) -> dict[str, torch.Tensor]:
        """Windows of the training set on the device."""
        samples = [self.train[i] for i in indices]
        made = self.loss_rows(samples) if loss_rows else self.collator(samples)
        return {name: tensor.to(self.device) for name, tensor in made.items()}

    def validation_batches(self, loss_rows: bool) -> list[dict[str, torch.Tensor]]:
        """Validation windows, labelled on their loss rows only, or on all tokens."""
        collate = self.loss_rows if loss_rows else self.collator
        return [collate([self.validation[i]]) for i in range(len(self.validation))]


def _own_context(folder: Path) -> int | None:
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", None)


def make_optimizer(model: Any, options: argparse.Namespace) -> tuple[Any, Any]:
    """AdamW on the adapter with warm-up and cosine decay."""
    from transformers import get_cosine_schedule_with_warmup

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    warmup = max(1, options.steps // 20)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, warmup, options.steps)


def step_function(model: Any, optimizer: Any) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """One optimizer step on one batch; returns its loss, on the device."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
