"""Inputs of dropout_rows for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lemo.ops.dropout_rows.op import dropout_rows
from lemo.ops.dropout_rows.reference import MASK, dropout_rows_reference
from lemo.testing import Case, Inputs, OpSpec, draw_normal


@dataclass(frozen=True)
class Shape:
    """What a case draws.

    Attributes:
        shape: (n, M).
        p: probability.
        scattered: rows have numbers of their own.
        into: the result is added to something.
        key: the key.
    """

    shape: tuple[int, int] = (9, 40)
    p: float = 0.1
    scattered: bool = True
    into: bool = False
    key: tuple[int, int] = (0x12345678, 0xF00DFACE)

    def inputs(self, generator: torch.Generator) -> Inputs:
        """Arguments of dropout_rows."""
        rows, _ = self.shape
        made: Inputs = {"x_nM": draw_normal(*self.shape, generator=generator), "p": self.p, "key": self.key}
        if self.scattered:
            made["rows_n"] = torch.randperm(3 * rows + 1, generator=generator)[:rows]
        if self.into:
            made["into_nM"] = draw_normal(*self.shape, generator=generator)
        return made


def _naive(x_nM: Tensor, p: float, **others: Any) -> Tensor:
    """Torch's dropout, which also writes its mask."""
    return F.dropout(x_nM, p, training=True)


def _bytes(inputs: Inputs) -> int:
    x = inputs["x_nM"]
    return (3 if inputs.get("into_nM") is not None else 2) * x.numel() * x.element_size()


def _flops(inputs: Inputs) -> int:
    return 0


_SETTINGS: dict[str, dict[str, Any]] = {
    "one in ten": {},
    "half": {"p": 0.5},
    "nearly all": {"p": 0.99},
    "nothing": {"p": 0.0},
    "rows in order": {"scattered": False},
    "added": {"into": True},
    "rows in order, added": {"scattered": False, "into": True, "p": 0.3},
    "odd width": {"shape": (5, 77)},
    "several column tiles": {"shape": (7, 200), "into": True},
    "large key": {"key": (MASK, MASK)},
    "no key": {"key": (0, 0)},
    "no rows": {"shape": (0, 16)},
}

SPEC = OpSpec(
    name="dropout_rows",
    run=dropout_rows,
    reference=dropout_rows_reference,
    cases=tuple(Case(name, Shape(**options).inputs) for name, options in _SETTINGS.items()),
    benchmark_shapes=(Case("one in ten, 16384x4096", Shape((16384, 4096)).inputs),),
    flops=_flops,
    bytes_moved=_bytes,
    naive=_naive,
    ceiling="copy",
)
