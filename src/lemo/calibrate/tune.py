"""Tune: thresholds of layers by finite differences of quality (Algorithm 1), held to a requested mean ratio."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor, nn

from lemo.calibrate.windows import Window
from lemo.core.layout import Layout
from lemo.core.plan import Plan
from lemo.errors import ConfigError
from lemo.runtime.attach import Handle, attach

IGNORED = -100
PROBE = 0.25  # e, in the unit of scores (predictors are trained on standardised scores)
STEP = 0.5  # largest move of a threshold in one step, in the same unit


@dataclass(frozen=True)
class ScoreProfile:
    """Predicted scores of one layer over the calibration windows, for the ratio that a threshold leads to.

    Attributes:
        scores_K: scores of competing blocks of all windows.
        forced_share: share of blocks that are kept whatever their score.
    """

    scores_K: Tensor
    forced_share: float

    @classmethod
    def of(cls, scores: Sequence[Tensor], layouts: Sequence[Layout]) -> ScoreProfile:
        """From the scores of every window's blocks."""
        competing = [s.detach().float().cpu()[~x.forced_K] for s, x in zip(scores, layouts, strict=True)]
        blocks = sum(len(x.forced_K) for x in layouts)
        forced = sum(int(x.forced_K.sum()) for x in layouts)
        return cls(torch.cat(competing), forced / max(blocks, 1))

    def ratio(self, threshold: float) -> float:
        """Share of blocks kept at a threshold."""
        if not len(self.scores_K):
            return 1.0
        kept = float((self.scores_K >= threshold).double().mean())
        return self.forced_share + (1 - self.forced_share) * kept

    def mean(self) -> float:
        """Mean score of competing blocks: where Algorithm 1 starts."""
        return float(self.scores_K.mean()) if len(self.scores_K) else 0.0


def project(thresholds: Mapping[int, float], profiles: Mapping[int, ScoreProfile], ratio: float) -> dict[int, float]:
    """Shifts all thresholds by one number so that the layers' mean ratio is the requested one.

    Bisects the shift; the mean ratio falls with it. Scores are finitely many, so the ratio is met to within the step
    that one block makes.

    Raises:
        ConfigError: forced blocks alone exceed the ratio.
    """
    least = fmean(profiles[i].forced_share for i in thresholds)
    if least > ratio:
        raise ConfigError(f"guards and supervised blocks alone are {least:.3f} of the blocks, above the ratio {ratio}")
    reach = 1.0 + max(
        float((profiles[i].scores_K - t).abs().max()) if len(profiles[i].scores_K) else 0.0
        for i, t in thresholds.items()
    )
    low, high = -reach, reach
    for _ in range(60):
        shift = (low + high) / 2
        if fmean(profiles[i].ratio(t + shift) for i, t in thresholds.items()) > ratio:
            low = shift
        else:
            high = shift
    return {i: t + high for i, t in thresholds.items()}


def tune_thresholds(
    quality: Callable[[Mapping[int, float]], float],
    profiles: Mapping[int, ScoreProfile],
    ratio: float,
    steps: int,
    on_step: Callable[[int, dict[int, float], float], None] = lambda step, thresholds, value: None,
) -> dict[int, float]:
    """Algorithm 1. Thresholds start at the layers' mean scores and climb the finite-difference gradient of quality.

    T_l += eta·(q(T_l + e) − q(T_l − e)) / 2e for each layer l, the others held; then all are projected onto the
    requested mean ratio. A higher threshold only ever removes rows, so without the projection every threshold would
    fall; with it, layers where rows matter more keep more of them. eta is set in each step so that the layer with the
    steepest slope moves by `STEP` in the first step, less in later ones (a 1/step schedule). The best thresholds seen,
    the start included, are returned. *Source*: LeMo, Algorithm 1; the projection is design.md's.

    Args:
        quality: negative loss of the sparse forward on held-out supervised rows under these thresholds.
        profiles: of every layer that has a threshold.
        ratio: requested mean ratio of these layers.
        steps: of the algorithm.
        on_step: told of (step, thresholds, quality), step 0 being the start.
    """
    thresholds = project({i: profile.mean() for i, profile in profiles.items()}, profiles, ratio)
    best, best_quality = thresholds, quality(thresholds)
    on_step(0, thresholds, best_quality)
    for step in range(1, steps + 1):
        slopes = {}
        for layer, value in thresholds.items():
            above, below = ({**thresholds, layer: value + sign * PROBE} for sign in (1, -1))
            slopes[layer] = (quality(above) - quality(below)) / (2 * PROBE)
        # The common part of the slopes is the price of the ratio itself, which the projection takes out again.
        common = fmean(slopes.values())
        steepest = max((abs(s - common) for s in slopes.values()), default=0.0)
        if steepest == 0:
            break
        eta = STEP / steepest / step
        moved = {i: t + eta * (slopes[i] - common) for i, t in thresholds.items()}
        thresholds = project(moved, profiles, ratio)
        value = quality(thresholds)
        on_step(step, thresholds, value)
        if value > best_quality:
            best, best_quality = thresholds, value
    return best


