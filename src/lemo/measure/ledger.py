"""A ledger of memory: what is held at every moment of a step that is walked through on paper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

# Order of tables.
PARTS = (
    "weights",
    "adapter, gradients, optimizer",
    "predictors and bypasses",
    "batch and positions",
    "residual stream and its gradient",
    "saved: rows of layers",
    "saved: frames that offer keys",
    "saved: on its way to the host",
    "work of one layer",
    "attention workspace",
    "loss",
    "libraries",
)


@dataclass
class Ledger:
    """Bytes held by part, their peak, and what was held then.

    Attributes:
        held: bytes by part now.
        peak_bytes: most that was held at once.
        peak_parts: by part at that moment.
        peak_moment: what was going on then.
        moment: what is going on now.
        host_bytes: pinned host memory.
    """

    held: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    peak_bytes: float = 0.0
    peak_parts: dict[str, float] = field(default_factory=dict)
    peak_moment: str = ""
    moment: str = ""
    host_bytes: float = 0.0

    @property
    def total_bytes(self) -> float:
        """Held now."""
        return sum(self.held.values())

    def add(self, part: str, size_bytes: float) -> None:
        """Takes memory."""
        self.held[part] += size_bytes
        if self.total_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_parts, self.peak_moment = self.total_bytes, dict(self.held), self.moment

    def drop(self, part: str, size_bytes: float) -> None:
        """Gives memory back."""
        self.held[part] -= size_bytes

    def touch(self, part: str, size_bytes: float) -> None:
        """Takes memory and gives it back at once."""
        self.add(part, size_bytes)
        self.drop(part, size_bytes)

    @contextmanager
    def scope(self, part: str = "work of one layer") -> Iterator[Scope]:
        """Memory with names, all given back at the end."""
        scope = Scope(self, part)
        try:
            yield scope
        finally:
            scope.clear()


class Scope:
    """Named memory inside one piece of work."""

    def __init__(self, ledger: Ledger, part: str) -> None:
        """Empty."""
        self.ledger, self.part = ledger, part
        self.names: dict[str, float] = {}

    def add(self, **sizes_bytes: float) -> None:
        """Takes memory, one name after the other; a name that is held already grows."""
        for name, size_bytes in sizes_bytes.items():
            self.names[name] = self.names.get(name, 0.0) + size_bytes
            self.ledger.add(self.part, size_bytes)

    def drop(self, *names: str) -> None:
        """Gives named memory back; a name that is not held counts nothing."""
        for name in names:
            self.ledger.drop(self.part, self.names.pop(name, 0.0))

    def touch(self, size_bytes: float) -> None:
        """Takes memory and gives it back at once."""
        self.ledger.touch(self.part, size_bytes)

    def clear(self) -> None:
        """Gives everything back."""
        self.drop(*tuple(self.names))
