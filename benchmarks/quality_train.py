"""One run of the quality benchmark: the loop, ramps, and what methods of others put in force while training."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality_specs import Method
from benchmarks.quality_study import QualityStudy
from benchmarks.rivals.oracle import GRADIENTS, forget_gradient, look_at_gradient
from lemo.calibrate.refit import predictor_recall, refit_bypass
from lemo.calibrate.windows import Window
from lemo.config import CalibrationConfig
from lemo.core.plan import LayerPlan, Plan
from lemo.measure.memory import track_peak
from lemo.runtime.attach import Handle
from lemo.runtime.batch import shifted_labels, supervised_rows
from lemo.runtime.head import head_loss
from lemo.runtime.model import causal_model
from lemo.train.master import MasterWeights


@dataclass
class Trained:
    """What a run left behind beside the weights.

    Attributes:
        losses: of every step.
        seconds: of every step.
        peak_gib: device memory.
        shares: (forward, backward) share of rows of each layer in the last step; empty for dense runs.
    """

    losses: list[float]
    seconds: list[float]
    peak_gib: float
    shares: list[tuple[float, float]]


def train(study: QualityStudy, method: Method, seed: int, setting: Mapping[str, Any], handle: Handle) -> Trained:
    """Trains the study's adapter.

    Args:
        study: model and data.
        method: how.
        seed: of order and loss rows.
        setting: of the cell: `steps` and `learning_rate`.
        handle: of the attached plan; a ramp puts others in force.
    """
    from transformers import get_cosine_schedule_with_warmup

    steps, model, plan = setting["steps"], study.model(), handle.plan
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=setting["learning_rate"], weight_decay=0.0)
    MasterWeights(optimizer)  # modules of the base that are trained whole have 16 bits
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), max(1, steps))
    correction = None if method.corrected is None else Correction(parameters, *method.corrected)
    losses, times = [], [time.perf_counter()]
    model.train()
    with track_peak(study.device) as peak:
        for number, batch in enumerate(study.training_batches(method, seed, steps)):
            if method.ramp is not None:
                handle.plan = at_progress(plan, method.ramp.progress(number, steps))
            if method.dense_every is not None:
                handle.plan = at_progress(plan, float(number % method.dense_every == method.dense_every - 1))
            total = backward(model, handle, method, batch)
            if correction is not None:
                correction.apply(number, lambda batch=batch: dense_backward(model, handle, method, batch))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            model.zero_grad(set_to_none=True)
            if method.refit_every is not None and (number + 1) % method.refit_every == 0:
                plan, _ = refit_bypass(model, plan, [_window(batch[0])])
                handle.plan = plan
            losses.append(total)
            times.append(time.perf_counter())
            if number % 50 == 0 or number == steps - 1:
                print(f"{setting['method']} seed {seed} step {number}: loss {losses[-1]:.4f}", flush=True)
    handle.plan = plan
    forget_gradient(plan)
    shares = handle.ratios() if handle.selections else {}
    seconds = [after - before for before, after in itertools.pairwise(times)]
    return Trained(losses, seconds, peak.peak_gib, [shares[i] for i in sorted(shares)])


def backward(model: Any, handle: Handle, method: Method, batch: Sequence[Mapping[str, Tensor]]) -> float:
    """Adds the gradients of a step to the parameters'; returns its loss."""
    labelled = sum(int((part["labels"][:, 1:] != -100).sum()) for part in batch)
    total = 0.0
    for part in batch:
        if method.plan is not None and method.plan.oracle in GRADIENTS:
            look_at_gradient(model, handle, part, method.plan.oracle == "gradient_same")
        loss = loss_of(model, handle, method, part, labelled)
        loss.backward()
        total += float(loss.detach())
    return total


def dense_backward(model: Any, handle: Handle, method: Method, batch: Sequence[Mapping[str, Tensor]]) -> None:
    """The same with every row in every layer."""
    plan = handle.plan
    handle.plan = at_progress(plan, 1.0)
    backward(model, handle, method, batch)
    handle.plan = plan


