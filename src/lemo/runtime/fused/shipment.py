"""What the host worked out for a batch, taken to its device: all tensors that are not there yet in one copy."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from torch import Tensor

from lemo.core.layout import Layout
from lemo.core.selection import RowSet, Selection
from lemo.ops.backend import send_all

T = TypeVar("T")


class Shipment:
    """The way from a batch's layout on the host to its device. What has been sent once is not sent again.

    Objects that are the same on the host are the same on the device: `queries is keys` still holds there.
    """

    def __init__(self, layout: Layout) -> None:
        """Args: layout: of the batch, whose rows are on both sides."""
        self.device = layout.device
        # Originals are kept beside what they became, so that no other object gets their id.
        self._sent: dict[int, tuple[Any, Any]] = {}
        host = layout.on_host
        assert host is not None
        for name in ("document_of_row_N", "position_of_row_N", "block_of_row_N"):
            self._know(getattr(host, name), getattr(layout, name))

    def know(self, selection: Selection) -> None:
        """Rows of a selection that are on both sides already."""
        for rows in (selection.forward, selection.backward):
            if isinstance(rows, RowSet) and rows.on_host is not None:
                for name in ("rows_N", "skipped_S", "valid_N"):
                    self._know(getattr(rows.on_host, name), getattr(rows, name))

    def send(self, found: T) -> T:
        """A dataclass of the host with its tensors on the device.

        One that keeps some of its parts on the host names the others (`sent_parts`) and says what it becomes (`sent`).

        *Cost*: one copy, without waiting.
        """
        left: dict[int, Tensor] = {}
        self._collect(found, left)
        for tensor, sent in zip(left.values(), send_all(list(left.values()), self.device), strict=True):
            self._know(tensor, sent)
        return self._moved(found)

    def _know(self, original: Any, became: Any) -> None:
        self._sent.setdefault(id(original), (original, became))

    def _collect(self, value: Any, left: dict[int, Tensor]) -> None:
        if id(value) in self._sent:
            return
        if isinstance(value, Tensor):
            left[id(value)] = value
        else:
            for part in _parts(value):
                self._collect(part, left)

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, tuple | Tensor) and not is_dataclass(value):
            return value
        if id(value) in self._sent:
            return self._sent[id(value)][1]
        if isinstance(value, tuple):
            moved = tuple(self._moved(item) for item in value)
            # What holds nothing to move is what it was.
            moved = value if all(a is b for a, b in zip(moved, value, strict=True)) else moved
        elif hasattr(value, "sent"):
            moved = value.sent(self.device, self._moved)
        else:
            moved = type(value).__new__(type(value))
            moved.__dict__.update({name: self._moved(item) for name, item in vars(value).items()})
        self._know(value, moved)
        return moved


def _parts(value: Any) -> tuple[Any, ...]:
    """What of an object goes to the device with it."""
    if isinstance(value, tuple):
        return value
    if hasattr(value, "sent_parts"):
        return value.sent_parts
    return tuple(getattr(value, field.name) for field in fields(value)) if is_dataclass(value) else ()
