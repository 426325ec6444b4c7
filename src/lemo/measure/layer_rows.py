"""How many rows of one layer run, pass gradient and offer keys in one batch: what its memory and time follow from."""

from __future__ import annotations

from dataclasses import dataclass

from lemo.ops.attend_rows.cuts import Cut

CUT = Cut()


@dataclass(frozen=True)
class LayerRows:
    """Rows of one layer in one batch.

    Attributes:
        stream: B·T.
        runs: rows that run the layer.
        passes: rows that pass gradient.
        kv_all: rows that skip still offer keys and values.
        pairs: exact forward sends gradient through kept pairs only.
        keys: exact forward sends gradient into the keys of all rows.
        loss: rows of the last layer where it works on the rows that carry loss alone; None elsewhere.
        bypass: rows that skip take a low-rank update.
        samples: backward of exact forward reads a sample of the far keys.
        local: rows of those that pass gradient which attend within a window.
        window: rows of a chunk that rows without gradient, and local ones, attend within; None where all see all.
        local_all: local rows attend to all keys in forward.
        run: mean rows of a run of far rows; 0 where they lie scattered.
    """

    stream: int
    runs: int
    passes: int
    kv_all: bool = False
    pairs: bool = False
    keys: bool = False
    loss: int | None = None
    bypass: bool = True
    samples: bool = False
    local: int = 0
    window: int | None = None
    local_all: bool = False
    run: float = 0.0

    @property
    def far(self) -> int:
        """Rows that pass gradient and attend to all keys."""
        return self.back - self.local

    @property
    def stripe(self) -> int:
        """Most keys of a rectangle of attention's backward, see ops/attend_rows/cuts.py."""
        return 2 * CUT.stripe if self.run >= CUT.run else CUT.stripe

    @property
    def wide(self) -> int:
        """Rows of the larger kind of those that pass gradient and attend to all keys in forward, kind after kind."""
        return max(self.far, self.local) if self.local_all else self.far

    @property
    def near(self) -> bool:
        """Rows of the forward pass attend within a window, some others to all keys."""
        return self.window is not None and (self.local > 0 or (self.exact and self.loss is None))

    @property
    def near_keys(self) -> int:
        """Keys that local rows read before their own chunk; a run of a chunk's length lies in two of them."""
        if self.window is None:
            return 0
        chunks = min(-(-self.frame // self.window), 2 * -(-self.local // self.window))
        return self.window * chunks

    @property
    def run_keys(self) -> int:
        """Keys that runs of local rows read, with those of their own chunk, of which a run reads three quarters."""
        return self.near_keys * 7 // 4

    @property
    def exact(self) -> bool:
        """More rows run than pass gradient."""
        return self.passes < self.runs

    @property
    def whole(self) -> bool:
        """The frame, the rows that offer keys, is the whole stream."""
        return self.runs == self.stream or self.kv_all

    @property
    def frame(self) -> int:
        """Rows of the frame."""
        return self.stream if self.whole else self.runs

    @property
    def queries(self) -> int:
        """Rows that run the layer now."""
        return self.runs if self.loss is None else self.loss

    @property
    def split(self) -> bool:
        """Only some rows of the frame run."""
        return self.loss is not None or (self.whole and self.runs < self.stream)

    @property
    def selects(self) -> bool:
        """Rows have numbers of their own: neither frame nor queries are simply the stream."""
        return self.loss is not None or self.runs < self.stream

    @property
    def back(self) -> int:
        """Rows of which the backward pass keeps something."""
        return self.passes if self.exact else self.queries

    @property
    def back_frame(self) -> int:
        """Rows of the frame that the backward pass keeps."""
        return self.passes if self.exact and not self.keys else self.frame

    @property
    def offers(self) -> bool:
        """In the backward pass, some rows of the frame offer keys and nothing else."""
        return self.keys if self.exact else self.split
