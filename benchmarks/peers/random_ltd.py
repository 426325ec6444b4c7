"""random-LTD's rule over lemo's generic executor: single rows drawn at random in each layer but the first and last.

Rows that are not drawn pass a layer by unchanged (no bypass) and offer no keys; rows that carry loss may be dropped
like any other. The original raises the share during training; here it stays, as in the middle of such a schedule.
"""

from __future__ import annotations

from typing import Any

import torch

import lemo
from benchmarks.peers.peer import Prepared, Setting, adapted, checkpoint_layers, numbers
from lemo.core.plan import Plan

OPTIONS = {"adapter": "model", "recompute": "none", "keep": "0.5"}


def prepare(config: Any, setting: Setting, options: dict[str, str]) -> Prepared:
    (keep,) = numbers(options, "keep")
    model = adapted(config, setting, options["adapter"])
    checkpoint_layers(model, options["recompute"])
    plan = Plan.uniform(
        model, forward_ratio=keep, backward_ratio=keep, dense_layers=(0, -1), block_size=1, kv="kept", seed=setting.seed
    )
    handle = lemo.attach(model, plan, engine="generic", unsafe_no_bypass=True, self_test=False)
    nothing = torch.zeros(1, setting.tokens, dtype=torch.bool)

    def forward(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with handle.supervised(nothing):  # no row is kept for its loss
            return model(**batch).loss

    return Prepared(model, forward, lambda: {"notes": list(handle.notes)})
