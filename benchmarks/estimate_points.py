"""The grid of `benchmarks/estimate.py`: which steps are measured, and which of them constants may be fitted to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from lemo.cli.presets import PRESETS, Preset
from lemo.measure.card import CARDS
from lemo.measure.sizes import ModelSizes, read_sizes
from lemo.measure.step_memory import StepSetting
from lemo.measure.step_time import step_time
from lemo.train.rehearsal import SHAPES, shape_config

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj")
LARGE = ("llama2-7b", "llama3-8b")
# `quality` as it was when the points were measured: with many local loss rows, in a wider window.
SETS = PRESETS | {"quality": Preset("far rows and twice as many local ones", 0.2, 0.4, 2048)}
LONG_TOKENS = 32768
K = 1024
RANK, SHARE, BYPASS_RANK = 8, 0.4, 64
# A mixture that trains in seconds: sizes of a small member of the Qwen3 family, fewer layers.
MIXTURE = {
    "hidden_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "vocab_size": 151936,
}


@dataclass(frozen=True)
class Point:
    """One step.

    Attributes:
        shape: a name of SHAPES, or `mixture`.
        tokens: T; the batch is one sequence.
        recompute: level.
        keep: share of rows that pass gradient, and that run unless `forward` says otherwise; 1 for a dense step.
        kv: keys of skipped rows.
        forward: share that runs; None for `keep`.
        engine: `fused`, `generic` or `plain`.
        layers: run only so many; None for all.
        lora: `qkvo` or `all`.
        preset: what carries loss, its gradient, dense layers and scorer are those of this one of SETS; see `exact`.
            None for `SHARE` of single blocks, two dense layers and predictors.
        offload: what is saved for keys alone waits in host memory; None for no.
    """

    shape: str
    tokens: int
    recompute: str = "none"
    keep: float = 0.5
    kv: str = "kept"
    forward: float | None = None
    engine: str = "fused"
    layers: int | None = None
    lora: str = "qkvo"
    preset: str | None = None
    offload: bool | None = None

    @property
    def key(self) -> str:
        """In the work file and in tables."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items() if value is not None)

    @property
    def is_large(self) -> bool:
        """At least 7B shape and 32K tokens."""
        return self.shape in LARGE and self.tokens >= LONG_TOKENS

    @property
    def forward_ratio(self) -> float:
        """Share of rows that run."""
        return self.keep if self.forward is None else self.forward

    @property
    def loss_share(self) -> float:
        """Share of blocks that carry loss."""
        return SHARE if self.preset is None else SETS[self.preset].loss_share

    @property
    def span(self) -> int | None:
        """Rows of a run of them."""
        return None if self.preset is None else SETS[self.preset].span

    @property
    def local_share(self) -> float:
        """Share of blocks that carry loss besides, and attend within the window."""
        return 0.0 if self.preset is None else SETS[self.preset].local_share

    @property
    def context_window(self) -> int | None:
        """Rows of a chunk that rows without gradient attend within."""
        return None if self.preset is None else SETS[self.preset].context_window

    @property
    def gradient(self) -> Any:
        """Of exact forward."""
        return "rows" if self.preset is None else SETS[self.preset].sparsity["gradient"]

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers that leave nothing out."""
        return (0, -1) if self.preset is None else tuple(SETS[self.preset].sparsity["dense_layers"])

    @property
    def scorer(self) -> str:
        """What ranks blocks."""
        return "predictor" if self.preset is None else "recent"

    def config(self) -> Any:
        """Of the model."""
        if self.shape in SHAPES:
            return shape_config(self.shape, tokens=self.tokens, layers=self.layers)
        from transformers import AutoConfig

        return AutoConfig.for_model("qwen3_moe", max_position_embeddings=self.tokens, use_cache=False, **MIXTURE)

    def setting(self) -> StepSetting:
        """As estimates take it."""
        return StepSetting(
            tokens=self.tokens,
            loss_share=self.loss_share,
            forward_ratio=self.forward_ratio,
            backward_ratio=self.keep,
            kv=self.kv,  # type: ignore[arg-type]
            gradient=self.gradient,
            dense_layers=len(self.dense_layers),
            engine=self.engine,  # type: ignore[arg-type]
            recompute=self.recompute,  # type: ignore[arg-type]
            segmented=self.engine != "plain",
            predictor=self.scorer == "predictor",
            bypass_rank=BYPASS_RANK if self.forward_ratio < 1 else 0,
            offload=bool(self.offload),
            context_window=self.context_window,
            local_share=self.local_share,
            span=self.span,
        )

    def sizes(self) -> ModelSizes:
        """Of model and adapter."""
        return _sizes(self.shape, self.tokens if self.shape == "opt-1.3b" else 0, self.layers, self.lora)

    def estimated_seconds(self) -> float:
        """Rough time on an H200: two steps, kernels that are compiled or chosen, and its part of building a model."""
        return 2 * step_time(self.sizes(), self.setting(), CARDS["h200"]).total_s + 2.5


def exact(shape: str, tokens: int, recompute: str, preset: str = "balanced", **more: Any) -> Point:
    """A point with the ratios of a preset in which every row runs forward."""
    chosen = SETS[preset].sparsity
    ratios = {"keep": chosen["backward_ratio"], "forward": chosen["forward_ratio"]}
    return Point(shape, tokens, recompute, preset=preset, kv="all", **ratios, **more)


@lru_cache(maxsize=64)
def _sizes(shape: str, tokens: int, layers: int | None, lora: str) -> ModelSizes:
    config = Point(shape, tokens or 4 * K, layers=layers).config()
    return read_sizes(config, rank=RANK, targets=targets_of(lora))


def targets_of(lora: str) -> tuple[str, ...]:
    """Modules with an adapter."""
    return ("all-linear",) if lora == "all" else QKVO


def grid() -> list[Point]:
    """All points, those of one model together."""
    return [*_small(), *_opt(), *_large("llama2-7b"), *_large("llama3-8b"), *_mixture(), *_plain()]


def _small() -> list[Point]:
    shape = "smollm2-135m"
    return [
        Point(shape, 4 * K, "none", 0.5, "all", lora="all"),
        Point(shape, 8 * K, "mlp", 0.3, "all", lora="all"),
        exact(shape, 16 * K, "none", lora="all"),
        Point(shape, 16 * K, "layer", 1.0, lora="all"),
        Point(shape, 32 * K, "lin", 0.2, "kept", lora="all"),
        exact(shape, 64 * K, "mlp", lora="all"),
    ]


def _opt() -> list[Point]:
    return [
        Point("opt-1.3b", 4 * K, "none", 0.5),
        Point("opt-1.3b", 8 * K, "lin", 1.0),
        Point("opt-1.3b", 16 * K, "mlp", 0.3, "all"),
        Point("opt-1.3b", 32 * K, "layer", 0.5),
    ]


def _large(shape: str) -> list[Point]:
    """Whole models up to 32K; eight layers beyond. About half of the points are exact forward, the default."""
    kv, other = ("all", "kept") if shape == "llama3-8b" else ("kept", "all")
    whole = [
        exact(shape, 8 * K, "none"),
        exact(shape, 16 * K, "mlp", offload=True),
        exact(shape, 32 * K, "mlp"),
        exact(shape, 32 * K, "lin", offload=True),
        Point(shape, 8 * K, "none", 0.5, kv),
        Point(shape, 32 * K, "lin", 0.5, kv),
        Point(shape, 32 * K, "layer", 0.3, kv),
    ]
    cut = [
        exact(shape, 32 * K, "none", "quality", layers=8),
        exact(shape, 64 * K, "mlp", layers=8),
        exact(shape, 64 * K, "lin", "quality", offload=True, layers=8),
        exact(shape, 64 * K, "layer", layers=8),
        exact(shape, 128 * K, "mlp", layers=8, offload=True),
        exact(shape, 128 * K, "lin", layers=8),
        Point(shape, 32 * K, "none", 1.0, layers=8),
        Point(shape, 64 * K, "none", 0.5, other, layers=8),
        Point(shape, 64 * K, "lin", 1.0, layers=8),
        Point(shape, 128 * K, "mlp", 0.3, "kept", layers=8),
    ]
    adapted = [
        exact(shape, 32 * K, "mlp", layers=8, lora="all"),
        exact(shape, 64 * K, "lin", layers=8, lora="all", offload=True),
        Point(shape, 64 * K, "layer", 0.5, kv, layers=8, lora="all"),
    ]
    return whole + cut + adapted


def _mixture() -> list[Point]:
    return [
        Point("mixture", 4 * K, "none", 0.5, engine="generic"),
        Point("mixture", 8 * K, "layer", 0.3, engine="generic"),
        Point("mixture", 16 * K, "none", 0.3, engine="generic"),
        Point("mixture", 32 * K, "layer", 0.5, engine="generic"),
    ]


def _plain() -> list[Point]:
    return [
        Point("llama2-7b", 8 * K, "none", 0.5, engine="generic", layers=8),
        Point("llama2-7b", 8 * K, "none", 1.0, engine="plain", layers=8),
        Point("llama2-7b", 32 * K, "layer", 1.0, engine="plain", layers=8),
        Point("llama3-8b", 8 * K, "none", 1.0, engine="plain", layers=8),
        Point("llama3-8b", 16 * K, "layer", 0.5, engine="generic", layers=8),
    ]


def held_out(points: Sequence[Point]) -> frozenset[str]:
    """Keys of the points that no constant is fitted to: every second one of the large ones, and of the others.

    In the order of a hash of their keys, so that nobody chose them.
    """
    found = set()
    for large in (True, False):
        keys = sorted((p.key for p in points if p.is_large == large), key=_hash)
        found |= set(keys[::2])
    return frozenset(found)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
