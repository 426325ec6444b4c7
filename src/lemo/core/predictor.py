"""Pattern predictors: two small nets on block embeddings whose product estimates block-pair scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lemo.core.bypass import RMS_EPS
from lemo.core.layout import Layout
from lemo.errors import ConfigError
from lemo.ops import pool_blocks, score_blocks
from lemo.ops.pool_blocks.reference import POOLS, Blocks, pool_rows_reference, rows_of_blocks
from lemo.ops.score_blocks.reference import suffix_mean_reference

POSITION_FEATURES = 3
LOSS_FEATURES = 2


class PatternPredictor(nn.Module):
    """Estimates the score of every key block from the residual stream, without an attention matrix.

    Rows are RMS-normalised and projected (M to F), pooled over each block, and standardised. A Q net and a K net, three
    linear maps each with ReLU between, turn a block's features into R numbers. The score of the pair (query block m,
    key block n) is Q_m·K_n / sqrt(R); that of key block n is its mean over the query blocks m >= n of its document.
    The product is bilinear, so that mean is taken over the Q net's outputs and no K x K map is formed.

    Parameters are fp32 and frozen; calibration unfreezes what it trains. Scores have the unit of the target that they
    were trained on (standardised per layer), so only their order and a threshold in the same unit mean anything.

    *Cost*: 2·M·F FLOPs a row and about 4·(F·W + W² + W·R) a block; nothing is saved for backward. On a GPU scoring is
    three launches. *Numerics*: there, 16-bit rows are multiplied by the projection in their own dtype and added up in
    fp32; all else is fp32.

    Args:
        width: M.
        pooled_features: F.
        query_widths: sizes of the Q net's two hidden layers.
        key_widths: sizes of the K net's two hidden layers.
        rank: R.
        pools: how projected rows of a block become one vector, each adds F features.
        position: whether the place of the block in its document is a feature.
        loss_distance: whether it is one how far the next block with loss is.
    """

    def __init__(
        self,
        width: int,
        *,
        pooled_features: int = 128,
        query_widths: Sequence[int] = (64, 64),
        key_widths: Sequence[int] = (64, 64),
        rank: int = 32,
        pools: Sequence[str] = POOLS,
        position: bool = True,
        loss_distance: bool = False,
    ) -> None:
        """Draws random maps from torch's global generator.

        Raises:
            ConfigError: an unknown or repeated pool, or a size below 1.
        """
        super().__init__()
        sizes = [width, pooled_features, rank, *query_widths, *key_widths]
        if len(query_widths) != 2 or len(key_widths) != 2 or min(sizes) < 1:
            raise ConfigError(f"predictor sizes must be positive, two hidden widths per net; got {sizes}")
        if not pools or set(pools) - set(POOLS) or len(set(pools)) != len(pools):
            raise ConfigError(f"predictor pools must be of {', '.join(POOLS)}, each once, got {list(pools)}")
        self.width, self.pooled_features, self.rank = width, pooled_features, rank
        self.query_widths, self.key_widths = tuple(query_widths), tuple(key_widths)
        self.pools, self.position, self.loss_distance = tuple(pools), position, loss_distance
        inputs = pooled_features * len(self.pools) + self.place_features
        self.projection_MF = nn.Parameter(torch.randn(width, pooled_features) / width**0.5)
        self.feature_mean = nn.Parameter(torch.zeros(inputs))
        self.feature_scale = nn.Parameter(torch.ones(inputs))
        self.query_net = _net(inputs, self.query_widths, rank)
        self.key_net = _net(inputs, self.key_widths, rank)
        self.requires_grad_(False)

    @property
    def place_features(self) -> int:
        """How many features say where a block is; they come last."""
        return POSITION_FEATURES * self.position + LOSS_FEATURES * self.loss_distance

    def config(self) -> dict[str, Any]:
        """Keyword arguments that build a predictor of this shape; JSON types only."""
        # Left out where it is not in use: versions before it read such plans.
        asked = {"loss_distance": True} if self.loss_distance else {}
        return asked | {
            "width": self.width,
            "pooled_features": self.pooled_features,
            "query_widths": list(self.query_widths),
            "key_widths": list(self.key_widths),
            "rank": self.rank,
            "pools": list(self.pools),
            "position": self.position,
        }

    def parameter_count(self) -> int:
        """Numbers that make up this predictor: projection, standardisation and both nets."""
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def pool_blocks(self, x_NM: Tensor, layout: Layout) -> Tensor:
        """Standardised features of every block: (K, inputs) fp32 on the device of `x_NM`. No host synchronisation."""
        raw_KF = self.raw_features(x_NM, layout)
        return (raw_KF - self.feature_mean) * self.feature_scale

    @torch.no_grad()
    def raw_features(self, x_NM: Tensor, layout: Layout) -> Tensor:
        """Features before standardisation: pooled projections, then place in the document. (K, inputs) fp32.

        The predictor moves to the device of `x_NM` the first time that it sees it.
        """
        if self.projection_MF.device != x_NM.device:
            self.to(x_NM.device)
        device = x_NM.device
        features_KE = pool_blocks(
            x_NM.detach(),
            self._projection_for(x_NM),
            _blocks_of(layout, device),
            pools=self.pools,
            extra_KE=self._places(layout, device),
            eps=RMS_EPS,
        )
        return features_KE.float()

    def _places(self, layout: Layout, device: torch.device) -> Tensor | None:
        """Features of where a block is, (K, `place_features`) fp32; None without."""
        found = [block_positions(layout, device)] if self.position else []
        found += [loss_distances(layout, device)] if self.loss_distance else []
        if len(found) == 2:
            return layout.once(("places", device), lambda: torch.cat(found, -1))
        return found[0] if found else None

    def _projection_for(self, x_NM: Tensor) -> Tensor:
        """The projection as the op wants it: the kernel multiplies in the dtype of the rows. Converted once."""
        weight = self.projection_MF
        if not x_NM.is_cuda or x_NM.dtype.itemsize != 2:
            return weight
        version = 0 if weight.is_inference() else weight._version
        key = (x_NM.dtype, weight.device, weight.data_ptr(), version)
        kept = self.__dict__.get("_projection_copy")
        if kept is None or kept[0] != key:
            kept = self.__dict__["_projection_copy"] = (key, weight.detach().to(x_NM.dtype))
        return kept[1]

    @torch.no_grad()
    def scores(self, x_NM: Tensor, layout: Layout) -> Tensor:
        """Score of every block as a key: (K,) fp32 on the device of `x_NM`.

        Args:
            x_NM: (N, M) layer input, any floating dtype; N = B·T rows of the layout.
            layout: documents and blocks of the batch.
        """
        return score_blocks(
            self.raw_features(x_NM, layout),
            (self.feature_mean, self.feature_scale),
            _maps(self.query_net),
            _maps(self.key_net),
            _suffix_ends(layout, x_NM.device),
        )

    def scores_of_features(self, features_KF: Tensor, layout: Layout) -> Tensor:
        """Scores from standardised features, differentiable in the nets: (K,)."""
        query_KR = suffix_mean(self.query_net(features_KF), layout)
        return (query_KR * self.key_net(features_KF)).sum(-1) / self.rank**0.5

    def pair_scores(self, features_KF: Tensor) -> Tensor:
        """Explicit map of estimated pair scores, (query block, key block), for study and tests: (K, K)."""
        return self.query_net(features_KF) @ self.key_net(features_KF).T / self.rank**0.5


def _net(inputs: int, widths: Sequence[int], rank: int) -> nn.Sequential:
    """Three linear maps with ReLU between."""
    first, second = widths
    return nn.Sequential(
        nn.Linear(inputs, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, rank)
    )


def _maps(net: nn.Sequential) -> tuple[Tensor, ...]:
    """Weight and bias of each linear map of a net, in order."""
    return tuple([t for layer in net._modules.values() for t in layer._parameters.values()])  # type: ignore


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, without waiting for it (pageable memory is staged before the call returns)."""
    return tensor.to(device, non_blocking=True)


