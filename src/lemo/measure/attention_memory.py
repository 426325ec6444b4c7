"""The fused engine's attention on paper: what it takes beside the heads, forward and backward.

Follows `lemo.runtime.fused.attention` and the ops below it, as they run on a GPU with a vendor's kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lemo.measure.layer_rows import CUT, LayerRows
from lemo.measure.ledger import Ledger, Scope
from lemo.measure.sizes import ModelSizes

WIDE = 4  # bytes of the fp32 numbers that norms and softmax keep; 8 for a model in fp64
INDEX = 8  # bytes of a row's number
BATCHED = 16384  # rows of one call of a batched kernel, see ops/attend_local/vendor.py
GATHERED = 65536  # keys of the rectangles of one call, see ops/attend_rows/far_stripes.py
SPACE = "attention workspace"


@dataclass(frozen=True)
class Workspace:
    """What the attention backward of a vendor takes beside its results, in bytes.

    Attributes:
        query: per number of a query: the gradient in fp32, where pieces of it meet.
        grouped: per number of a key, once for each query head, where heads share keys: gradients before their sum.
    """

    query: float = 4.0
    grouped: float = 3.5

    def size_bytes(self, sizes: ModelSizes, queries: int, keys: int) -> float:
        """For so many rows of queries and keys."""
        shared = self.grouped * keys if sizes.key < sizes.query else 0.0
        return sizes.query * (self.query * queries + shared)


class AttentionMemory:
    """Attention of one layer in the scope of its layer.

    Attributes:
        query: bytes of a row's query heads.
        key: bytes of a row's key heads.
        lse: bytes of a row's log-sum-exp.
    """

    def __init__(self, ledger: Ledger, sizes: ModelSizes, rows: LayerRows, vendor: Workspace) -> None:
        """Args: vendor: what the attention backward of a vendor takes."""
        self.ledger, self.sizes, self.rows, self.vendor = ledger, sizes, rows, vendor
        self.query, self.key = sizes.query * sizes.element_bytes, sizes.key * sizes.element_bytes
        self.lse = sizes.shape.heads * max(WIDE, sizes.element_bytes)

    # ---- forward

    def forward(self, work: Scope) -> None:
        """Takes `output` and `lse` of all rows that run."""
        rows, row = self.rows, self.query + self.lse
        if rows.near and not rows.exact:
            self.passing(work)
            return
        work.add(output=rows.queries * self.query, lse=rows.queries * self.lse)
        if rows.near:
            # All attend locally, chunks of them in one call of a vendor's kernel: results of two are merged while the
            # last ones of the calls before are still there. Queries that see all keys are gathered then, and what they
            # get is put among the others'.
            work.touch(min(3 * BATCHED, rows.queries) * row)
            work.add(passing=rows.wide * self.query, far=rows.wide * row)
        if rows.near or rows.split:
            self._touch_rectangle(work, rows.wide if rows.near else rows.queries)
        work.drop("passing", "far")

    def passing(self, work: Scope) -> None:
        """Takes `output` and `lse` of rows that all pass gradient: both kinds by themselves, then end to end."""
        rows, row = self.rows, self.query + self.lse
        if rows.local and rows.far:
            work.add(kinds=rows.back * row)
            self._touch_rectangle(work, rows.wide)
        work.add(output=rows.back * self.query, lse=rows.back * self.lse)
        work.drop("kinds")

    def _touch_rectangle(self, work: Scope, queries: int) -> None:
        """The output of one rectangle, before it is put in place, and places and bounds of rows."""
        work.touch(min(CUT.chunk, queries) * self.query + 3 * queries * INDEX)

    # ---- backward

    @property
    def groups(self) -> int:
        """Pieces that the backward takes where heads are spent, as `spent_groups` has it."""
        from lemo.runtime.fused.attention import head_groups

        rows = self.rows
        return head_groups(self.sizes.shape.kv_heads, 2 * rows.back_frame * self.key, rows.back * self.sizes.query)

    def backward_by_groups(self, groups: int) -> None:
        """From the output's gradient to gradients in the memory of the heads; all pieces of heads are alike."""
        shape = self.sizes.shape
        shape = replace(shape, heads=shape.heads // groups, kv_heads=shape.kv_heads // groups)
        with self.ledger.scope() as work:
            AttentionMemory(self.ledger, replace(self.sizes, shape=shape), self.rows, self.vendor).backward(work)

    def backward(self, work: Scope) -> None:
        """From the output's gradient to `grads` of queries and `pair` of keys and values."""
        rows = self.rows
        query = rows.far * self.query
        if rows.local:
            self._local(work)
            work.add(cut=rows.back * self.lse)  # log-sum-exp of each kind; all else is cut into views
        if rows.offers and rows.samples:
            self._sampled(work)
        elif rows.offers:
            self._stripes(work)
        else:
            if rows.exact and not rows.pairs:
                work.add(grads=query, delta=rows.far * self.sizes.shape.heads * 4)
            with self.ledger.scope(SPACE) as vendor:
                vendor.add(space=self._space(rows.far, rows.far))
                work.add(again=query, pair=2 * rows.far * self.key)
            if "grads" in work.names:
                work.drop("again", "delta")
            else:
                work.names["grads"] = work.names.pop("again")
        if rows.local:
            # One tensor of both kinds.
            work.add(all_grads=rows.back * self.query)
            work.drop("cut", "grads", "local")

    def _sampled(self, work: Scope) -> None:
        """Of rows that see a sample of the far keys: keys are gathered, gradients added up in fp32."""
        rows, far = self.rows, self.rows.far
        gathered, pair = min(GATHERED, rows.frame), 2 * rows.frame * self.key
        work.add(sums=far * self.sizes.query * 4, wide=2 * rows.frame * self.sizes.key * 4)
        with self.ledger.scope(SPACE) as vendor:
            part = far * self.query + gathered * (4 * self.key + 4 * self.sizes.key)
            vendor.add(part=part, space=self._space(far, gathered))
        work.add(grads=far * self.query + (pair if rows.local else 0), delta=far * self.sizes.shape.heads * 4)
        work.add(pair=0 if rows.local else pair)
        work.drop("sums", "delta", "wide")

    def _stripes(self, work: Scope) -> None:
        """Of rows that see all keys: a rectangle for each stripe of keys, whose results are put where all are.

        The gradients of keys are added to those of local rows.
        """
        rows, far, stripe = self.rows, self.rows.far, min(self.rows.stripe, self.rows.frame)
        work.add(sums=far * self.sizes.query * 4, pair=0 if rows.local else 2 * rows.frame * self.key)
        pair = 2 * stripe * self.key
        if rows.frame > stripe:  # no query lies behind the last stripe
            with self.ledger.scope(SPACE) as vendor:
                vendor.add(part=far * self.query + pair, space=self._space(far, stripe))
        work.add(grads=far * self.query, delta=far * self.sizes.shape.heads * 4)
        work.drop("sums", "delta")

    def _local(self, work: Scope) -> None:
        """Of local rows: keys are gathered for every run of them, and the copies' gradients added up."""
        rows = self.rows
        gathered = min(GATHERED, rows.run_keys)
        queries = round(rows.local * gathered / max(1, rows.run_keys))  # of the last call
        last, before = gathered * self.key, (rows.run_keys - gathered) * self.key
        joined, whole = before + last if before else 0, rows.frame * self.key
        work.add(local=rows.local * self.query, part=queries * self.query, keys=before, values=before)
        with self.ledger.scope(SPACE) as vendor:
            vendor.add(gathered=2 * last, space=self._space(queries, gathered))
            work.add(last=2 * last)
        # Copies of several calls are laid end to end, first the keys' gradients, then the values'. What the last call
        # gave stays until both are added up.
        work.add(joined_keys=joined)
        work.drop("keys")
        work.add(pair=whole, joined_values=joined)
        work.drop("joined_keys", "values")
        work.add(pair=whole)
        work.drop("last", "joined_values", "part")

    def _space(self, queries: int, keys: int) -> float:
        return self.vendor.size_bytes(self.sizes, queries, min(keys, self.rows.back_frame))
