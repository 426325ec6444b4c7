"""Elastic size transformation: drop predictor neurons that are mostly zero after ReLU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lemo.core.predictor import PatternPredictor
from lemo.errors import ConfigError

NETS = ("query_net", "key_net")
HIDDEN = (0, 2)


class NeuronCensus:
    """Counts how often each hidden neuron of a predictor's nets is zero after ReLU, over the blocks that pass by.

    Keyed by (net, layer index in the net). Counts on the device; `zero_share` moves them to the CPU.
    """

    def __init__(self, predictor: PatternPredictor) -> None:
        """Starts at zero for every hidden neuron of `predictor`."""
        self.zeros = {
            (net, index): torch.zeros(getattr(predictor, net)[index].out_features, dtype=torch.float64)
            for net in NETS
            for index in HIDDEN
        }
        self.blocks = 0

    @torch.no_grad()
    def add(self, predictor: PatternPredictor, features_KF: Tensor) -> None:
        """Counts one batch of standardised features (K, inputs)."""
        for net in NETS:
            value = features_KF
            for index, module in enumerate(getattr(predictor, net)):
                value = module(value)
                if index - 1 in HIDDEN:
                    self.zeros[net, index - 1] = self.zeros[net, index - 1].to(value.device) + (value <= 0).sum(0)
        self.blocks += features_KF.shape[0]

    def zero_share(self) -> dict[tuple[str, int], Tensor]:
        """Share of blocks at which each neuron was zero: (neurons,) fp64 on the CPU per hidden layer."""
        return {key: (count / max(self.blocks, 1)).cpu() for key, count in self.zeros.items()}


def size_share(pruned: PatternPredictor, original: PatternPredictor) -> float:
    """Parameters of `pruned`, projection included, over those of `original`."""
    return pruned.parameter_count() / original.parameter_count()


def prune(predictor: PatternPredictor, census: NeuronCensus, target_share: float) -> PatternPredictor:
    """A smaller predictor of about `target_share` of the size; the given one is not changed.

    Hidden neurons leave in the order of how often they are zero. Projection columns, which have no ReLU, leave in the
    order of how little the remaining neurons read from them (norm of the first maps' weights, on standardised
    features). Both are cut to the same share of their number, the largest that meets the target.

    Args:
        predictor: the predictor to shrink.
        census: zero counts of its hidden neurons.
        target_share: parameters to keep, in (0, 1].

    Raises:
        ConfigError: the target is outside (0, 1], or the census has seen no block.
    """
    return prune_with_inputs(predictor, census, target_share)[0]


def prune_with_inputs(
    predictor: PatternPredictor, census: NeuronCensus, target_share: float
) -> tuple[PatternPredictor, Tensor]:
    """As `prune`, and the ascending indices of the features that the smaller predictor still reads."""
    if not 0 < target_share <= 1:
        raise ConfigError(f"prune target must lie in (0, 1], got {target_share!r}")
    if census.blocks == 0:
        raise ConfigError("neurons can only be pruned after blocks were counted")
    goal = int(target_share * predictor.parameter_count())
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if _sized(predictor, middle).parameter_count() <= goal else (low, middle)
    share = 1.0 if target_share == 1 else low
    return _cut(predictor, census.zero_share(), share)


def _kept(count: int, share: float) -> int:
    """How many of `count` remain; never none."""
    return max(1, round(count * share))


def _sized(predictor: PatternPredictor, share: float) -> PatternPredictor:
    """A predictor whose widths are cut to `share`, weights not set; without storage."""
    config = dict(predictor.config())
    config["pooled_features"] = _kept(predictor.pooled_features, share)
    for key in ("query_widths", "key_widths"):
        config[key] = [_kept(width, share) for width in getattr(predictor, key)]
    with torch.device("meta"):
        return PatternPredictor(**config)


def _cut(
    predictor: PatternPredictor, zero_share: dict[tuple[str, int], Tensor], share: float
) -> tuple[PatternPredictor, Tensor]:
    """Copies the surviving neurons and columns."""
    pruned = _sized(predictor, share).to_empty(device=predictor.projection_MF.device)
    neurons = {
        key: zeros.argsort(stable=True)[: _kept(len(zeros), share)].sort().values.to(predictor.projection_MF.device)
        for key, zeros in zero_share.items()
    }
    first_maps = [getattr(predictor, net)[0].weight[neurons[net, 0]] for net in NETS]
    reading_F = torch.stack(
        [part.square().sum(0) for weight in first_maps for part in _pool_parts(predictor, weight)]
    ).sum(0)
    columns = reading_F.argsort(descending=True, stable=True)[: pruned.pooled_features].sort().values
    inputs = torch.cat([columns + index * predictor.pooled_features for index in range(len(predictor.pools))])
    if predictor.place_features:
        place = torch.arange(predictor.place_features, device=columns.device)
        inputs = torch.cat([inputs, place + len(predictor.pools) * predictor.pooled_features])
    with torch.no_grad():
        pruned.projection_MF.copy_(predictor.projection_MF[:, columns])
        pruned.feature_mean.copy_(predictor.feature_mean[inputs])
        pruned.feature_scale.copy_(predictor.feature_scale[inputs])
        for net in NETS:
            into = inputs
            for index in (*HIDDEN, HIDDEN[-1] + 2):
                source: nn.Linear = getattr(predictor, net)[index]
                out = neurons.get((net, index), torch.arange(source.out_features, device=into.device))
                target: nn.Linear = getattr(pruned, net)[index]
                target.weight.copy_(source.weight[out][:, into])
                target.bias.copy_(source.bias[out])
                into = out
    return pruned, inputs


def _pool_parts(predictor: PatternPredictor, weight: Tensor) -> list[Tensor]:
    """Columns of a first map that read each pool: a (neurons, F) part per pool."""
    width = predictor.pooled_features
    return [weight[:, index * width : (index + 1) * width] for index in range(len(predictor.pools))]