def pool_rows(value_NF: Tensor, layout: Layout, pool: str) -> Tensor:
    """Mean, max or log-mean-exp of rows over each block: (K, F), dtype and device of `value_NF`. Deterministic."""
    device = value_NF.device
    members = layout.once(("rows of blocks", device), lambda: rows_of_blocks(_blocks_of(layout, device)))
    return pool_rows_reference(value_NF, members, pool)


def _blocks_of(layout: Layout, device: torch.device) -> Blocks:
    """Where the blocks lie, on the device; copied once per batch."""
    return layout.once(
        ("blocks", device),
        lambda: Blocks(
            to_device(layout.block_start_K, device), to_device(layout.block_length_K, device), layout.block_size
        ),
    )


def block_positions(layout: Layout, device: torch.device) -> Tensor:
    """Place of each block in its document: share of the way, log distance from its start and its end. (K, 3) fp32."""
    return layout.once(("block positions", device), lambda: _block_positions(layout, device))


def _block_positions(layout: Layout, device: torch.device) -> Tensor:
    document_K = layout.block_document_K
    blocks_D = torch.bincount(document_K, minlength=len(layout.document_start_D))
    first_D = torch.cumsum(blocks_D, 0) - blocks_D
    before_K = (torch.arange(len(document_K)) - first_D[document_K]).float()
    total_K = blocks_D[document_K].float()
    after_K = total_K - 1 - before_K
    features = torch.stack([before_K / total_K, torch.log1p(before_K), torch.log1p(after_K)], -1)
    return to_device(features, device)


def loss_distances(layout: Layout, device: torch.device) -> Tensor:
    """Log distance in blocks to the next block with loss of the document, and whether there is one. (K, 2) fp32.

    A block with loss is at distance 0; without one behind it a block is as far as the document has blocks.
    """
    return layout.once(("loss distances", device), lambda: to_device(_loss_distances(layout), device))


def _loss_distances(layout: Layout) -> Tensor:
    blocks = len(layout.block_document_K)
    place_K = torch.arange(blocks)
    next_K = torch.where(layout.supervised_K.cpu(), place_K, blocks).flip(0).cummin(0).values.flip(0)
    blocks_D = torch.bincount(layout.block_document_K, minlength=len(layout.document_start_D))
    total_K, end_K = blocks_D[layout.block_document_K], _document_ends(layout)
    there_K = next_K < end_K
    distance_K = torch.where(there_K, next_K - place_K, total_K)
    return torch.stack([torch.log1p(distance_K.float()), there_K.float()], -1)


def suffix_mean(value_KR: Tensor, layout: Layout) -> Tensor:
    """Mean of rows n, n+1, ... to the end of n's document: (K, R). Sums run in fp64: documents stay apart."""
    return suffix_mean_reference(value_KR, _suffix_ends(layout, value_KR.device))


def _suffix_ends(layout: Layout, device: torch.device) -> Tensor:
    """Index behind the last block of each block's document: (K,) int64."""
    return layout.once(("suffix ends", device), lambda: to_device(_document_ends(layout), device))


def _document_ends(layout: Layout) -> Tensor:
    blocks_D = torch.bincount(layout.block_document_K, minlength=len(layout.document_start_D))
    return torch.cumsum(blocks_D, 0)[layout.block_document_K]
