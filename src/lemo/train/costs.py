"""What a layer of a plan costs, for budgets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lemo.core.plan import LayerPlan, Plan
from lemo.measure.flops import DecoderShape, LayerWork, layer_flops


def layer_cost(model: Any, plan: Plan, tokens: int, lora_rank: int = 0) -> Callable[[LayerPlan], float]:
    """FLOPs of a training step in one layer of a plan, on one sequence; nothing is recomputed.

    Args:
        model: a Transformers model, for its sizes.
        plan: its choices of keys and gradient.
        tokens: of the sequence.
        lora_rank: of adapters on all linear maps.
    """
    shape = DecoderShape.from_config(model.config.get_text_config())

    def cost(layer: LayerPlan) -> float:
        work = LayerWork(
            forward_ratio=layer.forward_ratio,
            backward_ratio=layer.backward_ratio,
            kv="all" if plan.kv == "all" else "kept",
            gradient=plan.gradient,  # type: ignore[arg-type]
            mlp_ratio=layer.mlp_ratio,
            bypass_rank=0 if layer.bypass is None or layer.forward_ratio == 1 else layer.bypass.rank,
            lora_rank=lora_rank,
            context_window=plan.context_window,
            block_size=plan.block_size,
            far_share=plan.far_share,
            local_forward=plan.local_forward,  # type: ignore[arg-type]
        )
        return layer_flops(shape, tokens, work).total

    return cost
