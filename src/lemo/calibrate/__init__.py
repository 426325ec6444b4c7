"""Calibration: fit predictors, bypasses and thresholds on the stream that training will see.

The package itself can be called: `lemo.calibrate(model, batches, config, plan=...)`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from lemo.calibrate.session import calibrate
from lemo.core.plan import Plan

__all__ = ["calibrate"]


class _CallablePackage(ModuleType):
    """A package that can be called, so that `lemo.calibrate(...)` and `lemo.calibrate.report` both mean something."""

    def __call__(self, *args: Any, **kwargs: Any) -> Plan:
        """See `lemo.calibrate.session.calibrate`."""
        return calibrate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
