"""Pattern predictors: two small nets on block embeddings whose product estimates block-pair scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lemo.core.bypass import rms_normalise
from lemo.core.layout import Layout
from lemo.errors import ConfigError

POOLS = ("mean", "max", "lse")
POSITION_FEATURES = 3


class PatternPredictor(nn.Module):
    """Estimates the score of every key block from the residual stream, without an attention matrix.

    Rows are RMS-normalised and projected (M to F), pooled over each block, and standardised. A Q net and a K net, three
    linear maps each with ReLU between, turn a block's features into R numbers. The score of the pair (query block m,
    key block n) is Q_m·K_n / sqrt(R); that of key block n is its mean over the query blocks m >= n of its document.
    The product is bilinear, so that mean is taken over the Q net's outputs and no K x K map is formed.

    Parameters are fp32 and frozen; calibration unfreezes what it trains. Scores have the unit of the target that they
    were trained on (standardised per layer), so only their order and a threshold in the same unit mean anything.

    *Cost*: 2·M·F FLOPs a row and about 4·(F·W + W² + W·R) a block; nothing is saved for backward.

    Args:
        width: M.
        pooled_features: F.
        query_widths: sizes of the Q net's two hidden layers.
        key_widths: sizes of the K net's two hidden layers.
        rank: R.
        pools: how projected rows of a block become one vector, each adds F features.
        position: whether the place of the block in its document is a feature.
    """

    ROWS_AT_ONCE = 32768

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
    ) -> None:
        """Draws random maps from torch's global generator.

        Raises:
            ConfigError: an unknown pool, or a size below 1.
        """
        super().__init__()
        sizes = [width, pooled_features, rank, *query_widths, *key_widths]
        if len(query_widths) != 2 or len(key_widths) != 2 or min(sizes) < 1:
            raise ConfigError(f"predictor sizes must be positive, two hidden widths per net; got {sizes}")
        if not pools or set(pools) - set(POOLS):
            raise ConfigError(f"predictor pools must be of {', '.join(POOLS)}, got {list(pools)}")
        self.width, self.pooled_features, self.rank = width, pooled_features, rank
        self.query_widths, self.key_widths = tuple(query_widths), tuple(key_widths)
        self.pools, self.position = tuple(pools), position
        inputs = pooled_features * len(self.pools) + (POSITION_FEATURES if position else 0)
        self.projection_MF = nn.Parameter(torch.randn(width, pooled_features) / width**0.5)
        self.feature_mean = nn.Parameter(torch.zeros(inputs))
        self.feature_scale = nn.Parameter(torch.ones(inputs))
        self.query_net = _net(inputs, self.query_widths, rank)
        self.key_net = _net(inputs, self.key_widths, rank)
        self.requires_grad_(False)

    def config(self) -> dict[str, Any]:
        """Keyword arguments that build a predictor of this shape; JSON types only."""
        return {
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
        projected_NF = torch.cat(
            [rms_normalise(part) @ self.projection_MF for part in x_NM.detach().split(self.ROWS_AT_ONCE)]
        )
        features = [pool_rows(projected_NF, layout, pool) for pool in self.pools]
        if self.position:
            features.append(block_positions(layout, x_NM.device))
        return torch.cat(features, -1)

    @torch.no_grad()
    def scores(self, x_NM: Tensor, layout: Layout) -> Tensor:
        """Score of every block as a key: (K,) fp32 on the device of `x_NM`.

        Args:
            x_NM: (N, M) layer input, any floating dtype; N = B·T rows of the layout.
            layout: documents and blocks of the batch.
        """
        return self.scores_of_features(self.pool_blocks(x_NM, layout), layout)

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


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, without waiting for it (pageable memory is staged before the call returns)."""
    return tensor.to(device, non_blocking=True)


def pool_rows(value_NF: Tensor, layout: Layout, pool: str) -> Tensor:
    """Mean, max or log-mean-exp of rows over each block: (K, F), dtype and device of `value_NF`. Deterministic."""
    device = value_NF.device
    rows_KC, inside_KC, length_K1 = layout.once(("rows of blocks", device), lambda: _rows_of_blocks(layout, device))
    rows_KCF = value_NF[rows_KC]
    if pool == "max":
        # Rows past a short block's end repeat its last row, which leaves the maximum alone.
        return rows_KCF.amax(1)
    if pool == "lse":
        return rows_KCF.masked_fill(~inside_KC[..., None], -torch.inf).logsumexp(1) - torch.log(length_K1.float())
    return (rows_KCF * inside_KC[..., None]).sum(1) / length_K1


def _rows_of_blocks(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of each block (K, C), the last one repeated past a short block's end; which are real; and lengths (K, 1)."""
    start_K1 = to_device(layout.block_start_K, device)[:, None]
    length_K1 = to_device(layout.block_length_K, device)[:, None]
    offset_1C = torch.arange(layout.block_size, device=device)[None]
    return start_K1 + torch.minimum(offset_1C, length_K1 - 1), offset_1C < length_K1, length_K1


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


def suffix_mean(value_KR: Tensor, layout: Layout) -> Tensor:
    """Mean of rows n, n+1, ... to the end of n's document: (K, R). Sums run in fp64: documents stay apart."""
    device = value_KR.device
    end_K, count_K = layout.once(("suffixes", device), lambda: _suffixes(layout, device))
    before = torch.cumsum(value_KR.double(), 0)
    before = torch.cat([before.new_zeros(1, before.shape[1]), before])
    total = before[end_K] - before[:-1]
    return (total / count_K[:, None]).to(value_KR.dtype)


def _suffixes(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Behind the last block of each block's document, and how many blocks lie from there back to it: (K,) and (K,)."""
    document_K = layout.block_document_K
    blocks_D = torch.bincount(document_K, minlength=len(layout.document_start_D))
    end_K = to_device(torch.cumsum(blocks_D, 0)[document_K], device)
    return end_K, end_K - torch.arange(len(document_K), device=device)
