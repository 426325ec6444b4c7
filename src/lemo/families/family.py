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
    """

    model_type: str
    mlp: tuple[str, ...] = ("mlp",)
    mlp_down: str | None = "mlp.down_proj"
    tiny: Mapping[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    attention: str = "sdpa"

    def tiny_config(self, **overrides: Any) -> Any:
        """A Transformers configuration of a random model small enough for a test."""
        from transformers import AutoConfig

        arguments = {k: v for k, v in _TINY.items() if k not in self.drop} | dict(self.tiny) | overrides
        return AutoConfig.for_model(self.model_type, **arguments)
