"""Transformers and PEFT as they come."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.peer import Prepared, Setting, adapted, checkpoint_layers, plain_forward

OPTIONS = {"adapter": "float32", "recompute": "none"}


def prepare(config: Any, setting: Setting, options: dict[str, str]) -> Prepared:
    model = adapted(config, setting, options["adapter"])
    checkpoint_layers(model, options["recompute"])
    return Prepared(model, plain_forward(model))
