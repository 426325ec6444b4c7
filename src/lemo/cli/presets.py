"""Named sets of options: how much a run skips, and what that is known to cost.

The numbers are from one study (SmolLM2-135M, books, 8K to 16K tokens, LoRA, 30 steps, one seed): validation loss of the
dense model afterwards, in nats above dense LoRA with loss on every row. They wait for a study of several seeds, domains
and models; nothing else depends on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Preset:
    """One set of options.

    Attributes:
        about: what it does and what it cost where it was measured, in one line.
        forward_ratio: share of rows that run a layer.
        backward_ratio: share of rows that pass gradient.
        loss_share: share of blocks of plain text that carry loss.
        kv: whether skipped rows offer keys and values; `grouped` where enough query heads share them to make it cheap.
        bypass_rank: rank of what skipped rows get instead of a layer; of no effect where every row runs forward.
    """

    about: str
    forward_ratio: float
    backward_ratio: float
    loss_share: float
    kv: Literal["all", "kept", "grouped"]
    bypass_rank: int


PRESETS: dict[str, Preset] = {
    "quality": Preset("every row runs forward, so the loss is exact; cost 0.010 nats", 1.0, 0.5, 0.4, "all", 64),
    "balanced": Preset("half of the rows skip a layer; cost 0.012 nats", 0.5, 0.5, 0.4, "grouped", 64),
    "fast": Preset("seven rows of ten skip a layer; cost 0.027 nats with kv: all", 0.3, 0.3, 0.2, "grouped", 64),
}

# Query heads per key head from which keys and values of skipped rows are cheap beside the rest of a layer.
CHEAP_GROUPS = 4
