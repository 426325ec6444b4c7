"""Oracle scorers: what predictors could at best be trained for. They look at attention itself, at great cost."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lemo.core.layout import Layout
from lemo.core.plan import Plan
from lemo.core.score import ScoreInputs
from lemo.core.target import target_scores
from lemo.runtime.model import decoder_layers

QUERY_STRIDE = 4


@dataclass(frozen=True)
class Oracle:
    """Stands where a plan has a predictor; looks at the layer's own queries, keys and values.

    Attributes:
        model: a Llama-like model.
        layer: its decoder layer.
        target: a name of `lemo.core.target.TARGETS`.
    """

    model: Any
    layer: nn.Module
    target: str

    @torch.no_grad()
    def scores(self, x_NM: Tensor, layout: Layout) -> Tensor:
        """(K,) fp32 scores of blocks."""
        query, key, value, scaling = self._project(x_NM, layout)
        inputs = ScoreInputs(layout, query_HND=query, key_GND=key, scaling=scaling, value_GND=value)
        return target_scores(self.target, inputs, QUERY_STRIDE).block_K

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