def with_thresholds(plan: Plan, thresholds: Mapping[int, float], ratios: Mapping[int, float]) -> Plan:
    """A `threshold` plan: layers get their thresholds, and ratios that leave room for documents that keep more.

    Under `threshold` a layer's ratio is the most it may keep. A document may hold more informative blocks than the
    calibration windows did on average, so that limit lies half-way between the expected ratio of the layer and 1.
    """
    for layer, threshold in thresholds.items():
        limit = min(1.0, (1 + ratios[layer]) / 2)
        changes = {"threshold": threshold, "forward_ratio": limit, "backward_ratio": limit}
        plan = plan.replace_layer(layer, **changes)
    return replace(plan, policy="threshold")


def with_ratios(plan: Plan, thresholds: Mapping[int, float], ratios: Mapping[int, float]) -> Plan:
    """A `topk` plan whose layers keep the share that the thresholds lead to."""
    for layer, threshold in thresholds.items():
        ratio = min(1.0, max(ratios[layer], 1e-3))
        plan = plan.replace_layer(layer, threshold=threshold, forward_ratio=ratio, backward_ratio=ratio)
    return replace(plan, policy="topk")


def expected_ratios(thresholds: Mapping[int, float], profiles: Mapping[int, ScoreProfile]) -> dict[int, float]:
    """Share of blocks that each layer keeps on the calibration windows."""
    return {i: profiles[i].ratio(t) for i, t in thresholds.items()}


@torch.no_grad()
def window_losses(
    model: nn.Module, plan: Plan | None, windows: Sequence[Window], kept: list[float] | None = None
) -> list[float]:
    """Loss per supervised token of every window, nats; sparse under `plan`, dense for None.

    In windows without `supervised` the loss counts all rows, also those that skip layers. `kept`, when given, receives
    each window's share of rows that ran, a mean over layers.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        neutral = plan if plan is not None else Plan.uniform(model, forward_ratio=1.0, backward_ratio=1.0)
        with (
            attach(model, neutral, sparse_eval=plan is not None, self_test=False, unsafe_no_bypass=True) as handle,
            handle.loss_only(),
        ):
            losses = []
            for window in windows:
                losses.append(_loss(model, window, device, handle))
                if kept is not None:
                    kept.append(fmean([forward for forward, _ in handle.ratios().values()] or [1.0]))
            return losses
    finally:
        model.train(was_training)


def _loss(model: nn.Module, window: Window, device: torch.device, handle: Handle) -> float:
    """Loss of one window."""
    supervised_BT = window.supervised_BT
    if supervised_BT is None:
        supervised_BT = torch.zeros_like(window.input_ids_BT, dtype=torch.bool)
    inputs = {
        "input_ids": window.input_ids_BT,
        "attention_mask": window.attention_mask_BT,
        "position_ids": window.position_ids_BT,
        "labels": window_labels(window),
    }
    with handle.supervised(supervised_BT):
        return float(model(**{k: v.to(device) for k, v in inputs.items() if v is not None}, use_cache=False).loss)


def window_labels(window: Window) -> Tensor:
    """Labels (B, T) that supervise a window's rows: row t is supervised by the label at t+1."""
    ids = window.input_ids_BT
    labels = torch.full_like(ids, IGNORED)
    supervised = torch.ones_like(ids, dtype=torch.bool) if window.supervised_BT is None else window.supervised_BT.bool()
    wanted = torch.zeros_like(supervised)
    wanted[:, 1:] = supervised[:, :-1]
    if window.attention_mask_BT is not None:
        wanted &= window.attention_mask_BT.bool()
    if window.position_ids_BT is not None:
        wanted &= window.position_ids_BT != 0
    labels[wanted] = ids[wanted]
    return labels
