"""Transformers and PEFT with every saved activation in pinned host memory, by torch's own hooks."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.peers.peer import Prepared, Setting, adapted, checkpoint_layers

OPTIONS = {"adapter": "model", "recompute": "layer"}


def prepare(config: Any, setting: Setting, options: dict[str, str]) -> Prepared:
    model = adapted(config, setting, options["adapter"])
    checkpoint_layers(model, options["recompute"])
    pinned = setting.device.startswith("cuda")

    def forward(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autograd.graph.save_on_cpu(pin_memory=pinned):
            return model(**batch).loss

    return Prepared(model, forward, lambda: {"pinned": pinned})
