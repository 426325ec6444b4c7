"""Calibration windows: batches as they are given, and what they can teach."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lemo.config import CalibrationConfig
from lemo.errors import ConfigError, DataError


@dataclass(frozen=True)
class Window:
    """One batch of tokens that calibration looks at.

    Attributes:
        input_ids_BT: (B, T) int64.
        supervised_BT: (B, T) bool, or None for no supervised rows.
        attention_mask_BT: (B, T), or None for no padding.
        position_ids_BT: (B, T), or None.
        domain: where the text comes from, for the report.
        held_out: never fitted on; thresholds and reports come from these.
    """

    input_ids_BT: Tensor
    supervised_BT: Tensor | None
    attention_mask_BT: Tensor | None
    position_ids_BT: Tensor | None
    domain: str
    held_out: bool

    @property
    def leaves_rows_without_loss(self) -> bool:
        """Whether some rows carry loss and others, padding aside, do not."""
        if self.supervised_BT is None or not bool(self.supervised_BT.any()):
            return False
        left_BT = ~self.supervised_BT.bool()
        if self.attention_mask_BT is not None:
            left_BT = left_BT & (self.attention_mask_BT != 0)
        return bool(left_BT.any())


def read_windows(batches: Iterable[Mapping[str, Any]], held_out: Iterable[Mapping[str, Any]] | None) -> list[Window]:
    """Windows from dicts of `input_ids`, optional `attention_mask`, `position_ids`, `supervised` and `domain`.

    Raises:
        DataError: no batches, no token ids in one, or masks whose shape differs from the ids'.
    """
    windows = []
    for held, group in ((False, batches), (True, held_out or ())):
        for index, batch in enumerate(group):
            where = f"{'held-out' if held else 'calibration'} batch {index}"
            ids = batch.get("input_ids")
            if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.numel() == 0:
                raise DataError(f"{where}: input_ids must be a (B, T) tensor of token ids")
            masks = {name: batch.get(name) for name in ("supervised", "attention_mask", "position_ids")}
            for name, mask in masks.items():
                if mask is not None and mask.shape != ids.shape:
                    raise DataError(f"{where}: {name} has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}")
            domain = str(batch.get("domain") or "text")
            parts = (masks["supervised"], masks["attention_mask"], masks["position_ids"])
            windows.append(Window(ids, *parts, domain, held))
    if not any(not w.held_out for w in windows):
        raise DataError("calibration needs at least one batch of tokens")
    return windows


def settled(config: CalibrationConfig, policy: str, windows: Sequence[Window]) -> CalibrationConfig:
    """Options with the scorer and the target that these windows teach.

    The target is `attention_mass` for `mass_loss_rows` where all their rows carry loss. The two are one there, but how
    far the next row with loss is would be the same everywhere, and new in training.

    Args:
        config: options as given.
        policy: of the plan that is asked for.
        windows: to fit on.

    Raises:
        ConfigError: thresholds are asked for with a scorer that they say nothing of.
    """
    config = replace(config, scorer=config.scorer or "predictor")
    check_thresholds(config.scorer, policy, config.tune_steps)
    taught = config.target != "mass_loss_rows" or any(w.leaves_rows_without_loss for w in windows)
    return config if taught else replace(config, target="attention_mass")


def check_thresholds(scorer: str | None, policy: str, tune_steps: int) -> None:
    """Raises ConfigError where thresholds are asked for and blocks are not ranked by predictors."""
    if scorer != "predictor" and (policy == "threshold" or tune_steps > 0):
        asked = "sparsity.policy threshold" if policy == "threshold" else f"calibration.tune_steps {tune_steps}"
        raise ConfigError(
            f"{asked} needs scorer predictor (sparsity.scorer), whose scores thresholds are of; the scorer is {scorer}"
        )
