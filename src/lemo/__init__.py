"""lemo: fine-tune softmax-attention decoders on long contexts while involving fewer tokens in each layer.

Importing this package imports neither torch nor transformers and changes nothing: each public name is imported from its
module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_HOMES = {
    "BackendError": "lemo.errors",
    "CalibrationConfig": "lemo.config",
    "ConfigError": "lemo.errors",
    "DataError": "lemo.errors",
    "Handle": "lemo.runtime.attach",
    "LabelsError": "lemo.errors",
    "LayerPlan": "lemo.core.plan",
    "LemoError": "lemo.errors",
    "LemoTrainer": "lemo.train.trainer",
    "LossRows": "lemo.train.data",
    "Plan": "lemo.core.plan",
    "PlanError": "lemo.errors",
    "PromptRows": "lemo.train.data",
    "Record": "lemo.measure.record",
    "RunConfig": "lemo.config",
    "Selection": "lemo.core.selection",
    "UnsupportedModelError": "lemo.errors",
    "attach": "lemo.runtime.attach",
}

__all__ = [
    "BackendError",
    "CalibrationConfig",
    "ConfigError",
    "DataError",
    "Handle",
    "LabelsError",
    "LayerPlan",
    "LemoError",
    "LemoTrainer",
    "LossRows",
    "Plan",
    "PlanError",
    "PromptRows",
    "Record",
    "RunConfig",
    "Selection",
    "UnsupportedModelError",
    "attach",
    "calibrate",
]

if TYPE_CHECKING:
    from lemo import calibrate
    from lemo.config import CalibrationConfig, RunConfig
    from lemo.core.plan import LayerPlan, Plan
    from lemo.core.selection import Selection
    from lemo.errors import (
        BackendError,
        ConfigError,
        DataError,
        LabelsError,
        LemoError,
        PlanError,
        UnsupportedModelError,
    )
    from lemo.measure.record import Record
    from lemo.runtime.attach import Handle, attach
    from lemo.train.data import LossRows, PromptRows
    from lemo.train.trainer import LemoTrainer


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name == "calibrate":
        # The package of this name is callable (its module class has __call__), so that `lemo.calibrate(...)` means the
        # same whether or not `lemo.calibrate.<module>` was imported before.
        return importlib.import_module("lemo.calibrate")
    if name not in _HOMES:
        raise AttributeError(f"module 'lemo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
