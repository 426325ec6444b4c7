"""Targets: what a predictor may learn to rank blocks by, each seen in the layer's own queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lemo.core.layout import Layout
from lemo.core.predictor import pool_rows, to_device
from lemo.core.score import AttentionMass, Interaction, ScoreInputs, given, logit_slices, strided
from lemo.errors import ConfigError

LOG_FLOOR = 1e-9
LOCAL_BLOCKS = 2  # a peak closer than this is attention to neighbours, which every block gets
INTERACTION_FLOOR = 0.01  # of a head's mean: rows whose every product is negative


@dataclass(frozen=True)
class TargetScores:
    """What a target says of one batch.

    Attributes:
        block_K: (K,) fp32 >= 0, what predictors learn.
        row_NH: (N, H) fp32 logarithm of each row's score by head, per query that may see the row; predictors learn from
            it which directions of a row tell.
        known_N: (N,) bool, rows whose score says something: some query that counts may see them.
    """

    block_K: Tensor
    row_NH: Tensor
    known_N: Tensor


class Target(Protocol):
    """Scores blocks and rows by looking at attention itself."""

    def scores(self, inputs: ScoreInputs, query_stride: int = 1, limit_bytes: int = 1 << 28) -> TargetScores:
        """Needs `query_HND`, `key_GND` and `scaling`.

        Args:
            inputs: of one layer.
            query_stride: look at every n-th query row only.
            limit_bytes: most memory that one slice of probabilities takes.
        """
        ...


@dataclass(frozen=True)
class MassTarget:
    """Attention probability that lands in a block: mean over heads and over the query rows that may see the block.

    Attributes:
        loss_rows: query rows of supervised blocks only, whose rows are what the loss reads; all rows in documents that
            have none.
        detrended: over what uniform attention would give, which takes the place in the document out.
        by_value: probabilities are multiplied by the norm of the row's value.
    """

    loss_rows: bool = False
    detrended: bool = False
    by_value: bool = False

    def scores(self, inputs: ScoreInputs, query_stride: int = 1, limit_bytes: int = 1 << 28) -> TargetScores:
        """As `Target.scores`; needs `value_GND` too when `by_value`."""
        layout = inputs.layout
        if self.loss_rows:
            row_HN = self._loss_row_mass(inputs, query_stride, limit_bytes)
        else:
            row_HN = AttentionMass(query_stride, limit_bytes).row_mass(inputs)
        if self.by_value:
            norm_GN = given(inputs.value_GND, "value_GND", "mass_times_value").float().norm(dim=-1)
            row_HN = row_HN * norm_GN.repeat_interleave(len(row_HN) // len(norm_GN), 0)
        device = row_HN.device
        seen_N, seen_strided_N = (self._seen(layout, stride).to(device) for stride in (1, query_stride))
        length_K = to_device(layout.block_length_K, device)
        total_K = pool_rows(row_HN.mean(0)[:, None], layout, "mean")[:, 0] * length_K
        if self.detrended:
            seen_K = pool_rows(seen_strided_N[:, None], layout, "mean")[:, 0] * length_K
        else:
            seen_K = seen_strided_N[to_device(layout.block_start_K, device)]
        document_N = layout.document_of_row_N.clamp_min(0)
        # A row that few queries see would have a score made of noise: the last rows of a document.
        least_D = torch.full((len(layout.document_length_D),), float(layout.block_size))
        least_D = least_D / layout.document_length_D if self.detrended else least_D
        rate_HN = row_HN / torch.maximum(seen_N, least_D.to(device)[document_N])
        known_N = (seen_N > 0) & (layout.document_of_row_N >= 0)
        block_K = total_K / seen_K.clamp_min(1e-9 if self.detrended else 1)
        return TargetScores(block_K, torch.log(rate_HN + LOG_FLOOR).T, known_N)

    def _queries(self, layout: Layout) -> Iterator[tuple[slice, Tensor]]:
        """Flat rows of each document and, inside it, the query rows that count; on the host."""
        supervised_K = layout.supervised_K
        block_N = layout.block_of_row_N.cpu()
        for start, length in zip(layout.document_start_D.tolist(), layout.document_length_D.tolist(), strict=True):
            rows = slice(start, start + length)
            counted = supervised_K[block_N[rows]].nonzero().squeeze(-1) if self.loss_rows else None
            if counted is None or len(counted) == 0:
                counted = torch.arange(length)
            yield rows, counted

    def _seen(self, layout: Layout, stride: int) -> Tensor:
        """(N,) fp32 on the CPU: counted query rows that see each row, or their uniform attention to it."""
        seen_N = torch.zeros(layout.batch * layout.tokens)
        for rows, counted in self._queries(layout):
            weight_T = torch.zeros(rows.stop - rows.start, dtype=torch.float64)
            taken = strided(counted, stride)
            weight_T[taken] = 1 / (taken.double() + 1) if self.detrended else 1.0
            seen_N[rows] = weight_T.flip(0).cumsum(0).flip(0).float()
        return seen_N

    def _loss_row_mass(self, inputs: ScoreInputs, query_stride: int, limit_bytes: int) -> Tensor:
        """(H, N) probability that each row receives from the counted query rows."""
        query, key, scaling = _attention(inputs, "mass_loss_rows")
        mass_HN = torch.zeros(query.shape[:2], device=query.device)
        for rows, counted in self._queries(inputs.layout):
            taken = strided(counted, query_stride).to(query.device)
            for _, logits_HqT in logit_slices(query[:, rows], key[:, rows], scaling, taken, limit_bytes):
                mass_HN[:, rows] += logits_HqT.softmax(-1).sum(1)
        return mass_HN


@dataclass(frozen=True)
class PeakTarget:
    """Largest mean probability that any distant query block sends: a block that few need, but badly, ranks high."""

    def scores(self, inputs: ScoreInputs, query_stride: int = 1, limit_bytes: int = 1 << 28) -> TargetScores:
        """As `Target.scores`. Blocks without a distant query block score 0 and their rows are not known."""
        query, key, scaling = _attention(inputs, "mass_peak")
        layout, device = inputs.layout, query.device
        size = layout.block_size
        row_HN = torch.zeros(query.shape[:2], device=device)
        known_N = torch.zeros(query.shape[1], dtype=torch.bool, device=device)
        found = []
        for start, length in zip(layout.document_start_D.tolist(), layout.document_length_D.tolist(), strict=True):
            rows, blocks = slice(start, start + length), -(-length // size)
            peak_K = torch.zeros(blocks, device=device)
            for query_q, mean_HqT in _query_blocks(
                query[:, rows], key[:, rows], scaling, (size, query_stride), limit_bytes
            ):
                place_T = torch.arange(length, device=device) // size
                mean_HqT = mean_HqT.masked_fill(query_q[:, None] - place_T < LOCAL_BLOCKS, 0.0)
                row_HN[:, rows] = torch.maximum(row_HN[:, rows], mean_HqT.amax(1))
                sums_qK = mean_HqT.new_zeros(len(query_q), blocks).index_add_(1, place_T, mean_HqT.mean(0))
                peak_K = torch.maximum(peak_K, sums_qK.amax(0))
            known_N[start : start + max(0, blocks - LOCAL_BLOCKS) * size] = True
            found.append(peak_K)
        block_K = torch.cat(found) if found else row_HN.new_zeros(0)
        return TargetScores(block_K, torch.log(row_HN + LOG_FLOOR).T, known_N)


@dataclass(frozen=True)
class InteractionTarget:
    """The paper's informativeness of blocks; of rows, the mean over later query rows of max(q·k·scaling, 0)."""

    def scores(self, inputs: ScoreInputs, query_stride: int = 1, limit_bytes: int = 1 << 28) -> TargetScores:
        """As `Target.scores`; blocks are scored from all query rows whatever the stride."""
        query, key, scaling = _attention(inputs, "interaction")
        layout = inputs.layout
        rate_HN = torch.zeros(query.shape[:2], device=query.device)
        for start, length in zip(layout.document_start_D.tolist(), layout.document_length_D.tolist(), strict=True):
            rows = slice(start, start + length)
            place_T = torch.arange(length, device=query.device)
            taken = strided(place_T, query_stride)
            for _, logits_HqT in logit_slices(query[:, rows], key[:, rows], scaling, taken, limit_bytes):
                rate_HN[:, rows] += logits_HqT.clamp_min_(0).sum(1)
            rate_HN[:, rows] /= ((length - place_T) / query_stride).clamp_min(layout.block_size / query_stride)
        known_N = layout.document_of_row_N >= 0
        floor_H1 = INTERACTION_FLOOR * rate_HN.sum(1, keepdim=True) / known_N.sum().clamp_min(1) + LOG_FLOOR
        return TargetScores(Interaction().scores(inputs), torch.log(rate_HN + floor_H1).T, known_N)


