"""lemo attached with a plan that keeps every row: what its engine and its loss cost or save by themselves."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.lemo import attached
from benchmarks.peers.peer import Prepared, Setting, adapted
from lemo.core.plan import Plan

OPTIONS = {"adapter": "model", "recompute": "none", "engine": "fused"}


def prepare(config: Any, setting: Setting, options: dict[str, str]) -> Prepared:
    model = adapted(config, setting, options["adapter"])
    plan = Plan.uniform(model, forward_ratio=1.0, backward_ratio=1.0, block_size=setting.block_size)
    return attached(model, plan, options)
