"""How the kernels of attend_rows cut their work: sizes of tiles, and which rows a program owns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from lemo.ops.attend_rows.reference import Rows
from lemo.ops.backend import interpreting, padded, send, shared_memory_bytes, why_no_kernel

MAX_HEAD_DIM = 256
# Fewer programs than this run nearly all at once: tiles of equal length are then spread over the processors. More run
# head by head instead, so that those which run at a time share their operands in the second-level cache.
FEW_PROGRAMS = 1024


@dataclass(frozen=True)
class Tiling:
    """How a kernel cuts the work.

    Attributes:
        rows: rows that a program owns.
        others: rows of the other side that it takes at a time.
        warps: warps of a program.
        stages: tiles of the other side in flight.
    """

    rows: int
    others: int
    warps: int
    stages: int

    def __str__(self) -> str:
        """Short, for tables."""
        return f"{self.rows}x{self.others} w{self.warps} s{self.stages}"


# For 16-bit operands, by kernel; the first that fits into shared memory is taken, the benchmark times all that fit.
CANDIDATES = {
    "forward": {
        64: (Tiling(128, 64, 4, 3), Tiling(128, 128, 8, 3), Tiling(128, 64, 8, 3), Tiling(64, 64, 4, 2)),
        128: (Tiling(64, 64, 4, 3), Tiling(128, 64, 8, 3), Tiling(128, 128, 8, 2), Tiling(64, 32, 4, 2)),
        256: (Tiling(128, 64, 8, 2), Tiling(64, 64, 4, 2), Tiling(64, 32, 4, 1)),
    },
    "query": {
        64: (Tiling(128, 64, 8, 2), Tiling(128, 64, 4, 3), Tiling(64, 64, 4, 3), Tiling(64, 32, 4, 2)),
        128: (Tiling(64, 64, 4, 2), Tiling(128, 64, 8, 3), Tiling(128, 32, 8, 3), Tiling(64, 32, 4, 1)),
        256: (Tiling(64, 32, 4, 2), Tiling(64, 32, 8, 1), Tiling(32, 32, 4, 1)),
    },
    "key": {
        64: (Tiling(128, 64, 8, 2), Tiling(64, 64, 4, 2), Tiling(128, 64, 8, 3), Tiling(64, 32, 4, 2)),
        128: (Tiling(128, 64, 8, 1), Tiling(128, 64, 8, 2), Tiling(128, 32, 8, 2), Tiling(64, 32, 4, 1)),
        256: (Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 1), Tiling(32, 32, 4, 1)),
    },
}
# Products of fp32 operands run on the ordinary units: small tiles, or the accumulators spill.
CANDIDATES_FP32 = {
    64: (Tiling(32, 16, 8, 2), Tiling(32, 16, 8, 1)),
    128: (Tiling(32, 16, 8, 2), Tiling(32, 16, 8, 1)),
    256: (Tiling(16, 16, 8, 1),),
}
INTERPRETED = Tiling(32, 16, 1, 1)


@dataclass(frozen=True)
class Work:
    """What one call attends to.

    Attributes:
        rows: position (N,) of the rows that programs own.
        others: position (K,) of the rows on the other side.
        segments: starts and lengths of the documents of `rows`, then of `others`.
    """

    rows: Tensor
    others: Tensor
    segments: tuple[tuple[int, ...], ...]

    @classmethod
    def between(cls, queries: Rows, keys: Rows) -> Work:
        """Work whose programs own queries."""
        sides = (queries.starts, queries.lengths, keys.starts, keys.lengths)
        return cls(queries.position_N, keys.position_N, sides)

    def turned(self) -> Work:
        """The same with the sides exchanged."""
        return Work(self.others, self.rows, (*self.segments[2:], *self.segments[:2]))

    def with_own(self) -> Work:
        """The same rows on both sides."""
        return Work(self.rows, self.rows, self.segments[:2] * 2)

    def covers_rows(self) -> bool:
        """Whether every row is in a document."""
        return sum(self.segments[1]) == self.rows.shape[0]


def why_not(query: Tensor) -> str | None:
    """Why the kernels cannot run on this input; None if they can."""
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"head dimension {query.shape[-1]} exceeds {MAX_HEAD_DIM}"
    if (reason := why_no_kernel(query)) is not None:
        return reason
    if any(not tilings(kind, query.shape[-1], query.dtype) for kind in CANDIDATES):
        return f"no tile of {query.dtype}, {query.shape[-1]} wide, fits into shared memory"
    return None


@cache
def tilings(kind: str, head_dim: int, dtype: torch.dtype) -> list[Tiling]:
    """The candidates for the `forward`, `query` or `key` kernel that fit; the first is the one in use.

    A table and not an autotuner: the first call costs nothing extra, and two runs do the same thing.
    """
    if interpreting():
        return [INTERPRETED]
    table = CANDIDATES_FP32 if dtype.itemsize >= 4 else CANDIDATES[kind]
    return [tiling for tiling in table[max(padded(head_dim), 64)] if fits(tiling, kind, head_dim, dtype)]


def fits(tiling: Tiling, kind: str, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the operands of a program fit into shared memory; 2 KiB are left to the compiler."""
    owned = tiling.rows * (1 if kind == "forward" else 2)
    operands = owned + 2 * tiling.stages * tiling.others
    return operands * padded(head_dim) * dtype.itemsize <= shared_memory_bytes() - 2048


@lru_cache(maxsize=256)
def tile_table(
    segments: tuple[tuple[int, ...], ...], rows: int, device: torch.device, rising: bool
) -> tuple[Tensor, int, int]:
    """Tiles of `rows` rows that cross no document: ((tiles, 4) int32 on the device, tiles, rounds of a bisection).

    A tile is its first row, the end of its document's rows, and first and end of the document's rows on the other
    side. Those with most work come first; it grows along a document when `rising` (queries) and falls otherwise (keys).
    """
    found = []
    for start, length, other, others in zip(*segments, strict=True):
        for at in range(0, length, rows):
            share = min(at + rows, length) / length
            work = others * (share if rising else 1 - at / length)
            found.append((-work, start + at, start + length, other, other + others))
    tiles = torch.tensor([tile[1:] for tile in sorted(found)], dtype=torch.int32).reshape(-1, 4)
    return send(tiles, device), len(found), max((n.bit_length() for n in segments[3]), default=0)


def sizes(query: Tensor, key: Tensor, tiling: Tiling, window: int | None, programs: int) -> dict[str, int]:
    """What the three kernels take at compile time."""
    return {
        "HEADS_PER_GROUP": query.shape[0] // key.shape[0],
        "HEAD_DIM": query.shape[2],
        "PADDED_DIM": padded(query.shape[2]),
        "ROWS": tiling.rows,
        "OTHERS": tiling.others,
        "WINDOW": window is not None,
        "BY_HEAD": programs >= FEW_PROGRAMS,
        "STAGES": tiling.stages,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }


def laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor, copied to these strides where it has others."""
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def like_rows(tensor: Tensor, covered: bool, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the same size, heads inside rows in memory, as projections take it; zeros unless `covered`."""
    heads, rows, head_dim = tensor.shape
    made = tensor.new_empty(rows, heads, head_dim, dtype=dtype or tensor.dtype)
    return (made if covered else made.zero_()).transpose(0, 1)
