"""Budget: ratios of layers, dense ones included, chosen for the least loss at the cost of the uniform plan.

Algorithm 1 moves thresholds along the slope of quality and keeps their mean ratio. Here each layer's quality is looked
at by finite differences at a few ratios, and a budget of cost, in which layers differ, is spent where it buys most.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from lemo.calibrate.shards import Shards
from lemo.calibrate.tune import window_labels, window_losses
from lemo.calibrate.windows import Window
from lemo.core.layout import Layout
from lemo.core.plan import LayerPlan, Plan
from lemo.errors import ConfigError
from lemo.runtime.attach import attach

LayerCost = Callable[[LayerPlan], float]
FACTORS = (0.5, 2.0)  # of a layer's ratio; beside these it is looked at as it is and dense
MIXES = (1.0, 0.5)  # how far to go from the uniform plan; the better one is taken


@dataclass(frozen=True)
class Point:
    """One layer at one ratio: what it costs, and what the model loses, the other layers as they are."""

    ratio: float
    cost: float
    loss: float


def ratio_of(layer: LayerPlan) -> float:
    """What a budget moves: the forward ratio, or for exact forward the backward ratio."""
    return layer.forward_ratio if layer.forward_ratio < 1 else layer.backward_ratio


def at_ratio(layer: LayerPlan, ratio: float) -> LayerPlan:
    """The layer at another ratio; backward stays the same share of forward, and a ratio of 1 is a dense layer."""
    if ratio >= 1:
        mlp = None if layer.mlp_ratio is None else 1.0
        return replace(layer, forward_ratio=1.0, backward_ratio=1.0, mlp_ratio=mlp)
    if layer.forward_ratio == 1:
        return replace(layer, backward_ratio=ratio)
    # Equal ratios stay equal to the bit: rows then run both ways.
    backward = ratio * (layer.backward_ratio / layer.forward_ratio)
    mlp = None if layer.mlp_ratio is None else ratio * (layer.mlp_ratio / layer.forward_ratio)
    return replace(layer, forward_ratio=ratio, backward_ratio=backward, mlp_ratio=mlp)


def hull(points: Sequence[Point]) -> list[Point]:
    """Points of the lower convex hull, in the order of cost, from the cheapest to the one of the least loss."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.loss)):
        if kept and point.loss >= kept[-1].loss:
            continue
        while len(kept) >= 2 and _slope(kept[-2], kept[-1]) >= _slope(kept[-1], point):
            kept.pop()
        kept.append(point)
    return kept


def spend(
    curves: Mapping[int, Sequence[Point]], budget: float, cost_at: Callable[[int, float], float], blocks: int
) -> dict[int, float]:
    """Ratios that lose least within a budget, if losses of layers add up and are linear between points.

    Greedy: steps of all layers' hulls are bought in the order of loss saved per cost; the step that no longer fits is
    bought in part. Ratios are multiples of 1/blocks, rounded down.

    Args:
        curves: points of each layer.
        budget: most that all these layers may cost together.
        cost_at: what a layer costs at a ratio.
        blocks: blocks of a document, the least unit of a ratio.

    Raises:
        ConfigError: the budget is below the cheapest points.
    """
    hulls = {layer: hull(points) for layer, points in curves.items()}
    ratios = {layer: steps[0].ratio for layer, steps in hulls.items()}
    left = budget - sum(steps[0].cost for steps in hulls.values())
    if left < -1e-9 * abs(budget):
        raise ConfigError(f"the cheapest ratios cost {budget - left:.3g}, above the budget of {budget:.3g}")
    steps = [(_slope(a, b), layer, a, b) for layer, found in hulls.items() for a, b in itertools.pairwise(found)]
    stopped: set[int] = set()
    for _, layer, before, after in sorted(steps, key=lambda step: step[:2]):
        if layer in stopped:
            continue
        if after.cost - before.cost <= left:
            ratios[layer] = after.ratio
            left -= after.cost - before.cost
            continue
        stopped.add(layer)
        # The most whole blocks that still fit; costs rise with the ratio.
        low, high = round(before.ratio * blocks), round(after.ratio * blocks)
        fitting = [k for k in range(low + 1, high) if cost_at(layer, k / blocks) - before.cost <= left]
        if fitting:
            ratios[layer] = max(fitting) / blocks
            left -= cost_at(layer, ratios[layer]) - before.cost
    return ratios


