"""Oracle scorers: what predictors could at best be trained for. They look at attention itself, at great cost.

Each target scores key blocks from P, the attention probability (mean over heads) that sampled query rows send to key
blocks: (Q, K). Today's predictors learn `mass`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lemo.core.layout import Layout
from lemo.core.plan import Plan
from lemo.core.score import Interaction, ScoreInputs
from lemo.runtime.model import decoder_layers

QUERY_STRIDE = 4
LOCAL_BLOCKS = 2  # a peak closer than this is attention to neighbours, which every block gets
_SLICE_BYTES = 1 << 28


@dataclass(frozen=True)
class Traced:
    """Queries, keys and values of one document.

    Attributes:
        query_HTD, key_GTD, value_GTD: after RoPE.
        supervised_T: rows that carry loss.
        block_size: C.
        scaling: factor on q·k.
    """

    query_HTD: Tensor
    key_GTD: Tensor
    value_GTD: Tensor
    supervised_T: Tensor
    block_size: int
    scaling: float

    def strided(self, rows_Q: Tensor | None = None) -> Tensor:
        """Every n-th of some query rows (all when None), the last among them."""
        tokens = self.query_HTD.shape[1]
        rows_Q = torch.arange(tokens, device=self.query_HTD.device) if rows_Q is None else rows_Q
        return rows_Q[(len(rows_Q) - 1) % QUERY_STRIDE :: QUERY_STRIDE]

    def mass(self, rows_Q: Tensor, weights_GT: Tensor | None = None) -> Tensor:
        """P: (Q, K) fp32 probability that query rows send to blocks, times a weight of each key row if given."""
        heads, tokens, _ = self.query_HTD.shape
        groups = self.key_GTD.shape[0]
        blocks = -(-tokens // self.block_size)
        padding = blocks * self.block_size - tokens
        keys_GTD, place_T = self.key_GTD.float(), torch.arange(tokens, device=rows_Q.device)
        found = []
        for part_q in rows_Q.split(max(1, _SLICE_BYTES // (4 * heads * tokens))):
            query = self.query_HTD[:, part_q].float().reshape(groups, -1, self.query_HTD.shape[-1])
            logits = (query @ keys_GTD.transpose(1, 2)).view(heads, len(part_q), tokens) * self.scaling
            p_HqT = logits.masked_fill_(place_T > part_q[:, None], -torch.inf).softmax(-1)
            if weights_GT is not None:
                p_HqT = p_HqT * weights_GT.repeat_interleave(heads // groups, 0)[:, None]
            found.append(F.pad(p_HqT.mean(0), (0, padding)).unflatten(1, (blocks, self.block_size)).sum(-1))
        return torch.cat(found)


def _per_seeing_query(total_K: Tensor, rows_Q: Tensor, block_size: int) -> Tensor:
    """Sums divided by the number of query rows that may see each block."""
    start_K = torch.arange(len(total_K), device=total_K.device) * block_size
    return total_K / (rows_Q[:, None] >= start_K).sum(0).clamp_min(1)


def mass(traced: Traced) -> Tensor:
    """Mean over the query rows that may see a block."""
    rows_Q = traced.strided()
    return _per_seeing_query(traced.mass(rows_Q).sum(0), rows_Q, traced.block_size)


def mass_loss_rows(traced: Traced) -> Tensor:
    """The same over query rows that carry loss: what the loss itself reads."""
    rows_Q = traced.strided(traced.supervised_T.nonzero().squeeze(-1))
    if len(rows_Q) == 0:
        return mass(traced)
    return _per_seeing_query(traced.mass(rows_Q).sum(0), rows_Q, traced.block_size)


def mass_detrended(traced: Traced) -> Tensor:
    """Mass over what uniform attention would give: takes the place in the document out."""
    rows_Q, size = traced.strided(), traced.block_size
    found_QK = traced.mass(rows_Q)
    start_K = torch.arange(found_QK.shape[1], device=rows_Q.device) * size
    seen_QK = (rows_Q[:, None] + 1 - start_K).clamp(0, size)
    return found_QK.sum(0) / (seen_QK / (rows_Q[:, None] + 1)).sum(0).clamp_min(1e-9)


def mass_times_value(traced: Traced) -> Tensor:
    """Mass of rows times the norm of their value, over queries that may see the block."""
    rows_Q = traced.strided()
    weights_GT = traced.value_GTD.float().norm(dim=-1)
    return _per_seeing_query(traced.mass(rows_Q, weights_GT).sum(0), rows_Q, traced.block_size)


def mass_peak(traced: Traced) -> Tensor:
    """Largest mean mass that any distant query block sends: a block that few need, but badly, ranks high."""
    rows_Q, size = traced.strided(), traced.block_size
    found_QK = traced.mass(rows_Q)
    blocks = found_QK.shape[1]
    query_Q = rows_Q // size
    sums_KK = found_QK.new_zeros(blocks, blocks).index_add_(0, query_Q, found_QK)
    means_KK = sums_KK / torch.bincount(query_Q, minlength=blocks).clamp_min(1)[:, None]
    place_K = torch.arange(blocks, device=rows_Q.device)
    near_KK = place_K[:, None] - place_K < LOCAL_BLOCKS
    return means_KK.masked_fill(near_KK, 0.0).amax(0)


MASS_TARGETS: dict[str, Callable[[Traced], Tensor]] = {
    "mass": mass,
    "mass_loss_rows": mass_loss_rows,
    "mass_detrended": mass_detrended,
    "mass_times_value": mass_times_value,
    "mass_peak": mass_peak,
}


@dataclass(frozen=True)
class Oracle:
    """Stands where a plan has a predictor; looks at the layer's own queries, keys and values.

    Attributes:
        model: a Llama-like model.
        layer: its decoder layer.
        target: a name of MASS_TARGETS, or `interaction`.
    """

    model: Any
    layer: nn.Module
    target: str

    @torch.no_grad()
    def scores(self, x_NM: Tensor, layout: Layout) -> Tensor:
        """(K,) fp32 scores of blocks."""
        query, key, value, scaling = self._project(x_NM, layout)
        if self.target == "interaction":
            return Interaction().scores(ScoreInputs(layout, query_HND=query, key_GND=key, scaling=scaling))
        supervised_N = layout.supervised_K.to(x_NM.device)[layout.block_of_row_N.clamp_min(0)]
        found = []
        for start, length in zip(layout.document_start_D.tolist(), layout.document_length_D.tolist(), strict=True):
            rows = slice(start, start + length)
            parts = (query[:, rows], key[:, rows], value[:, rows], supervised_N[rows])
            found.append(MASS_TARGETS[self.target](Traced(*parts, layout.block_size, scaling)))
        return torch.cat(found)

    def _project(self, x_NM: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor, float]:
        attention = self.layer.self_attn
        hidden_1NM = self.layer.input_layernorm(x_NM)[None]
        size = attention.head_dim
        query, key, value = (
            projection(hidden_1NM).unflatten(-1, (-1, size)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        angles = self.model.base_model.rotary_emb(hidden_1NM, layout.position_of_row_N[None])
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        query, key = rotate(query, key, *angles)
        return query[0], key[0], value[0], float(attention.scaling)


def with_oracle(plan: Plan, model: Any, target: str) -> Plan:
    """The plan with an oracle in the place of every predictor."""
    layers = decoder_layers(model)
    changed = [
        x if x.is_dense else replace(x, predictor=Oracle(model, layers[i], target))  # type: ignore[arg-type]
        for i, x in enumerate(plan.layers)
    ]
    return replace(plan, layers=tuple(changed))
