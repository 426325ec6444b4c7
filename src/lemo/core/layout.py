"""The documents and blocks of one batch: what can be selected, before anything is scored."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from lemo.errors import ConfigError
from lemo.ops.backend import send_all
from lemo.ops.host import repeat
from lemo.ops.select_rows.op import expand_runs

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """Documents and blocks of a batch of B sequences with T tokens; rows are flat indices into B·T.

    A document is a run of consecutive rows of one sequence. A block is `block_size` consecutive rows of one document,
    counted from the document's first row; the last block of a document may be shorter. Rows of no document (padding)
    belong to no block and are never selected.

    Shapes: D documents, K blocks. `*_K` and `*_D` tensors are int64 (or bool) on the CPU, so that every size that a
    layer needs is known to the host before the layer runs; `rows` fields live on the batch's device.

    Attributes:
        batch: B.
        tokens: T.
        block_size: C.
        document_start_D: first flat row of each document.
        document_length_D: rows of each document.
        block_start_K: first flat row of each block.
        block_length_K: rows of each block, C but for the last of a document.
        block_document_K: document of each block; ascending.
        forced_K: blocks that are always selected: guards and blocks that hold a supervised row.
        supervised_K: blocks that hold a supervised row.
        document_of_row_N: (B·T,) int64 on the device; -1 for padding.
        position_of_row_N: (B·T,) int64 on the device; row's place inside its document; 0 for padding.
        block_of_row_N: (B·T,) int64 on the device; -1 for padding.
        supervised_row_S: (S,) int64 ascending flat rows that carry loss, on the CPU.
        local_K: supervised blocks whose supervised rows all attend locally; None where there is no such block.
        twin: the same with its per-row tensors on the CPU, where the batch is on another device.
        ids_BT: (B, T) token ids, on whatever device they came; None where the batch has none.
        hidden_row_S: (S,) int64 ascending flat rows of padding that a label marks as carrying loss, on the CPU; None
            without one.
        unseen_borders: documents meet where the model's own attention sees no border.
    """

    batch: int
    tokens: int
    block_size: int
    document_start_D: Tensor
    document_length_D: Tensor
    block_start_K: Tensor
    block_length_K: Tensor
    block_document_K: Tensor
    forced_K: Tensor
    supervised_K: Tensor
    document_of_row_N: Tensor
    position_of_row_N: Tensor
    block_of_row_N: Tensor
    supervised_row_S: Tensor
    local_K: Tensor | None = None
    twin: Layout | None = field(default=None, repr=False)
    ids_BT: Tensor | None = field(default=None, repr=False)
    hidden_row_S: Tensor | None = None
    unseen_borders: bool = False

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made once per batch: every layer asks for the same host-side arithmetic and copies."""
        made: dict[Hashable, T] = self.__dict__.setdefault("_once", {})
        if key not in made:
            made[key] = make()
        return made[key]

    @property
    def device(self) -> torch.device:
        """Device of the batch."""
        return self.document_of_row_N.device

    @property
    def on_host(self) -> Layout | None:
        """The same with all tensors on the CPU; None where the host was not told."""
        return self if self.document_of_row_N.device.type == "cpu" else self.twin

    @property
    def real_rows(self) -> int:
        """Rows that belong to a document."""
        return self.once("real rows", lambda: int(self.document_length_D.sum()))

    @property
    def longest(self) -> int:
        """Rows of the longest document; 0 without one."""
        return self.once("longest", lambda: max(self.document_length_D.tolist(), default=0))

    def rows_of(self, blocks_K: Tensor) -> Tensor:
        """Ascending int64 flat rows of the blocks that are set in `blocks_K` (K,) bool, on the CPU."""
        length = self.block_length_K[blocks_K]
        return expand_runs(self.block_start_K[blocks_K], length, int(length.sum()))

    @property
    def is_plain(self) -> bool:
        """Whether the batch is one document per sequence without padding."""
        return bool((self.document_length_D == self.tokens).all()) and len(self.document_length_D) == self.batch

    @classmethod
    def build(
        cls,
        document_BT: Tensor,
        supervised_BT: Tensor | None,
        *,
        block_size: int = 64,
        device: torch.device | str | None = None,
        local_BT: Tensor | None = None,
        labelled_BT: Tensor | None = None,
    ) -> Layout:
        """Cuts a batch into documents and blocks.

        Args:
            document_BT: (B, T) integer document ids; a change of id inside a sequence starts a document, a negative
                id marks padding. Ids may repeat in different sequences.
            supervised_BT: (B, T) bool, rows that carry loss; None for none.
            block_size: C, rows per block.
            device: where the per-row tensors go; the device of `document_BT` when None.
            local_BT: (B, T) bool, rows that carry loss and attend locally; None for none.
            labelled_BT: (B, T) bool, those of `supervised_BT` that a label marks; None for all.

        Raises:
            ConfigError: `block_size` is not a positive integer.
        """
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
            raise ConfigError(f"block_size must be a positive integer, got {block_size!r}")
        device = document_BT.device if device is None else torch.device(device)
        ids_BT = document_BT.detach().to("cpu", torch.int64)
        batch, tokens = ids_BT.shape
        starts_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        starts_BT[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]
        run_start = starts_BT.reshape(-1).nonzero().squeeze(-1)
        run_end = torch.cat([run_start[1:], torch.tensor([batch * tokens])])
        real = ids_BT.reshape(-1)[run_start] >= 0
        document_start, document_length = run_start[real], (run_end - run_start)[real]

        blocks_D = (document_length + block_size - 1) // block_size
        block_document = repeat(torch.arange(len(blocks_D)), blocks_D)
        first_block_D = torch.cumsum(blocks_D, 0) - blocks_D
        offset = (torch.arange(len(block_document)) - first_block_D[block_document]) * block_size
        block_start = document_start[block_document] + offset
        block_length = torch.minimum(document_length[block_document] - offset, torch.tensor(block_size))

        of_row = _of_rows(run_start, run_end, real, first_block_D, block_size)
        document_of_row, position_of_row, block_of_row = of_row
        # Sent before the host waits for the batch's own flags.
        on_device = of_row if device.type == "cpu" else send_all(of_row, device)
        found = _supervised((supervised_BT, local_BT, labelled_BT), block_of_row, len(block_document))
        supervised, supervised_row, hidden_row, local = found
        guards = torch.zeros_like(supervised)
        guards[first_block_D] = guards[first_block_D + blocks_D - 1] = True
        host = cls(
            batch=batch,
            tokens=tokens,
            block_size=block_size,
            document_start_D=document_start,
            document_length_D=document_length,
            block_start_K=block_start,
            block_length_K=block_length,
            block_document_K=block_document,
            forced_K=supervised | guards,
            supervised_K=supervised,
            document_of_row_N=document_of_row,
            position_of_row_N=position_of_row,
            block_of_row_N=block_of_row,
            supervised_row_S=supervised_row,
            local_K=local,
            hidden_row_S=hidden_row,
        )
        return host if device.type == "cpu" else replace(host, **dict(zip(_OF_ROW, on_device, strict=True)), twin=host)


