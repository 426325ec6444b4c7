"""Fit: a predictor from block features to block scores, and a bypass from second moments, for one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from lemo.calibrate.collect import PartStatistics, blank_predictor
from lemo.config import CalibrationConfig
from lemo.core.bypass import Bypass
from lemo.core.layout import Layout
from lemo.core.predictor import PatternPredictor
from lemo.core.prune import NeuronCensus, prune_with_inputs

TARGET_FLOOR = 1e-9
RANK_SHARES = (0.15, 0.3)  # the budgets at which recall is measured
RANK_SHARPNESS = 4.0
LEARNING_RATE = 3e-3
# Blocks are few (some thousand), so nets learn windows by heart unless features are noisy and weights small.
WEIGHT_DECAY = 3.0
FEATURE_NOISE = 0.5
FINE_TUNE_SHARE = 0.5  # of the steps, after pruning


@dataclass(frozen=True)
class PartFit:
    """A fitted predictor, as it was before pruning, and the bypass.

    Attributes:
        predictor: what the plan uses; None where nothing reads one.
        unpruned: the predictor at full size; the same object when nothing was pruned.
        inputs: which of the collected features the predictor reads.
        bypass: None when no row skips or rank 0 was asked for.
        explained: share of the update's energy that the bypass explains on the rows it was fitted on; None without one.
    """

    predictor: PatternPredictor | None
    unpruned: PatternPredictor | None
    inputs: Tensor | None
    bypass: Bypass | None
    explained: float | None


@dataclass(frozen=True)
class TrainingSet:
    """Blocks of all windows as one batch of documents.

    Attributes:
        layout: block-level fields of every window, documents renumbered; it has no row fields.
        features_KF: standardised features.
        target_K: standardised log scores.
        pairs_2P: (2, P) for each wanted order, the block that should win and the one that should lose.
    """

    layout: Layout
    features_KF: Tensor
    target_K: Tensor
    pairs_2P: Tensor


def merge_layouts(layouts: Sequence[Layout]) -> Layout:
    """One layout with the documents and blocks of all; row fields are empty, block starts are those of each batch."""
    offsets = [0]
    for layout in layouts:
        offsets.append(offsets[-1] + len(layout.document_start_D))
    joined = {
        name: torch.cat([getattr(layout, name) for layout in layouts])
        for name in ("document_start_D", "document_length_D", "block_start_K", "block_length_K", "forced_K")
    }
    empty = layouts[0].document_of_row_N[:0]
    return replace(
        layouts[0],
        **joined,
        supervised_K=torch.cat([layout.supervised_K for layout in layouts]),
        block_document_K=torch.cat([x.block_document_K + o for x, o in zip(layouts, offsets, strict=False)]),
        document_of_row_N=empty,
        position_of_row_N=empty,
        block_of_row_N=empty,
    )


def fit_part(
    statistics: PartStatistics, layouts: Sequence[Layout], fitted_on: Sequence[int], config: CalibrationConfig
) -> PartFit:
    """Trains the predictor, prunes it when asked, and solves for the bypass.

    Args:
        statistics: of one part of one layer; those without a projection give a bypass alone.
        layouts: one per window.
        fitted_on: indices of the windows that are not held out.
        config: calibration options.
    """
    chosen = unpruned = inputs = None
    if statistics.projection_MF is not None:
        chosen, unpruned, inputs = _fit_predictor(statistics, layouts, fitted_on, config)
    bypass = explained = None
    if statistics.moments is not None and config.bypass_rank > 0:
        rank = min(config.bypass_rank, statistics.moments.width)
        bypass = statistics.moments.solve(rank, config.bypass_ridge)
        explained = statistics.moments.explained(bypass)
    return PartFit(chosen, unpruned, inputs, bypass, explained)


def _fit_predictor(
    statistics: PartStatistics, layouts: Sequence[Layout], fitted_on: Sequence[int], config: CalibrationConfig
) -> tuple[PatternPredictor, PatternPredictor, Tensor]:
    """The predictor, the same before pruning, and which of the features it reads."""
    projection_MF = statistics.projection_MF
    device = projection_MF.device
    layout = merge_layouts([layouts[i] for i in fitted_on])
    raw_KF = torch.cat([statistics.features[i] for i in fitted_on])
    target_K = torch.cat([statistics.targets[i] for i in fitted_on])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        predictor = blank_predictor(projection_MF, config)
        predictor.feature_mean.copy_(raw_KF.mean(0))
        predictor.feature_scale.copy_(1 / (raw_KF.std(0) + 1e-6))
        unpruned = _train(predictor, raw_KF, target_K, layout, config.predictor_steps)
        chosen, inputs = unpruned, torch.arange(raw_KF.shape[1], device=device)
        if config.prune_to < 1:
            census = NeuronCensus(unpruned)
            census.add(unpruned, standardise(unpruned, raw_KF))
            chosen, inputs = prune_with_inputs(unpruned, census, config.prune_to)
            chosen = _train(chosen, raw_KF[:, inputs], target_K, layout, int(config.predictor_steps * FINE_TUNE_SHARE))
    return chosen, unpruned, inputs


def standardise(predictor: PatternPredictor, raw_KF: Tensor) -> Tensor:
    """Standardised features from raw ones."""
    return (raw_KF - predictor.feature_mean) * predictor.feature_scale


def _train(
    predictor: PatternPredictor, raw_KF: Tensor, target_K: Tensor, layout: Layout, steps: int
) -> PatternPredictor:
    """Trains the nets in place: Huber loss on standardised log scores and a pairwise ranking loss at the budgets."""
    data = _training_set(predictor, raw_KF, target_K, layout)
    parameters = [*predictor.query_net.parameters(), *predictor.key_net.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    # A warm-up of a whole number of steps, two at least: OneCycleLR divides by one less.
    total, warm = max(steps, 4), max(round(0.1 * steps), 2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=total, pct_start=warm / total)
    competing_K = (~layout.forced_K).to(raw_KF.device)
    with torch.enable_grad():
        for _ in range(steps):
            features = data.features_KF + FEATURE_NOISE * torch.randn_like(data.features_KF)
            scores_K = predictor.scores_of_features(features, data.layout)
            loss = functional.huber_loss(scores_K[competing_K], data.target_K[competing_K])
            if data.pairs_2P.shape[1]:
                winner, loser = scores_K[data.pairs_2P[0]], scores_K[data.pairs_2P[1]]
                loss = loss + functional.softplus(RANK_SHARPNESS * (loser - winner)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    predictor.requires_grad_(False)
    return predictor


def _training_set(predictor: PatternPredictor, raw_KF: Tensor, target_K: Tensor, layout: Layout) -> TrainingSet:
    """Standardises, and lists the pairs of competing blocks of a document that a budget separates."""
    competing = (~layout.forced_K).nonzero().squeeze(-1)
    # A block that nothing reads (score 0) counts like the least that something reads: far below, it would be all that
    # the nets look at.
    positive = target_K[target_K > 0]
    least = positive.min() if len(positive) else 0.0
    log_K = torch.log(target_K.clamp_min(least) + TARGET_FLOOR)
    chosen = log_K[competing.to(log_K.device)] if len(competing) else log_K
    spread = chosen.std() if len(chosen) > 1 else torch.ones((), device=log_K.device)
    normal_K = (log_K - chosen.mean()) / (spread + 1e-6)
    pairs = []
    document_K = layout.block_document_K[competing]
    values = target_K.cpu()
    for document in document_K.unique().tolist():
        blocks = competing[document_K == document]
        ordered = blocks[values[blocks].argsort(descending=True)]
        for share in RANK_SHARES:
            count = round(share * len(ordered))
            pairs.append(torch.cartesian_prod(ordered[:count], ordered[count:]).reshape(-1, 2))
    pairs_2P = torch.cat(pairs).T if pairs else torch.zeros(2, 0, dtype=torch.int64)
    return TrainingSet(layout, standardise(predictor, raw_KF), normal_K, pairs_2P.to(raw_KF.device))
