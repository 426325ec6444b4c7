"""Refit: bypasses follow the weights while an adapter trains, and how well predictors still find what they should."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean

from torch import nn

from lemo.calibrate.collect import block_target, ranked, skip_weights
from lemo.calibrate.report import recall
from lemo.calibrate.streams import open_stream
from lemo.calibrate.windows import Window
from lemo.config import CalibrationConfig
from lemo.core.bypass import BypassFit
from lemo.core.plan import Plan
from lemo.runtime.stream import LayerStream

REFIT_RIDGE = 0.05  # how strongly one window's fit is held to the bypass before
RECALL_SHARE = 0.3


def refit_bypass(
    model: nn.Module,
    plan: Plan,
    windows: Sequence[Window],
    *,
    aim: str = CalibrationConfig.bypass_target,
    ridge: float = REFIT_RIDGE,
) -> tuple[Plan, dict[int, float]]:
    """Fits the bypass of every layer anew on some windows, in closed form, held to the bypass before.

    As in calibration, layer by layer on the stream that the refitted layers before make; rows that the plan skips
    count. Ranks stay. Nothing else of the plan changes.

    Args:
        model: the model as it is now, adapter included, with or without an attached plan.
        plan: the plan in force.
        windows: batches of tokens; one of some thousand tokens is enough, because the map before is the prior.
        aim: `update` or `dense_stream`, see `CalibrationConfig.bypass_target`.
        ridge: strength of the prior, relative to the mean diagonal of the input's second moments.

    Returns:
        The plan, and by layer the share of the update's energy that its new bypass explains on these windows.

    *Cost*: two forwards without gradient of every window (three with `update`), and per layer one (M, M) solve and
    eigendecomposition in fp64.
    """
    explained: dict[int, float] = {}
    with _streams(model, plan, windows) as streams:
        sparse = [stream.hidden_BTM for stream in streams]
        dense = list(sparse) if aim == "dense_stream" else None
        for index in range(len(plan.layers)):
            if dense is not None:
                dense = [s.dense(index, x_BTM).output_BTM for s, x_BTM in zip(streams, dense, strict=True)]
            layer = plan.layers[index]
            if layer.forward_ratio < 1 and layer.bypass is not None:
                fit = BypassFit(sparse[0].shape[-1], sparse[0].device)
                for place, (stream, x_BTM) in enumerate(zip(streams, sparse, strict=True)):
                    reached = stream.dense(index, x_BTM).output_BTM if dense is None else dense[place]
                    scores_K = ranked(plan, index, x_BTM.flatten(0, 1), stream.layout)
                    weight_N = skip_weights(stream.layout, scores_K, layer.forward_ratio, plan.ratio_of)
                    fit.add(x_BTM.flatten(0, 1), (reached.float() - x_BTM.float()).flatten(0, 1), weight_N)
                if float(fit.weight) > 0:
                    bypass = fit.solve(layer.bypass.rank, ridge, layer.bypass)
                    explained[index] = fit.explained(bypass)
                    plan = plan.replace_layer(index, bypass=bypass)
            sparse = [s.sparse(index, x_BTM, plan) for s, x_BTM in zip(streams, sparse, strict=True)]
    return plan, explained


def predictor_recall(
    model: nn.Module, plan: Plan, windows: Sequence[Window], config: CalibrationConfig
) -> dict[int, float]:
    """Recall of each layer's predictor now: of the 0.3 of competing blocks that its target ranks highest, how many.

    On the stream that the plan makes, with the target that predictors learnt; mean over windows. Layers where nothing
    competes are left out.

    Args:
        model: the model as it is now, adapter included, with or without an attached plan.
        plan: the plan in force.
        windows: that nothing was fitted or trained on.
        config: its `target` and `query_stride`.

    *Cost*: a sparse and a dense forward of every window, and the target's attention.
    """
    found: dict[int, list[float]] = {}
    with _streams(model, plan, windows) as streams:
        for stream in streams:
            x_BTM = stream.hidden_BTM
            for index, layer in enumerate(plan.layers):
                if layer.predictor is not None and not layer.is_dense:
                    target = block_target(stream.dense(index, x_BTM, ("attention",)), stream.layout, config)
                    scores_K = layer.predictor.scores(x_BTM.flatten(0, 1), stream.layout)
                    pair = recall(scores_K, target.block_K, stream.layout, RECALL_SHARE)
                    if pair is not None:
                        found.setdefault(index, []).append(pair[0])
                x_BTM = stream.sparse(index, x_BTM, plan)
    return {index: fmean(values) for index, values in found.items()}


@contextmanager
def _streams(model: nn.Module, plan: Plan, windows: Sequence[Window]) -> Iterator[list[LayerStream]]:
    """Every window at the first layer; the model is in eval mode inside."""
    was_training = model.training
    model.eval()
    try:
        yield [open_stream(model, window, plan.block_size, attached=True) for window in windows]
    finally:
        model.train(was_training)
