"""Named sets of options: how many rows carry loss, and how far most of them see.

docs/quality.md says what each costs where that was measured, docs/decisions/0016-the-default.md why they are these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lemo.config import ANSWER_CONTEXT_WINDOW


@dataclass(frozen=True)
class Preset:
    """One set of options. Every row runs forward, rows with loss pass gradient, and nothing is calibrated.

    Attributes:
        about: what it does, in one line.
        loss_share: share of blocks of plain text that are far loss rows: they attend to all rows.
        local_share: share of blocks that carry loss and pass gradient besides, but attend as rows without gradient do.
        context_window: rows of a chunk that rows without gradient attend within.
        answer_window: the same where answers alone are learned.
        span: rows of a run of blocks with loss.
    """

    about: str
    loss_share: float
    local_share: float
    context_window: int
    answer_window: int = ANSWER_CONTEXT_WINDOW
    span: int = 1024

    @property
    def sparsity(self) -> dict[str, Any]:
        """Keys of a recipe's section `sparsity`, but for what the data decides."""
        return {
            "forward_ratio": 1.0,
            "backward_ratio": self.loss_share,
            "scorer": "recent",
            "dense_layers": [],
            "gradient": "keys",
            "context_window": self.context_window,
        }


PRESETS: dict[str, Preset] = {
    "quality": Preset("every row runs forward, half of them carry loss and attend to all rows", 0.5, 0.0, 1024),
    "balanced": Preset(
        "every row runs forward, three of eight carry loss, one of them attends to all rows", 0.12, 0.25, 1024
    ),
    "fast": Preset(
        "every row runs forward, two of ten carry loss, one in five of them attends to all rows", 0.04, 0.15, 512, 512
    ),
}
