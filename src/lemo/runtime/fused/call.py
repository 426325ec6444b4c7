"""What one fused layer does with one batch: which rows offer keys, which run, which pass gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from lemo.core.bypass import Bypass
from lemo.ops.attend_rows.far import FarKeys
from lemo.ops.attend_rows.reference import Rows
from lemo.runtime.fused.factors import AdapterFactors
from lemo.runtime.fused.offload import Convoy
from lemo.runtime.rows import ContextRows, MlpRows, PartedRows, RowRange

Recompute = Literal["none", "mlp", "lin", "layer"]
LEVELS = ("none", "mlp", "lin", "layer")


@dataclass(frozen=True)
class ExactRows:
    """Exact forward: the frame runs without saving anything, these of its rows pass gradient.

    Attributes:
        places_n: (n,) places in the frame.
        ran_n: (n,) places among the rows that run.
        rows_n: (n,) flat rows.
        range: their documents and positions.
        valid_n: (n,) bool, rows that do pass gradient; None for all.
        pairs: gradient through kept pairs only, instead of over all keys.
        keys: gradient also into the keys and values of every row of the frame.
        context: rows that run attend locally but for far ones, as this says; None when all attend to all keys.
    """

    places_n: Tensor
    ran_n: Tensor
    rows_n: Tensor
    range: Rows
    valid_n: Tensor | None
    pairs: bool
    keys: bool
    context: ContextRows | None = None


@dataclass(frozen=True)
class FusedCall:
    """Rows of one layer call. The *frame* are the rows that offer keys and values; among them some run the layer.

    Attributes:
        frame_rows: (n,) flat rows of the frame; None when it is the whole stream, row by row.
        keys: documents and positions of the frame.
        places_n: (q,) places in the frame of the rows that run the layer; None when all of the frame do.
        rows_n: (q,) flat rows that run the layer; None for the whole stream.
        queries: their documents and positions; the same object as `keys` when all of the frame run.
        valid_n: (q,) bool, rows whose result counts; None for all.
        skipped_s: (s,) flat rows that take the bypass.
        bypass: their update; None leaves them unchanged.
        exact: rows that pass gradient, when they are fewer than those that run.
        mlp: rows of the MLP among those that run, when it has its own.
        cosine_PR: RoPE tables, row i of the stream uses entry i mod P; None without RoPE.
        sine_PR: likewise.
        recompute: what backward computes again instead of finding it saved.
        in_place: write into the residual stream itself.
        adapters: factors of the adapters in this forward.
        offload: takes to the host what backward needs only for keys of rows that do not run or pass gradient, and
            keys and values too if it says so; None leaves it on the device.
        far: of exact forward, the far keys that attention's backward reads; None for all.
        parted: of exact forward, the rows that pass gradient, when some of them attend locally.
    """

    frame_rows: Tensor | None
    keys: RowRange
    places_n: Tensor | None
    rows_n: Tensor | None
    queries: Rows
    valid_n: Tensor | None
    skipped_s: Tensor | None
    bypass: Bypass | None
    exact: ExactRows | None
    mlp: MlpRows | None
    cosine_PR: Tensor | None
    sine_PR: Tensor | None
    recompute: Recompute
    in_place: bool
    adapters: AdapterFactors
    offload: Convoy | None = None
    far: FarKeys | None = None
    parted: PartedRows | None = None

    @property
    def keeps(self) -> str:
        """The recompute level in force.

        Exact forward cannot redo its pass, and does not keep the maps into an MLP that has rows of its own.
        """
        if self.exact is None:
            return self.recompute
        if self.recompute == "none" and self.mlp is not None:
            return "mlp"
        return "lin" if self.recompute == "layer" and not self.exact.keys else self.recompute

    @property
    def offers(self) -> bool:
        """In backward, some rows of the frame offer keys and nothing else."""
        return self.places_n is not None if self.exact is None else self.exact.keys

    @property
    def offloaded(self) -> tuple[str, ...]:
        """Names of the saved tensors that go to the host, those that are there."""
        if self.offload is None:
            return ()
        if self.exact is not None and not self.exact.keys:
            return ("all_key", "all_value")
        return ("frame", "head_key", "head_value", "pre_key", "pre_value") if self.offers else ()

    @property
    def takes_keys(self) -> bool:
        """Keys and values of the frame go to the host at a level that would compute them again."""
        return self.offload is not None and self.offload.keys and self.offers and self.keeps in ("lin", "layer")

    def for_backward(self) -> FusedCall:
        """The call as backward sees it: with gradient into all keys, exact forward is rows that skip and offer keys."""
        if self.exact is None or not self.exact.keys:
            return self
        exact = self.exact
        return replace(
            self,
            exact=None,
            places_n=exact.places_n,
            rows_n=exact.rows_n,
            queries=exact.range,
            valid_n=exact.valid_n,
            recompute=self.keeps,
        )

    def passing_alone(self) -> FusedCall:
        """The call of exact forward as its rows that pass gradient alone see it."""
        assert self.exact is not None
        return replace(self, places_n=None, rows_n=self.exact.rows_n, frame_rows=self.exact.rows_n)
