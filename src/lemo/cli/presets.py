"""Named sets of options: how much a run leaves out.

docs/quality.md says what each costs where that was measured, docs/decisions/0016-the-default.md why they are these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Preset:
    """One set of options.

    Attributes:
        about: what it does, in one line.
        forward_ratio: share of rows that run a layer.
        backward_ratio: share of rows that pass gradient, local loss rows not counted.
        loss_share: share of blocks of plain text that are far loss rows: they attend to all rows.
        span: rows of a run of such blocks.
        gradient: of exact forward.
        kv: whether skipped rows offer keys and values.
        dense_layers: layers that never skip.
        bypass_rank: rank of what skipped rows get instead of a layer; of no effect where every row runs forward.
        context_window: rows of a chunk that rows without gradient attend within; None for all keys.
        local_share: share of blocks that carry loss and pass gradient besides, but attend as rows without gradient do.
    """

    about: str
    forward_ratio: float
    backward_ratio: float
    loss_share: float
    span: int
    gradient: Literal["rows", "pairs", "keys"]
    kv: Literal["all", "kept"]
    dense_layers: tuple[int, ...]
    bypass_rank: int
    context_window: int | None = None
    local_share: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether every row runs forward: nothing has to be calibrated."""
        return self.forward_ratio == 1


PRESETS: dict[str, Preset] = {
    "quality": Preset(
        "every row runs forward, six of ten carry loss, two of them attend to all rows",
        1.0, 0.2, 0.2, 1024, "keys", "all", (), 64, 2048, 0.4,
    ),
    "balanced": Preset(
        "every row runs forward, three of eight carry loss, one of them attends to all rows",
        1.0, 0.12, 0.12, 1024, "keys", "all", (), 64, 1024, 0.25,
    ),
    "fast": Preset(
        "every row runs forward, two of ten carry loss, one in five of them attends to all rows",
        1.0, 0.04, 0.04, 1024, "keys", "all", (), 64, 512, 0.15,
    ),
}  # fmt: skip
