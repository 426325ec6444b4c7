"""The residual streams of all calibration windows on their way through the layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from lemo.calibrate.collect import HiddenStore
from lemo.calibrate.windows import Window
from lemo.core.plan import Plan
from lemo.runtime.stream import LayerStream


def open_stream(model: nn.Module, window: Window, block_size: int, *, attached: bool = False) -> LayerStream:
    """One window at the first layer; of a model with a plan attached only if `attached` says so."""
    return LayerStream.open(
        model,
        window.input_ids_BT,
        attention_mask=window.attention_mask_BT,
        position_ids=window.position_ids_BT,
        supervised_BT=window.supervised_BT,
        block_size=block_size,
        attached=attached,
    )


@contextmanager
def stored(hidden: Sequence[Tensor], limit_gib: float, folder: Path | None) -> Iterator[HiddenStore]:
    """A store that holds `hidden`, one tensor per window; its files are removed in the end."""
    store = HiddenStore(limit_gib * 2**30, folder)
    for index, x_BTM in enumerate(hidden):
        store.put(index, x_BTM)
    store.advance()
    try:
        yield store
    finally:
        store.close()


def advance(streams: Sequence[LayerStream], store: HiddenStore, layer: int, plan: Plan | None = None) -> None:
    """Every stream passes a layer: as the training forward under `plan` would, or with all of its rows without one."""
    for index, stream in enumerate(streams):
        x_BTM = store.get(index, stream.layout.device)
        store.drop(index)
        passed = stream.dense(layer, x_BTM).output_BTM if plan is None else stream.sparse(layer, x_BTM, plan)
        store.put(index, passed)
    store.advance()
