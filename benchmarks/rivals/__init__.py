"""Methods of others that need more than settings of a plan; each a context manager that is in force while training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from benchmarks.rivals.attention_only import attention_only
from benchmarks.rivals.shifted_groups import shifted_groups

RIVAL_CONTEXTS: dict[str, Callable[[Any, Any], AbstractContextManager[None]]] = {
    "shifted_groups": shifted_groups,
    "attention_only": attention_only,
}
