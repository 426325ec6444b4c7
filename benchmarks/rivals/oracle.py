"""Oracle scorers: what predictors could at best be trained for. They look at attention itself, at great cost."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lemo.core.layout import Layout
from lemo.core.plan import LayerPlan, Plan
from lemo.core.score import Recent, ScoreInputs, Words
from lemo.core.target import target_scores
from lemo.runtime.attach import Handle
from lemo.runtime.model import causal_model, decoder_layers

QUERY_STRIDE = 16
GRADIENTS = ("gradient", "gradient_same")
FIRST_LAYER = "first_layer"  # not an oracle: one predictor for all layers
RECENT_BLOCKS = 8  # before a block with loss, of `recent_random`
ASKED_SHARE = 0.06  # of the blocks, of `words_random`
CHAINED_ROUNDS = 3  # of `words_chained`


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
    if target in WITHOUT_MODEL or target == FIRST_LAYER:
        first = next((x.predictor for x in plan.layers if not x.is_dense), None)
        shared: Any = FirstLayer(first) if target == FIRST_LAYER else WITHOUT_MODEL[target]()
        return replace(plan, layers=tuple(x if x.is_dense else replace(x, predictor=shared) for x in plan.layers))
    if target in GRADIENTS:
        return replace(plan, layers=tuple(x if x.is_dense else replace(x, predictor=Remembered()) for x in plan.layers))
    layers = decoder_layers(model)
    changed = [
        x if x.is_dense else replace(x, predictor=Oracle(model, layers[i], target))  # type: ignore[arg-type]
        for i, x in enumerate(plan.layers)
    ]
    return replace(plan, layers=tuple(changed))


@dataclass(frozen=True)
class FirstLayer:
    """Stands where a plan has a predictor: the first layer that skips ranks blocks for all.

    Attributes:
        predictor: its own.
    """

    predictor: Any

    def scores(self, x_NM: Tensor, layout: Layout) -> Tensor:
        """(K,) fp32 scores of blocks, those of the layer that asks first."""
        return layout.once("first layer", lambda: self.predictor.scores(x_NM, layout)).to(x_NM.device)


class RecentAndRandom:
    """Stands where a plan has a predictor: a few blocks before those with loss, then random ones, for all layers."""

    def scores(self, x_NM: Tensor, layout: Layout) -> Tensor:
        """(K,) fp32 scores of blocks, drawn once a batch."""

        def draw() -> Tensor:
            recent_K = Recent().scores(ScoreInputs(layout))
            return torch.where(recent_K >= -RECENT_BLOCKS, 2 + recent_K / RECENT_BLOCKS, torch.rand(len(recent_K)))

        return layout.once("recent and random", draw).to(x_NM.device)


class WordsAndRandom:
    """Stands where a plan has a predictor: questions and what they ask for, then random blocks, for all layers."""

    def scores(self, x_NM: Tensor, layout: Layout) -> Tensor:
        """(K,) fp32 scores of blocks, drawn once a batch: a share of `ASKED_SHARE` is ranked, the others are drawn."""

        def draw() -> Tensor:
            drawn_K = torch.rand(len(layout.block_start_K))
            first = Words().scores(ScoreInputs(layout)).argsort(descending=True)[: round(ASKED_SHARE * len(drawn_K))]
            drawn_K[first] = 2 - torch.arange(len(first)) / len(drawn_K)
            return drawn_K

        return layout.once("words and random", draw).to(x_NM.device)


class WordsAnswered:
    """Stands where a plan has a predictor: blocks that share rare words with the question or its answer."""

    def scores(self, x_NM: Tensor, layout: Layout) -> Tensor:
        """(K,) fp32 scores of blocks."""
        return Words(answered=True).scores(ScoreInputs(layout)).to(x_NM.device)


class WordsChained:
    """Stands where a plan has a predictor: blocks that share rare words with the question, and with what it finds."""

    def scores(self, x_NM: Tensor, layout: Layout) -> Tensor:
        """(K,) fp32 scores of blocks."""
        return Words(rounds=CHAINED_ROUNDS).scores(ScoreInputs(layout)).to(x_NM.device)


WITHOUT_MODEL = {
    "recent_random": RecentAndRandom,
    "words_random": WordsAndRandom,
    "words_answered": WordsAnswered,
    "words_chained": WordsChained,
}


@dataclass
class Remembered:
    """Stands where a plan has a predictor; ranks blocks by the gradient that `look_at_gradient` found.

    Attributes:
        norms_N: fp32, squared norm of the dense gradient behind the layer, of each row of the batch that comes next.
    """

    norms_N: Tensor | None = None

    def scores(self, x_NM: Tensor, layout: Layout) -> Tensor:
        """(K,) fp32 scores of blocks; all alike in evaluation, where no gradient was looked at."""
        inside_N = layout.block_of_row_N >= 0
        found_K = torch.zeros(len(layout.block_start_K), device=x_NM.device)
        if self.norms_N is None or len(self.norms_N) != len(inside_N):
            return found_K
        return found_K.index_add_(0, layout.block_of_row_N[inside_N], self.norms_N.to(x_NM.device)[inside_N])


def look_at_gradient(model: Any, handle: Handle, batch: Mapping[str, Any], same: bool) -> None:
    """A dense forward and backward of a batch, for the norms that the plan's layers are to rank blocks by.

    Gradients of parameters stay as they are.

    Args:
        model: attached, training.
        handle: of the plan, whose layers have a `Remembered` each.
        batch: of the model.
        same: all layers rank by the mean of their shares, so that they keep the same rows.
    """
    plan, parameters = handle.plan, [p for p in model.parameters() if p.requires_grad]
    kept = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None  # else backward adds to what is kept
    norms: dict[int, Tensor] = {}

    def watch(number: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            stream = output[0] if isinstance(output, tuple) else output
            stream.register_hook(lambda grad: norms.__setitem__(number, grad.float().square().sum(-1).flatten()))

        return hook

    layers = decoder_layers(causal_model(model))
    hooks = [layer.register_forward_hook(watch(number)) for number, layer in enumerate(layers)]
    try:
        handle.plan = replace(plan, layers=tuple(LayerPlan() for _ in plan.layers), scorer="random")
        model(**batch).loss.backward()
    finally:
        handle.plan = plan
        for hook in hooks:
            hook.remove()
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
    shares = {i: n / n.sum().clamp_min(1e-30) for i, n in norms.items()}
    mean_N = torch.stack(list(shares.values())).mean(0)
    for number, layer in enumerate(plan.layers):
        if isinstance(layer.predictor, Remembered):
            layer.predictor.norms_N = mean_N if same else shares[number]


def forget_gradient(plan: Plan) -> None:
    """What a look found is of its batch alone."""
    for layer in plan.layers:
        if isinstance(layer.predictor, Remembered):
            layer.predictor.norms_N = None
