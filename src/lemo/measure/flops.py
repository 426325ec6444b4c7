"""FLOPs of a training step by arithmetic: dense, with skipped rows, with exact forward. Needs a config, no weights.

Multiply-adds count two. Norms, activations, RoPE, the embedding and the optimizer are left out. The base is frozen:
the backward pass of a linear map costs as much as its forward (no weight gradient). Attention's backward costs 2.5
times its forward (five products against two, as flash kernels do it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lemo.errors import ConfigError

ATTENTION_BACKWARD = 2.5
RECOMPUTE_LEVELS = ("none", "mlp", "lin", "layer")
_UNGATED = {"opt", "gpt2", "gpt_neox", "gptj", "starcoder2", "phi", "falcon", "bloom", "nemotron"}


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder: L layers, width M, ffn width F, H query heads, G kv heads, head dim D, V vocabulary.

    Attributes:
        gated: whether the MLP has a gate beside the up projection.
    """

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    gated: bool = True

    @classmethod
    def from_config(cls, config: Any) -> DecoderShape:
        """Reads a Hugging Face config (or any object with its attributes).

        Raises:
            ConfigError: a size that the config does not state.
        """
        width = _first(config, "hidden_size", "n_embd")
        heads = _first(config, "num_attention_heads", "n_head")
        ffn = _first(config, "intermediate_size", "ffn_dim", "n_inner", default=4 * width)
        return cls(
            layers=_first(config, "num_hidden_layers", "n_layer"),
            width=width,
            ffn=ffn,
            heads=heads,
            kv_heads=_first(config, "num_key_value_heads", default=heads),
            head_dim=_first(config, "head_dim", default=width // heads),
            vocabulary=_first(config, "vocab_size"),
            gated=getattr(config, "model_type", "") not in _UNGATED,
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear map of a layer."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        maps = {"q": (self.width, query), "k": (self.width, key), "v": (self.width, key), "o": (query, self.width)}
        if self.gated:
            maps["gate"] = (self.width, self.ffn)
        return {**maps, "up": (self.width, self.ffn), "down": (self.ffn, self.width)}


def _first(config: Any, *names: str, default: int | None = None) -> int:
    for name in names:
        if (value := getattr(config, name, None)) is not None:
            return int(value)
    if default is None:
        raise ConfigError(f"the config states none of {', '.join(names)}")
    return default


@dataclass(frozen=True)
class LayerWork:
    """What one layer does in a step. The default is a dense layer that saves everything.

    Attributes:
        forward_ratio: share of rows that run.
        backward_ratio: share of rows that pass gradient.
        kv: whether rows that skip still offer keys and values (computed once, as constants).
        gradient: where backward rows are fewer: `rows` sends gradient through all their scores, `pairs` only through
            scores between backward rows, `keys` also into the keys and values of all rows that offer them.
        recompute: `none`; `mlp` the inputs of the down projection; `lin` all linear maps; `layer` attention as well.
        mlp_ratio: share of rows that run the MLP; None for forward_ratio.
        bypass_rank: R of the bypass of skipped rows.
        lora_rank: R of adapters on all linear maps; their weight gradients count.
        context_window: rows that run but pass no gradient see the keys of their chunk of so many rows, of the chunk
            before and of the first block; None for all keys.
        block_size: C.
        far_share: share of the far keys that attention's backward reads, where backward rows are fewer.
        local_ratio: share of rows that pass gradient besides, but see the keys of `context_window` only, in both
            directions.
        far_place: mean place in the sequence, 0 to 1, of the rows of `backward_ratio` under a `context_window`: a row
            reads the keys before it. 0.5 for rows spread evenly.
        local_forward: `all` if these rows see all keys in forward, as `Plan.local_forward` has it.
        remakes_keys: levels `lin` and `layer` make keys and values of rows that offer nothing else again, too; not
            where they are constants, or wait in host memory.
    """

    forward_ratio: float = 1.0
    backward_ratio: float = 1.0
    kv: Literal["kept", "all"] = "kept"
    gradient: Literal["rows", "pairs", "keys"] = "rows"
    recompute: Literal["none", "mlp", "lin", "layer"] = "none"
    mlp_ratio: float | None = None
    bypass_rank: int = 0
    lora_rank: int = 0
    context_window: int | None = None
    block_size: int = 64
    far_share: float = 1.0
    local_ratio: float = 0.0
    far_place: float = 0.5
    local_forward: Literal["near", "all"] = "near"
    remakes_keys: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError for ratios outside (0, 1], backward above forward, or an unknown recompute level.

        Also for local rows without a window, or more rows with gradient than rows that run; or an unknown choice of
        what local rows see.
        """
        if not 0 < self.backward_ratio <= self.forward_ratio <= 1:
            raise ConfigError(
                f"ratios must satisfy 0 < backward ({self.backward_ratio}) <= forward ({self.forward_ratio}) <= 1"
            )
        if self.local_ratio < 0 or self.passing_ratio > self.forward_ratio + 1e-9:
            raise ConfigError(
                f"local_ratio ({self.local_ratio}) must not be negative, nor exceed what backward "
                f"({self.backward_ratio}) leaves of forward ({self.forward_ratio})"
            )
        if self.local_ratio and self.context_window is None:
            raise ConfigError("local_ratio needs a context_window, within which such rows attend")
        if not 0 < self.far_place < 1:
            raise ConfigError(f"far_place is a mean place in (0, 1), got {self.far_place}")
        if self.local_forward not in ("near", "all"):
            raise ConfigError(f"local_forward must be near or all, got {self.local_forward!r}")
        if self.recompute not in RECOMPUTE_LEVELS:
            raise ConfigError(f"recompute must be one of {', '.join(RECOMPUTE_LEVELS)}, got {self.recompute!r}")

    @property
    def passing_ratio(self) -> float:
        """Share of rows that pass gradient, wherever they attend."""
        return self.backward_ratio + self.local_ratio

    @property
    def wide_ratio(self) -> float:
        """Share of rows that see all keys in forward, where the others see those of the window."""
        return self.passing_ratio if self.local_forward == "all" else self.backward_ratio

    @property
    def far_keys(self) -> float:
        """Keys that a row of `backward_ratio` reads on average, over those of a row at an even place."""
        return 1.0 if self.context_window is None else 2.0 * self.far_place

    @property
    def wide_keys(self) -> float:
        """The same of the rows of `wide_ratio`; far and local rows together are spread evenly."""
        return 1.0 if self.local_forward == "all" else self.far_keys


@dataclass(frozen=True)
class Flops:
    """FLOPs of one step or layer by phase."""

    forward: float = 0.0
    recompute: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        """All phases together."""
        return self.forward + self.recompute + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.recompute + other.recompute, self.backward + other.backward)


def attention_flops(shape: DecoderShape, tokens: int, query_share: float = 1.0, key_share: float = 1.0) -> float:
    """Forward of causal attention over one sequence, of evenly spread shares of queries and keys."""
    return 2.0 * shape.heads * shape.head_dim * tokens**2 * query_share * key_share


def local_pairs(tokens: int, window: int, block_size: int) -> float:
    """Pairs of a row and a key of its chunk of `window` rows, of the chunk before, or of the sequence's first block."""
    first = min(tokens, 2 * window)
    chunks, rest = divmod(tokens - first, window)
    last = rest * (window + block_size + rest / 2)
    return first**2 / 2 + chunks * window * (1.5 * window + block_size) + last


def local_attention_flops(shape: DecoderShape, tokens: int, work: LayerWork, query_share: float) -> float:
    """Forward of attention within the layer's `context_window`, for a share of rows."""
    if work.context_window is None or query_share == 0:
        return 0.0
    key_share = 1.0 if work.kv == "all" else work.forward_ratio
    pairs = local_pairs(tokens, work.context_window, work.block_size)
    return 4.0 * shape.heads * shape.head_dim * query_share * key_share * pairs


def forward_attention_flops(shape: DecoderShape, tokens: int, work: LayerWork) -> float:
    """Forward of a layer's attention: wide rows see all keys, the others those of the window, if there is one."""
    key_share = 1.0 if work.kv == "all" else work.forward_ratio
    if work.context_window is None:
        return attention_flops(shape, tokens, work.forward_ratio, key_share)
    far = work.wide_keys * attention_flops(shape, tokens, work.wide_ratio, key_share)
    return far + local_attention_flops(shape, tokens, work, work.forward_ratio - work.wide_ratio)


def backward_attention_flops(shape: DecoderShape, tokens: int, work: LayerWork) -> float:
    """Backward of a layer's attention: of backward rows through the keys that it reads, of local rows locally."""
    pairs = work.gradient == "pairs" and work.backward_ratio < work.forward_ratio
    key_share = 1.0 if work.kv == "all" else work.forward_ratio
    far = attention_flops(shape, tokens, work.backward_ratio, work.backward_ratio if pairs else key_share)
    far *= work.far_keys
    local = local_attention_flops(shape, tokens, work, work.local_ratio)
    return ATTENTION_BACKWARD * (read_in_backward(tokens, work) * far + local)


def again_attention_flops(shape: DecoderShape, tokens: int, work: LayerWork) -> float:
    """Attention that backward computes again, of all rows that pass gradient."""
    if work.recompute != "layer":
        return 0.0
    key_share = 1.0 if work.kv == "all" else work.forward_ratio
    far = work.wide_keys * attention_flops(shape, tokens, work.wide_ratio, key_share)
    return far + local_attention_flops(shape, tokens, work, work.passing_ratio - work.wide_ratio)


def read_in_backward(tokens: int, work: LayerWork) -> float:
    """Share of the pairs of a backward row and a key that attention's backward reads."""
    if work.far_share == 1 or work.backward_ratio == work.forward_ratio or work.gradient == "pairs":
        return 1.0
    from lemo.ops.attend_rows.far import FAR_STRIPE

    near = local_pairs(tokens, FAR_STRIPE, 0) / (tokens**2 / 2)
    return near + work.far_share * (1 - near)


def layer_flops(shape: DecoderShape, tokens: int, work: LayerWork) -> Flops:
    """One layer on one sequence of `tokens` tokens."""
    forward_rows, backward_rows = work.forward_ratio * tokens, work.passing_ratio * tokens
    mlp_share = 1.0 if work.mlp_ratio is None else min(1.0, work.mlp_ratio / work.forward_ratio)
    row = {name: _linear(sizes, work.lora_rank) for name, sizes in shape.linears.items()}
    row_backward = {name: _linear_backward(sizes, work.lora_rank) for name, sizes in shape.linears.items()}
    for name in ("gate", "up", "down"):
        if name in row:
            row[name] *= mlp_share
            row_backward[name] *= mlp_share
    forward = forward_rows * sum(row.values()) + forward_attention_flops(shape, tokens, work)
    if work.kv == "all":
        forward += (tokens - forward_rows) * (row["k"] + row["v"])
    skipped = tokens - forward_rows
    bypass = 4.0 * shape.width * work.bypass_rank * skipped
    backward = backward_rows * sum(row_backward.values())
    backward += backward_attention_flops(shape, tokens, work)
    offering = (tokens if work.kv == "all" else forward_rows) - backward_rows
    if work.gradient == "keys" and work.backward_ratio < work.forward_ratio:
        backward += offering * (row_backward["k"] + row_backward["v"])
    again = {"none": (), "mlp": ("gate", "up"), "lin": tuple(row), "layer": tuple(row)}[work.recompute]
    recompute = backward_rows * sum(row.get(name, 0.0) for name in again)
    if work.remakes_keys and work.recompute in ("lin", "layer"):
        recompute += offering * (row["k"] + row["v"])
    recompute += again_attention_flops(shape, tokens, work)
    return Flops(forward + bypass, recompute, backward + bypass)


def _linear(sizes: tuple[int, int], lora_rank: int) -> float:
    """Forward of a linear map and its adapter on one row."""
    return 2.0 * math.prod(sizes) + 2.0 * lora_rank * sum(sizes)


def _linear_backward(sizes: tuple[int, int], lora_rank: int) -> float:
    """Input gradient of both, weight gradient of the adapter, on one row."""
    return 2.0 * math.prod(sizes) + 4.0 * lora_rank * sum(sizes)


def head_flops(shape: DecoderShape, rows: float) -> Flops:
    """A frozen head on the rows that carry loss: logits and their input gradient."""
    once = 2.0 * shape.width * shape.vocabulary * rows
    return Flops(forward=once, backward=once)


def step_flops(shape: DecoderShape, tokens: int, layers: Sequence[LayerWork], loss_share: float = 1.0) -> Flops:
    """A training step on one sequence.

    Args:
        shape: the decoder.
        tokens: length of the sequence.
        layers: work of each layer.
        loss_share: share of rows that carry loss.

    Raises:
        ConfigError: not one LayerWork per layer.
    """
    if len(layers) != shape.layers:
        raise ConfigError(f"{len(layers)} layers of work for a decoder with {shape.layers} layers")
    total = head_flops(shape, loss_share * tokens)
    for work in layers:
        total += layer_flops(shape, tokens, work)
    return total


def ideal_gain(
    shape: DecoderShape,
    tokens: int,
    work: LayerWork,
    *,
    dense_layers: int = 2,
    baseline_recompute: Literal["none", "mlp", "lin", "layer"] = "layer",
) -> float:
    """How many times fewer FLOPs a step does than the dense step, were every FLOP equally fast.

    Args:
        shape: the decoder.
        tokens: length of the sequence.
        work: of each layer that skips.
        dense_layers: layers that run densely, with the recompute level of `work`.
        baseline_recompute: of the dense step.
    """
    dense = LayerWork(recompute=work.recompute, lora_rank=work.lora_rank)
    baseline = LayerWork(recompute=baseline_recompute, lora_rank=work.lora_rank)
    ours = [dense] * dense_layers + [work] * (shape.layers - dense_layers)
    return step_flops(shape, tokens, [baseline] * shape.layers).total / step_flops(shape, tokens, ours).total