_OF_ROW = ("document_of_row_N", "position_of_row_N", "block_of_row_N")


def _of_rows(
    run_start: Tensor, run_end: Tensor, real: Tensor, first_block_D: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Document, position and block of every row, from the runs of rows of which those that are `real` are documents."""
    # Of each run, padding or not: its document and that one's first block.
    document_R, first_block_R = torch.full_like(run_start, -1), torch.full_like(run_start, -1)
    document_R[real], first_block_R[real] = torch.arange(len(first_block_D)), first_block_D
    document_of_row, start_of_row, block_of_row = (
        repeat(t, run_end - run_start) for t in (document_R, run_start, first_block_R)
    )
    position_of_row = (torch.arange(len(start_of_row)) - start_of_row).masked_fill_(document_of_row < 0, 0)
    block_of_row += position_of_row // block_size
    return document_of_row, position_of_row, block_of_row


def _supervised(
    marks: tuple[Tensor | None, Tensor | None, Tensor | None], block_of_row: Tensor, blocks: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(K,) supervised blocks, supervised rows, labelled padding or None, and (K,) local blocks or None, on the CPU.

    `marks` are (B, T): rows that carry loss, those that attend locally, and those that a label marks; None for all.
    """
    supervised_BT, local_BT, labelled_BT = marks
    supervised = torch.zeros(blocks, dtype=torch.bool)
    if supervised_BT is None:
        return supervised, torch.zeros(0, dtype=torch.int64), None, None
    device = supervised_BT.device
    flags = [x.detach().to(device).bool() for x in (supervised_BT, local_BT, labelled_BT) if x is not None]
    # All in one copy: the host waits for the device once.
    flags_N = torch.stack(flags).to("cpu").flatten(1)
    marked_row = flags_N[0].nonzero().squeeze(-1)
    real = block_of_row[marked_row] >= 0
    supervised_row, hidden_row = marked_row[real], marked_row[~real]
    if labelled_BT is not None:
        hidden_row = hidden_row[flags_N[-1, hidden_row]]
    hidden = hidden_row if len(hidden_row) else None
    block = block_of_row[supervised_row]
    supervised[block] = True
    if local_BT is None:
        return supervised, supervised_row, hidden, None
    local = supervised.clone()
    local[block[~flags_N[1, supervised_row]]] = False
    return supervised, supervised_row, hidden, local if local.any() else None
