"""Whether a model still is what the fused engine found it to be: one flat look, where asking every layer takes long."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import nn

Slot = tuple[dict[str, Any], str]
"""Where a module keeps something: looking there is cheaper than asking the module."""


class Watch:
    """Some places of a model and what was found there when it was made."""

    def __init__(
        self,
        slots: Sequence[Slot] = (),
        switched: Sequence[nn.Module] = (),
        hooks: Sequence[dict] = (),
        tensors: Sequence[Slot] = (),
    ) -> None:
        """Looks for the first time.

        Args:
            slots: whatever lies there must be the same object.
            switched: modules with adapters; the same ones must be in force.
            hooks: tables of hooks; the same ones must be in them.
            tensors: what lies there must have the same dtype, device and autocast on that device.
        """
        self.slots, self.switched, self.hooks, self.tensors = slots, switched, hooks, tensors
        self._empty, self._filled = [t for t in hooks if not t], [t for t in hooks if t]
        self._keepers, self._keys = [keeper for keeper, _ in slots], [key for _, key in slots]
        self._found, self._state = self._find(), self._read()

    @classmethod
    def of_all(cls, watches: Sequence[Watch]) -> Watch:
        """One for the places of several."""
        return cls(
            [slot for watch in watches for slot in watch.slots],
            [module for watch in watches for module in watch.switched],
            [table for watch in watches for table in watch.hooks],
            [slot for watch in watches for slot in watch.tensors],
        )

    def holds(self) -> bool:
        """Whether nothing has changed."""
        return not any(self._empty) and all(map(is_, self._find(), self._found)) and self._read() == self._state

    def _find(self) -> list[Any]:
        return [*map(dict.get, self._keepers, self._keys)]

    def _read(self) -> tuple:
        switches = [
            (m.disable_adapters, getattr(m, "merged", False), *m.active_adapters)  # type: ignore[misc]
            for m in self.switched
        ]
        tensors = [keeper.get(key) for keeper, key in self.tensors]
        kinds = [None if t is None else (t.dtype, t.device) for t in tensors]
        autocast = [autocast_of(kind[1].type) for kind in set(kinds) if kind is not None]
        return switches, kinds, autocast, [tuple(table) for table in self._filled]


def autocast_of(device: str) -> torch.dtype | None:
    """The dtype of autocast where it is on; None where it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
