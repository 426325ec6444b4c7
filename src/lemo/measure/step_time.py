"""Time of a training step from sizes and a card's rates: products, attention, and what only moves memory."""

from __future__ import annotations

from dataclasses import dataclass

from lemo.measure.card import Card
from lemo.measure.flops import (
    LayerWork,
    again_attention_flops,
    backward_attention_flops,
    forward_attention_flops,
    head_flops,
    layer_flops,
)
from lemo.measure.fused_memory import takes_keys
from lemo.measure.layer_rows import LayerRows
from lemo.measure.sizes import ModelSizes
from lemo.measure.step_memory import StepSetting, layer_rows

# Times that the row of a layer (its width, and that of its MLP) is read or written outside products and attention:
# norms, residuals, activation and rotation, forward and backward.
ROW_PASSES = {"fused": (26, 9), "generic": (60, 14), "plain": (48, 14)}
# The rectangles of attention on all keys, and what lies between them, reach this share of compact attention.
ALL_KEYS_SHARE = 0.8
# An adapter reads its input and writes into its output once more, in both directions.
ADAPTER_PASSES = 5


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they are spent on."""

    products_s: float
    attention_s: float
    memory_s: float
    launch_s: float

    @property
    def total_s(self) -> float:
        """All of it. Starting work hides behind work that takes longer."""
        return max(self.products_s + self.attention_s + self.memory_s, self.launch_s)

    @property
    def waits(self) -> bool:
        """Whether the device waits for work to be started."""
        return self.launch_s > self.products_s + self.attention_s + self.memory_s


def step_time(sizes: ModelSizes, setting: StepSetting, card: Card) -> StepTime:
    """Time of one step.

    Args:
        sizes: of model and adapter.
        setting: the step.
        card: where it runs.
    """
    products = attention = memory = 0.0
    for rows in layer_rows(sizes, setting):
        found = _layer(sizes, setting, rows, card)
        products, attention, memory = products + found[0], attention + found[1], memory + found[2]
    loss_rows = setting.loss_rows if setting.segmented else setting.rows
    products += head_flops(sizes.shape, loss_rows).total / card.matmul
    logits = loss_rows * sizes.shape.vocabulary
    memory += logits * (4 * sizes.element_bytes if setting.segmented else 40) / card.bandwidth
    again = 1.3 if setting.recompute == "layer" else 1.0
    launch = card.launch_s * sizes.shape.layers * again * (1.0 if setting.engine != "generic" else 1.6)
    return StepTime(products, attention, memory, launch)


def forward_time(sizes: ModelSizes, tokens: int, card: Card) -> float:
    """Seconds of a dense forward of one sequence, with the logits of all its rows in segments, as evaluation has it.

    Args:
        sizes: of model and adapter.
        tokens: length of the sequence.
        card: where it runs.
    """
    shape, work = sizes.shape, LayerWork()
    pairs = forward_attention_flops(shape, tokens, work)
    linear = layer_flops(shape, tokens, work).forward - pairs
    if sizes.experts is not None:
        linear *= 1.0 + _experts_over_one(sizes)
    passes = ROW_PASSES["plain"]
    numbers = tokens * (passes[0] * shape.width + passes[1] * shape.ffn) / 2  # of both directions, one
    layer = linear / card.matmul + pairs / card.attention_forward + numbers * sizes.element_bytes / card.bandwidth
    logits = 2 * tokens * shape.vocabulary * sizes.element_bytes / card.bandwidth
    head = head_flops(shape, tokens).forward / card.matmul + logits
    return max(shape.layers * layer + head, card.launch_s * shape.layers / 2)


def _layer(sizes: ModelSizes, setting: StepSetting, rows: LayerRows, card: Card) -> tuple[float, float, float]:
    """Seconds of products, attention and memory of one layer."""
    tokens, batch, shape = setting.tokens, setting.batch, sizes.shape
    stream = rows.stream
    work = LayerWork(
        forward_ratio=rows.queries / stream,
        backward_ratio=(min(rows.back, rows.queries) - rows.local) / stream,
        kv="all" if rows.split else "kept",
        gradient="pairs" if rows.pairs else "keys" if rows.exact and rows.keys else "rows",
        recompute=setting.recompute,
        bypass_rank=setting.bypass_rank if rows.bypass and rows.loss is None else 0,
        context_window=setting.context_window,
        block_size=setting.block_size,
        far_share=setting.far_share,
        local_ratio=rows.local / stream,
        local_forward=setting.local_forward,
        remakes_keys=rows.offers and not takes_keys(rows, setting.recompute, setting.offload),
    )
    flops = layer_flops(shape, tokens, work)
    forward, backward, again = (
        find(shape, tokens, work) for find in (forward_attention_flops, backward_attention_flops, again_attention_flops)
    )
    linear = flops.total - forward - backward - again
    if sizes.experts is not None:
        linear *= 1.0 + _experts_over_one(sizes)
    slow = ALL_KEYS_SHARE if rows.split else 1.0
    attention = (forward + again) / card.attention_forward + backward / card.attention_backward
    ranks = (*sizes.adapter.inputs, sizes.adapter.output, *sizes.adapter.gates, sizes.adapter.down)
    adapted = sum(1 for rank in ranks if rank) / max(1, len(ranks))
    passes = ROW_PASSES[setting.engine]
    numbers = passes[0] * shape.width + passes[1] * shape.ffn
    numbers += ADAPTER_PASSES * adapted * (4 * shape.width + 3 * shape.ffn)
    memory = batch * tokens * work.forward_ratio * numbers * sizes.element_bytes / card.bandwidth
    return batch * linear / card.matmul, batch * attention / slow, memory


def _experts_over_one(sizes: ModelSizes) -> float:
    """Work of all experts of a token over that of a layer with one of them, less one."""
    assert sizes.experts is not None
    one = sum(a * b for name, (a, b) in sizes.shape.linears.items() if name in ("gate", "up", "down"))
    all_maps = sum(a * b for a, b in sizes.shape.linears.values())
    return (sizes.experts.chosen - 1) * one / all_maps