TARGETS: dict[str, Target] = {
    "attention_mass": MassTarget(),
    "mass_loss_rows": MassTarget(loss_rows=True),
    "mass_detrended": MassTarget(detrended=True),
    "mass_times_value": MassTarget(by_value=True),
    "mass_peak": PeakTarget(),
    "interaction": InteractionTarget(),
}


def target_scores(name: str, inputs: ScoreInputs, query_stride: int = 1) -> TargetScores:
    """Scores of a target by its name.

    Raises:
        ConfigError: unknown name, or inputs that the target needs are missing.
    """
    if name not in TARGETS:
        raise ConfigError(f"target must be one of {', '.join(TARGETS)}, got {name!r}")
    return TARGETS[name].scores(inputs, query_stride)


def _attention(inputs: ScoreInputs, target: str) -> tuple[Tensor, Tensor, float]:
    """Queries, keys and scaling, which must be there."""
    query, key = given(inputs.query_HND, "query_HND", target), given(inputs.key_GND, "key_GND", target)
    return query, key, given(inputs.scaling, "scaling", target)


def _query_blocks(
    query_HTD: Tensor, key_GTD: Tensor, scaling: float, step: tuple[int, int], limit_bytes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Numbers (q,) of some query blocks and the mean probability (H, q, T) that their strided rows send.

    `step` is the block size and the stride of query rows.
    """
    size, stride = step
    heads, length = query_HTD.shape[:2]
    rows_Q = strided(torch.arange(length, device=query_HTD.device), stride)
    blocks = -(-length // size)
    per_slice = max(1, limit_bytes // (4 * heads * length * -(-size // stride)))
    for first in range(0, blocks, per_slice):
        part = rows_Q[(rows_Q >= first * size) & (rows_Q < (first + per_slice) * size)]
        if len(part) == 0:
            continue
        count = min(per_slice, blocks - first)
        sums = query_HTD.new_zeros(heads, count, length, dtype=torch.float32)
        for place, logits_HqT in logit_slices(query_HTD, key_GTD, scaling, part, limit_bytes):
            sums.index_add_(1, place // size - first, logits_HqT.softmax(-1))
        rows_q = torch.bincount(part // size - first, minlength=count)
        yield first + torch.arange(count, device=part.device), sums / rows_q.clamp_min(1)[:, None]