def allocate(
    model: nn.Module,
    plan: Plan,
    windows: Sequence[Window],
    layouts: Sequence[Layout],
    cost: LayerCost,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Plan, dict[str, Any]]:
    """A plan that costs no more than the given one and, on these windows, loses no more; cheaper where nothing is lost.

    Quality is the sparse loss of supervised rows; where forward is exact, whose loss no ratio changes, it is the
    relative error of the gradient at the embeddings. Only layers that the plan lets skip are moved: name no dense
    layers in the skeleton to have them chosen too.

    Args:
        model: no plan attached.
        plan: calibrated, with uniform ratios; the budget is its cost.
        windows: held out.
        layouts: of the windows.
        cost: of one layer, see `lemo.train.costs`.
        note: told of progress.

    Returns:
        The plan, and what was measured.

    Raises:
        ConfigError: no held-out windows, or nothing to allocate.

    *Cost*: three passes over the windows for each layer, and three more; with gradient where forward is exact.
    """
    chosen = [i for i, layer in enumerate(plan.layers) if not layer.is_dense]
    if not windows:
        raise ConfigError("calibration.allocate needs held-out windows; set calibration.tune_windows above 0")
    if not chosen or plan.policy == "threshold" or plan.ratio_of != "all":
        raise ConfigError("calibration.allocate needs layers that skip rows, the topk policy, and ratios of all rows")
    quality = _quality(model, windows, exact=all(plan.layers[i].forward_ratio == 1 for i in chosen))
    blocks = max(int(torch.bincount(layout.block_document_K).max()) for layout in layouts)
    forced = fmean(float(layout.forced_K.float().mean()) for layout in layouts)
    uniform = quality(plan)
    note(f"allocate: uniform ratios lose {uniform:.4f}")
    curves: dict[int, list[Point]] = {}
    for index in chosen:
        layer = plan.layers[index]
        points = [Point(ratio_of(layer), cost(layer), uniform)]
        for ratio in _looked_at(ratio_of(layer), forced, blocks):
            moved = at_ratio(layer, ratio)
            points.append(Point(ratio, cost(moved), quality(_with_layer(plan, index, moved))))
        curves[index] = sorted(points, key=lambda p: p.ratio)
        note(f"allocate: layer {index}: " + ", ".join(f"{p.loss:.4f} at {p.ratio:.2f}" for p in curves[index]))
    budget = sum(cost(plan.layers[i]) for i in chosen)
    ratios = spend(curves, budget, lambda i, ratio: cost(at_ratio(plan.layers[i], ratio)), blocks)
    found = {"uniform": uniform, "budget": budget, "tried": []}
    found["curves"] = {i: [[p.ratio, p.cost, p.loss] for p in points] for i, points in curves.items()}
    best, least, cheapest = plan, uniform, budget
    for mix in MIXES:
        tried = plan
        for index in chosen:
            before = ratio_of(plan.layers[index])
            # Costs are convex in the ratio, so that what lies between two plans of one cost costs no more.
            ratio = ratios[index] if mix == 1 else _whole(before + mix * (ratios[index] - before), blocks)
            moved = at_ratio(plan.layers[index], max(ratio, 1 / blocks))
            tried = _with_layer(tried, index, moved)
        loss, spent = quality(tried), sum(cost(tried.layers[i]) for i in chosen)
        found["tried"].append({"mix": mix, "loss": loss, "cost": spent})
        note(f"allocate: {mix:.0%} of the way loses {loss:.4f}, at {spent / budget:.3f} of the budget")
        if spent <= budget * (1 + 1e-9) and (loss, spent) < (least, cheapest):
            best, least, cheapest = tried, loss, spent
    found["ratios"] = {i: ratio_of(best.layers[i]) if not best.layers[i].is_dense else 1.0 for i in chosen}
    found |= {"loss": least, "cost": cheapest}
    return best, found


