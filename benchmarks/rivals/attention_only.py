"""The fixed rule of the paper's artifact: in the upper half of the layers 40 % of the rows attend, all run the MLP.

Rows are chosen block by block with the plan's predictors (the artifact's own are not published in a form that other
models could use), every loss row competes like any other, and rows that do not attend get no attention update.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from lemo.core.layout import Layout
from lemo.core.plan import LayerPlan, Plan
from lemo.core.policy import select
from lemo.runtime.model import decoder_layers


class _Attending:
    """Stands for the forward of one attention module; runs it on the chosen rows."""

    def __init__(self, attention: Any, planned: LayerPlan, block_size: int) -> None:
        self.attention, self.planned, self.block_size = attention, planned, block_size
        self.inner = attention.forward
        self.stream_BTM: Tensor | None = None

    def watch(self, module: Any, args: tuple, kwargs: dict) -> None:
        """Sees the layer's input, which predictors score."""
        self.stream_BTM = (args[0] if args else kwargs["hidden_states"]).detach()

    def rows(self, hidden_BTM: Tensor) -> Tensor:
        """(B, k) ascending rows that attend."""
        batch, tokens = hidden_BTM.shape[:2]
        layout = Layout.build(
            torch.zeros(batch, tokens, dtype=torch.int64), None, block_size=self.block_size, device=hidden_BTM.device
        )
        with torch.no_grad():
            scores_K = self.planned.predictor.scores(self.stream_BTM.flatten(0, 1), layout)
            ratio = self.planned.forward_ratio
            chosen = select(layout, scores_K, forward_ratio=ratio, backward_ratio=ratio).forward
        if chosen is None:
            return torch.arange(tokens, device=hidden_BTM.device).expand(batch, tokens)
        return chosen.rows_N.view(batch, -1) % tokens

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, **kwargs: Any) -> tuple:
        """Attention of the chosen rows among themselves, zero for the others."""
        if not self.attention.training:
            return self.inner(hidden_states=hidden_states, position_embeddings=position_embeddings, **kwargs)
        rows_Bk = self.rows(hidden_states)
        kwargs["attention_mask"] = None
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = _take(kwargs["position_ids"], rows_Bk)
        if kwargs.get("cache_position") is not None:
            kwargs["cache_position"] = None
        angles = tuple(_take(x, rows_Bk) for x in position_embeddings)
        output, *rest = self.inner(hidden_states=_take(hidden_states, rows_Bk), position_embeddings=angles, **kwargs)
        places = rows_Bk[..., None].expand(-1, -1, output.shape[-1])
        return (torch.zeros_like(hidden_states, dtype=output.dtype).scatter(1, places, output), *rest)


def _take(x_BTX: Tensor, rows_Bk: Tensor) -> Tensor:
    """Rows of a (B or 1, T, ...) tensor: (B, k, ...)."""
    full = x_BTX.expand(rows_Bk.shape[0], *x_BTX.shape[1:])
    return full[torch.arange(len(rows_Bk), device=rows_Bk.device)[:, None], rows_Bk]


@contextmanager
def attention_only(model: Any, plan: Plan) -> Iterator[None]:
    """Inside, layers of the upper half attend with the rows that the plan keeps; evaluation is as ever.

    Args:
        model: a Transformers causal language model, no plan attached to its layers.
        plan: predictors and ratio of every layer.
    """
    layers = decoder_layers(model)
    with ExitStack() as stack:
        for index in range(len(layers) // 2, len(layers)):
            if plan.layers[index].is_dense:
                continue
            attention = layers[index].self_attn
            standing = _Attending(attention, plan.layers[index], plan.block_size)
            hook = layers[index].register_forward_pre_hook(standing.watch, with_kwargs=True)
            stack.callback(hook.remove)
            attention.forward = standing.forward
            stack.callback(attention.__dict__.pop, "forward")
        yield
