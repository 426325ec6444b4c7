"""What lemo must know of an architecture, as data. One small file per family states the names that differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class LayerNames:
    """Where the parts of a pre-norm decoder layer are, for the fused engine: dotted names from the layer.

    The layer must compute x + m·attention(norm(x)), then x + m·mlp(norm(x)), with causal softmax attention.

    Attributes:
        norms: the norm before attention, then the one before the MLP.
        norm: `rms` for x/rms(x)·weight, `layer` for LayerNorm.
        inputs: linear maps to queries, keys and values; one name where a single map makes all three, in this order.
        output: linear map of the attention's output.
        head_norms: RMS norms of queries and keys over a head, before RoPE; empty for none.
        gates: linear maps into the MLP: gate and up, one name where a single map makes both, or the only one of an
            MLP without gate.
        gated: whether the MLP is act(gate)·up.
        down: linear map out of the MLP.
        multiplier: attribute of the layer that scales both updates; None for 1.
        final_norm: dotted name, from the decoder, of the norm before the head; None where more than it lies between.
    """

    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    norm: str = "rms"
    inputs: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    head_norms: tuple[str, ...] = ()
    gates: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    gated: bool = True
    down: str = "mlp.down_proj"
    multiplier: str | None = None
    final_norm: str | None = "norm"


@dataclass(frozen=True)
class Family:
    """Names inside one decoder layer, and the configuration of a tiny model for the laws.

    Attributes:
        model_type: `config.model_type` in Transformers.
        mlp: attribute names of the modules that make up the MLP, first to last; one name where it is a module of its
            own. Empty where the MLP cannot have rows of its own.
        mlp_down: dotted name, from the layer, of the linear map whose input is the MLP's intermediate activation.
        tiny: arguments of the configuration class that differ from the common tiny ones.
        drop: common tiny arguments that the configuration class does not know.
        attention: the implementation that the laws use as the dense model's own.
        names: parts of a layer that the fused engine can run; None for the generic executor only.
        also: further model types that Transformers runs with the same classes.
    """

    model_type: str
    mlp: tuple[str, ...] = ("mlp",)
    mlp_down: str | None = "mlp.down_proj"
    tiny: Mapping[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    attention: str = "sdpa"
    names: LayerNames | None = None
    also: tuple[str, ...] = ()

    def tiny_config(self, **overrides: Any) -> Any:
        """A Transformers configuration of a random model small enough for a test."""
        from transformers import AutoConfig

        arguments = {k: v for k, v in _TINY.items() if k not in self.drop} | dict(self.tiny) | overrides
        return AutoConfig.for_model(self.model_type, **arguments)