def allocate_once(
    model: nn.Module,
    plan: Plan,
    held: tuple[Sequence[Window], Sequence[Layout]],
    cost: LayerCost | None,
    shards: Shards,
    progress: bool,
) -> tuple[Plan, dict[str, Any]]:
    """`allocate` as a stage of a calibration: what a folder remembers is not measured again.

    Raises:
        ConfigError: no cost was given.
    """
    found = shards.load_json("allocate")
    if found is None:
        if cost is None:
            raise ConfigError("calibration.allocate is budget: give calibrate(cost=...), see lemo.train.costs")
        _, found = allocate(model, plan, *held, cost, (lambda text: print(text, flush=True)) if progress else _silent)
        shards.save_json("allocate", found)
    for index, ratio in found["ratios"].items():
        plan = _with_layer(plan, int(index), at_ratio(plan.layers[int(index)], ratio))
    return plan, found


def _with_layer(plan: Plan, index: int, layer: LayerPlan) -> Plan:
    """The plan with one layer in place of another."""
    return replace(plan, layers=(*plan.layers[:index], layer, *plan.layers[index + 1 :]))


def _silent(text: str) -> None:
    """Says nothing."""


def _slope(before: Point, after: Point) -> float:
    """Loss per cost between two points; below zero where cost buys quality."""
    return (after.loss - before.loss) / max(after.cost - before.cost, 1e-30)


def _whole(ratio: float, blocks: int) -> float:
    """The ratio rounded down to whole blocks."""
    return int(ratio * blocks + 1e-9) / blocks


def _looked_at(ratio: float, forced: float, blocks: int) -> list[float]:
    """Ratios in whole blocks beside a layer's own; forced blocks run whatever the ratio, so none below their share."""
    least = -(-forced * blocks // 1) / blocks
    found = {min(1.0, max(_whole(factor * ratio, blocks), least, 1 / blocks)) for factor in FACTORS} | {1.0}
    return sorted(x for x in found if abs(x - ratio) > 0.5 / blocks)


def _quality(model: nn.Module, windows: Sequence[Window], *, exact: bool) -> Callable[[Plan], float]:
    """What a plan loses on the windows."""
    if not exact:
        return lambda plan: fmean(window_losses(model, plan, windows))
    dense = Plan.uniform(model, forward_ratio=1.0, backward_ratio=1.0)
    wanted = [_gradient(model, dense, window) for window in windows]

    def error(plan: Plan) -> float:
        found = [_gradient(model, plan, window) for window in windows]
        return fmean(float((f - w).square().sum() / w.square().sum()) for f, w in zip(found, wanted, strict=True))

    return error


def _gradient(model: nn.Module, plan: Plan, window: Window) -> Tensor:
    """(B, T, M) fp32 gradient of a window's loss at the embeddings of its tokens, on the CPU."""
    was_training, device = model.training, next(model.parameters()).device
    frozen = [p for p in model.parameters() if p.requires_grad]
    model.train()
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        embedded_BTM = model.get_input_embeddings()(window.input_ids_BT.to(device)).detach().requires_grad_()  # type: ignore
        inputs = {"attention_mask": window.attention_mask_BT, "position_ids": window.position_ids_BT}
        inputs = {k: v.to(device) for k, v in inputs.items() if v is not None}
        with torch.enable_grad(), attach(model, plan, self_test=False, unsafe_no_bypass=True):
            labels = window_labels(window).to(device)
            loss = model(inputs_embeds=embedded_BTM * 1.0, labels=labels, use_cache=False, **inputs).loss
            return torch.autograd.grad(loss, embedded_BTM)[0].float().cpu()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        model.train(was_training)