class Correction:
    """What gradients through few rows lack, as a running mean over the steps in which it was looked at.

    A control variate: the mean that is missing is the same from step to step as far as the task and the weights are.

    Args:
        parameters: whose gradients it corrects.
        every: steps from one look to the next; the first step looks.
        decay: what the mean keeps of itself at a look.
    """

    def __init__(self, parameters: Sequence[Tensor], every: int, decay: float) -> None:
        self.parameters, self.every, self.decay = parameters, every, decay
        self.mean: list[Tensor] = [torch.zeros_like(p) for p in parameters]
        self.looks = 0

    def apply(self, number: int, look: Callable[[], None]) -> None:
        """Corrects the gradients of step `number`; `look` adds the dense ones of the same batch to what is there."""
        sparse = [_gradient(p) for p in self.parameters]
        if number % self.every:
            for parameter, gradient, mean in zip(self.parameters, sparse, self.mean, strict=True):
                parameter.grad = gradient + mean / (1 - self.decay**self.looks)
            return
        for parameter in self.parameters:
            parameter.grad = None
        look()
        self.looks += 1
        for parameter, gradient, mean in zip(self.parameters, sparse, self.mean, strict=True):
            mean.lerp_(_gradient(parameter) - gradient, 1 - self.decay)


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _window(batch: Mapping[str, Tensor]) -> Window:
    """The first sequence of a training batch."""
    supervised = supervised_rows(batch)
    assert supervised is not None
    masks = [batch[name][:1] if name in batch else None for name in ("attention_mask", "position_ids")]
    return Window(batch["input_ids"][:1], supervised[:1], masks[0], masks[1], "train", False)


def recalls(study: QualityStudy, method: Method, plan: Plan | None) -> dict[str, float]:
    """Recall of the plan's predictors under the model as it is, on one validation window of each domain.

    Empty for methods that rank blocks otherwise.
    """
    spec = method.plan
    if plan is None or spec is None or spec.scorer != "predictor" or spec.oracle or method.rival:
        return {}
    config = CalibrationConfig(target=spec.target)  # type: ignore[arg-type]
    found: dict[str, float] = {}
    for domain, batch, drawn_1T in study.validation(method):
        if domain not in found:
            parts = (batch["input_ids"], drawn_1T, batch.get("attention_mask"), batch.get("position_ids"))
            layers = predictor_recall(study.model(), plan, [Window(*parts, domain, True)], config)
            if layers:
                found[domain] = sum(layers.values()) / len(layers)
    return found


def at_progress(plan: Plan, progress: float) -> Plan:
    """The plan with every ratio risen by a share of its way to 1."""
    if progress == 0:
        return plan

    def risen(layer: LayerPlan) -> LayerPlan:
        if layer.is_dense:
            return layer
        forward, backward = (r + (1 - r) * progress for r in (layer.forward_ratio, layer.backward_ratio))
        return replace(layer, forward_ratio=min(1.0, forward), backward_ratio=min(1.0, backward))

    return replace(plan, layers=tuple(risen(x) for x in plan.layers))


def in_force(model: Any, method: Method, plan: Plan | None) -> AbstractContextManager[None]:
    """Inside, the model trains as the method of others does; evaluation happens outside."""
    if method.rival is None:
        return nullcontext()
    from benchmarks.rivals import RIVAL_CONTEXTS

    return RIVAL_CONTEXTS[method.rival](causal_model(model), plan)


def loss_of(model: Any, handle: Handle, method: Method, batch: Mapping[str, Tensor], labelled: int) -> Tensor:
    """The loss of one sequence as part of a step with `labelled` rows; rows of it may be skipped where others do so.

    lemo keeps every row that labels name. Methods that know no such rule run without labels, and what the decoder
    gives goes into the loss afterwards.
    """
    if method.forced or method.plan is None or method.rival is not None:
        return model(**batch, num_items_in_batch=labelled).loss
    base, caught = causal_model(model), []
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    nothing_BT = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    hook = base.base_model.register_forward_hook(lambda module, args, output: caught.append(output.last_hidden_state))
    try:
        with handle.supervised(nothing_BT):
            model(**inputs, logits_to_keep=1)
    finally:
        hook.remove()
    return head_loss(base, caught[-1], shifted_labels(batch), labelled)
