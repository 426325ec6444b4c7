"""What backward needs only for the keys that rows offer waits in host memory; copies run beside the computation.

These are the inputs of such rows, and on request their keys and values, which backward then does not compute again.

A layer's tensors go through one of two *slots* of device memory: forward copies them into a slot and from there to the
host, backward copies them into a slot again, one layer ahead of the layer that runs. All copies of a device run on one
stream, and slots wait for it and for the computation by events, so the host waits for nothing, and the device holds two
layers' tensors at most. A slot keeps what it held: the last two layers of a forward are not copied back at all.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from lemo.errors import ConfigError

State = dict[str, Tensor]
# Torch rounds pinned memory up to powers of two; chunks of one size fit tensors of every length, step after step.
CHUNK_BYTES = 16 * 2**20
ALIGNMENT_BYTES = 256
SLOTS = 2
Offload = bool | Literal["inputs", "keys"]


def read_offload(offload: Offload) -> Literal["inputs", "keys"] | None:
    """What goes to the host: inputs alone, or keys and values too; None for nothing.

    Raises:
        ConfigError: another value.
    """
    if isinstance(offload, bool):
        return "inputs" if offload else None
    if offload not in ("inputs", "keys"):
        raise ConfigError(f"offload must be false, true (the same as 'inputs'), 'inputs' or 'keys', got {offload!r}")
    return offload


class HostMemory:
    """Pinned host memory of one attachment: kept over steps, dropped by `close`.

    Attributes:
        keys: keys and values go there too, where backward would compute them again.
    """

    def __init__(self, keys: bool = False) -> None:
        """Nothing is allocated yet."""
        self.keys = keys
        self.lanes: dict[torch.device, Lane] = {}

    def convoy(self) -> Convoy:
        """For one forward of the model."""
        return Convoy(self)

    def lane(self, device: torch.device) -> Lane:
        """The copies of one device."""
        if device not in self.lanes:
            self.lanes[device] = Lane(device)
        return self.lanes[device]

    def close(self) -> None:
        """Drops memory that nobody uses; what still waits for its backward is dropped after that."""
        pinned = any(lane.stream is not None and lane.allocated for lane in self.lanes.values())
        for lane in self.lanes.values():
            lane.close()
        self.lanes = {}
        if pinned:
            # Torch keeps pinned memory for later tensors. Releases without this call keep it until the process ends.
            getattr(torch.accelerator, "empty_host_cache", lambda: None)()


class Convoy:
    """Layers of one forward in their order: backward fetches them from the last to the first.

    Attributes:
        keys: as in `HostMemory`.
    """

    def __init__(self, memory: HostMemory) -> None:
        """Args: memory: of the attachment."""
        self._memory = memory
        self.keys = memory.keys
        self._last: weakref.ref[Parked] | None = None

    def park(self, tensors: State) -> Parked:
        """Begins to copy a layer's tensors to the host. They may be written over afterwards.

        Args:
            tensors: of one device, by name.
        """
        before = None if self._last is None else self._last()
        parked = self._memory.lane(next(iter(tensors.values())).device).park(tensors, before)
        self._last = weakref.ref(parked)
        return parked


@dataclass(frozen=True)
class _Place:
    """One tensor among the bytes of a layer."""

    start: int
    stop: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """The tensor inside bytes."""
        typed = flat[self.start : self.stop].view(self.dtype)
        return typed.as_strided(self.size, self.stride, typed.storage_offset())


def _places(tensors: State) -> dict[str, _Place]:
    """Where tensors lie beside each other, with the strides that they have."""
    found, at = {}, 0
    for name, tensor in tensors.items():
        stop = at + prod(tensor.shape) * tensor.element_size()
        stride = torch.empty_like(tensor, device="meta").stride()
        found[name] = _Place(at, stop, tensor.dtype, tensor.shape, stride)
        at = -(-stop // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return found


class Parked:
    """Tensors of one layer, from its forward until its backward has run or its graph is freed."""

    def __init__(self, lane: Lane, places: dict[str, _Place], before: Parked | None) -> None:
        """Args: before: the layer before it in the same forward."""
        self.lane, self.places, self.before = lane, places, before
        self.size_bytes = max(place.stop for place in places.values())
        self.chunks = lane.take_chunks(self.size_bytes)
        self.waits = True

    @contextmanager
    def fetched(self) -> Iterator[State]:
        """The tensors on the device again, inside; at the end their memory goes back."""
        slot = self.lane.lease(self)
        try:
            yield {name: place.of(slot.bytes) for name, place in self.places.items()}
        finally:
            self.lane.end_lease(slot)
            self.release()

    def release(self) -> None:
        """Gives host memory back. Who takes it next comes behind copies still under way, on the same stream."""
        if self.waits:
            self.waits, self.before = False, None
            self.lane.give_chunks(self.chunks)
            self.chunks = []

    def __del__(self) -> None:
        """The graph was freed without backward."""
        if getattr(self, "waits", False):
            self.release()


class _Slot:
    """Device memory that tensors pass through.

    Attributes:
        bytes: (n,) uint8.
        moved: on the copy stream, behind the last copy from or to the host.
        used: on the computing stream, behind the last use.
        owner: whose tensors it holds.
        leased: a backward reads it.
        home: the stream whose memory it is; None without streams.
    """

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self.bytes = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        self.moved, self.used = (torch.cuda.Event() for _ in range(2)) if device.type == "cuda" else (None, None)
        self.owner: weakref.ref[Parked] | None = None
        self.leased = False
        self.home = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def holder(self) -> Parked | None:
        """Whose tensors it holds, while they are of use."""
        parked = None if self.owner is None else self.owner()
        return parked if parked is not None and parked.waits else None


class Lane:
    """Slots, host memory and copy stream of one device.

    Attributes:
        stream: that copies; None where there are no streams, and copies are done when they return.
        slots: the one that was filled last comes last.
        allocated: chunks of host memory made so far.
        fetches: layers copied back so far.
    """

    def __init__(self, device: torch.device) -> None:
        """Nothing is allocated yet."""
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.slots: list[_Slot] = []
        self.allocated = self.fetches = 0
        self._free: list[Tensor] = []
        self._waiting = 0
        self._closed = False

    # ---- host memory

    def take_chunks(self, size_bytes: int) -> list[Tensor]:
        """Chunks for so many bytes: free ones, then new ones."""
        chunks: list[Tensor] = []
        while len(chunks) < -(-size_bytes // CHUNK_BYTES):
            chunks.append(self._free.pop() if self._free else self._new_chunk())
        self._waiting += 1
        return chunks

    def _new_chunk(self) -> Tensor:
        self.allocated += 1
        return torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=self.stream is not None)

    def give_chunks(self, chunks: list[Tensor]) -> None:
        """Takes a layer's chunks back. Without layers that wait, the slots go too."""
        self._waiting -= 1
        if not self._closed:
            self._free += chunks
        if not self._waiting:
            self._drop_slots(self.slots)
            self.slots = []

    def close(self) -> None:
        """Keeps no chunks from now on."""
        self._closed, self._free = True, []

    def _drop_slots(self, slots: list[_Slot]) -> None:
        # Whoever gets their memory next comes behind these waits; `record_stream` would keep it until the device is
        # there, while the host, which is ahead, takes new memory.
        for slot in slots:
            if slot.home is not None:
                slot.home.wait_event(slot.moved)
                slot.home.wait_event(slot.used)

    # ---- copies

    def park(self, tensors: State, before: Parked | None) -> Parked:
        """See `Convoy.park`."""
        parked = Parked(self, _places(tensors), before if before is not None and before.lane is self else None)
        slot = self._free_slot(parked.size_bytes)
        if slot.moved is not None:
            self._computing.wait_event(slot.moved)
        for name, place in parked.places.items():
            place.of(slot.bytes).copy_(tensors[name])
        self._mark_use(slot)
        self._copy(slot, parked, to_host=True)
        return parked

    def lease(self, parked: Parked) -> _Slot:
        """The slot with a layer's tensors; the layer before it is fetched behind them."""
        slot = self._slot_of(parked) or self._load(parked)
        slot.leased = True
        if slot.moved is not None:
            self._computing.wait_event(slot.moved)
        before = parked.before
        if before is not None and before.waits and self._slot_of(before) is None:
            self._load(before)
        return slot

    def end_lease(self, slot: _Slot) -> None:
        """Lets the slot go, once the computation is through with it."""
        self._mark_use(slot)
        slot.leased, slot.owner = False, None

    @property
    def _computing(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def _mark_use(self, slot: _Slot) -> None:
        if slot.used is not None:
            slot.used.record(self._computing)

    def _slot_of(self, parked: Parked) -> _Slot | None:
        return next((slot for slot in self.slots if slot.holder() is parked), None)

    def _free_slot(self, size_bytes: int) -> _Slot:
        """A slot to fill: a new one, one that holds nothing, or the one that was filled first."""
        free = [slot for slot in self.slots if not slot.leased]
        if len(self.slots) < SLOTS or not free:
            slot = self._new_slot(size_bytes)
        else:
            slot = next((x for x in free if x.holder() is None), free[0])
            self.slots.remove(slot)
            if slot.bytes.numel() < size_bytes:
                self._drop_slots([slot])
                slot = self._new_slot(size_bytes)
        self.slots.append(slot)
        return slot

    def _new_slot(self, size_bytes: int) -> _Slot:
        slot = _Slot(size_bytes, self.device)
        # Its memory may be of a tensor that the computation is not through with.
        self._mark_use(slot)
        return slot

    def _load(self, parked: Parked) -> _Slot:
        slot = self._free_slot(parked.size_bytes)
        self.fetches += 1
        self._copy(slot, parked, to_host=False)
        return slot

    def _copy(self, slot: _Slot, parked: Parked, to_host: bool) -> None:
        slot.owner = weakref.ref(parked)
        side: Any = nullcontext()
        if self.stream is not None:
            self.stream.wait_event(slot.used)
            side = torch.cuda.stream(self.stream)
        with side:
            for chunk, part in zip(parked.chunks, slot.bytes[: parked.size_bytes].split(CHUNK_BYTES), strict=True):
                target, source = (chunk[: len(part)], part) if to_host else (part, chunk[: len(part)])
                target.copy_(source, non_blocking=True)
        if slot.moved is not None:
            slot.moved.record(self.stream)
