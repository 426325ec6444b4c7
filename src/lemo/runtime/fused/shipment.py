"""What the host worked out for a batch, taken to its device: all tensors that are not there yet in one copy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import is_dataclass
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
        if not _may_move(value) or id(value) in self._sent:
            return
        if isinstance(value, Tensor):
            left[id(value)] = value
        else:
            for part in _parts(value):
                self._collect(part, left)

    def _moved(self, value: Any) -> Any:
        if not _may_move(value):
            return value
        if id(value) in self._sent:
            return self._sent[id(value)][1]
        if isinstance(value, tuple):
            moved = tuple(self._moved(item) for item in value)
        elif hasattr(value, "sent"):
            moved = value.sent(self.device, self._moved)
        else:
            moved = object.__new__(type(value))
            moved.__dict__.update({name: self._moved(item) for name, item in vars(value).items()})
        self._know(value, moved)
        return moved


def _may_move(value: Any) -> bool:
    """Whether an object may hold tensors for the device: starts and lengths of documents do not."""
    if isinstance(value, tuple):
        return bool(value) and not isinstance(value[0], int)
    return isinstance(value, Tensor) or is_dataclass(value)


def _parts(value: Any) -> Iterable[Any]:
    """What of an object goes to the device with it."""
    if isinstance(value, tuple):
        return value
    return value.sent_parts if hasattr(value, "sent_parts") else vars(value).values()
