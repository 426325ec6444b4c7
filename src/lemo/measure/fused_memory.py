"""The fused engine's memory, walked through on paper: every tensor that a layer makes, keeps and gives back.

Follows `lemo.runtime.fused` step by step, as it runs on a GPU, where kernels allocate nothing but their results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lemo.measure.attention_memory import INDEX, WIDE, AttentionMemory, Workspace
from lemo.measure.layer_rows import LayerRows
from lemo.measure.ledger import Ledger, Scope
from lemo.measure.sizes import ModelSizes

if TYPE_CHECKING:
    from lemo.runtime.fused.offload import Offload


def level_of(rows: LayerRows, recompute: str) -> str:
    """The recompute level in force, as `FusedCall.keeps` has it."""
    return "lin" if recompute == "layer" and rows.exact and not rows.keys else recompute


def takes_keys(rows: LayerRows, recompute: str, offload: Offload) -> bool:
    """Keys and values go to the host instead of being computed again, as `FusedCall.takes_keys` has it."""
    return offload == "keys" and rows.offers and level_of(rows, recompute) in ("lin", "layer")


def saved_bytes(sizes: ModelSizes, rows: LayerRows, recompute: str, offload: Offload = False) -> dict[str, float]:
    """Bytes of each tensor that a layer keeps for its backward pass, rows' numbers left out."""
    e, wide, shape = sizes.element_bytes, max(WIDE, sizes.element_bytes), sizes.shape
    level, n, frame = level_of(rows, recompute), rows.back, rows.back_frame
    found: dict[str, float] = {}
    if rows.exact and not rows.pairs and not rows.keys:
        found |= {"all_key": rows.frame * sizes.key * e, "all_value": rows.frame * sizes.key * e}
    found |= {"frame": frame * shape.width * e, "rstd": frame * wide}
    if not sizes.wide_norm:
        found["mean"] = frame * wide
    if level != "layer":
        found |= {"output": n * sizes.query * e, "lse": n * shape.heads * wide}
    if level in ("none", "mlp"):
        found["middle"] = n * shape.width * e
        # Under exact forward keys and values are those of the rows that pass gradient.
        found |= {"query": n * sizes.query * e, "key": frame * sizes.key * e, "value": frame * sizes.key * e}
    elif takes_keys(rows, recompute, offload):
        found |= {"key": frame * sizes.key * e, "value": frame * sizes.key * e}
    if level == "none":
        kept = _kept_rows(rows) * shape.ffn * e
        found |= {"gate": kept, "up": kept} if shape.gated else {"gate": kept}
    skipped = 0 if rows.loss is not None else rows.stream - rows.runs
    if rows.bypass and skipped:
        found["bypass_rstd"] = skipped * wide
    return found


def _kept_rows(rows: LayerRows) -> int:
    """Rows of gate and up that level `none` keeps: picked up by chunks, with one behind them for those not wanted."""
    from lemo.runtime.fused.mlp import CHUNK_ROWS

    return rows.back + (rows.exact and rows.queries > CHUNK_ROWS)


def parked_bytes(sizes: ModelSizes, rows: LayerRows, recompute: str, offload: Offload = True) -> float:
    """Bytes that offload moves to the host, as `FusedCall.offloaded` has it."""
    if not offload:
        return 0.0
    saved = saved_bytes(sizes, rows, recompute, offload)
    names = ("frame", "key", "value") if rows.offers else ("all_key", "all_value")
    return sum(saved.get(name, 0.0) for name in names)


def index_bytes(rows: LayerRows) -> float:
    """Numbers and positions of rows that a layer's call holds; layers that choose alike hold the same ones."""
    found = 0.0
    if rows.runs < rows.stream:
        found += INDEX * (2 * rows.runs + (rows.stream - rows.runs))
        found += INDEX * rows.runs / 2 if rows.whole else 0.0
    if rows.exact:
        found += 3 * INDEX * rows.passes
    if rows.local:
        found += INDEX * (3 * rows.back + rows.far + (rows.local if rows.local_all else 0))
    return found


class FusedLayerMemory:
    """Forward and backward of one layer in a ledger.

    Attributes:
        parked: bytes that it moves to the host.
    """

    def __init__(
        self,
        ledger: Ledger,
        sizes: ModelSizes,
        rows: LayerRows,
        recompute: str,
        vendor: Workspace,
        offload: Offload = False,
    ) -> None:
        """Args: vendor: what the attention backward of a vendor takes."""
        from lemo.runtime.fused.mlp import CHUNK_ROWS

        self.ledger, self.sizes, self.rows = ledger, sizes, rows
        self.attention = AttentionMemory(ledger, sizes, rows, vendor)
        self.recompute = recompute
        self.level = level_of(rows, recompute)
        self.e, self.width, self.ffn = sizes.element_bytes, sizes.shape.width, sizes.shape.ffn
        self.wide = max(WIDE, self.e)
        self.ways = 2 if sizes.shape.gated else 1
        self.chunk_rows = CHUNK_ROWS
        saved = saved_bytes(sizes, rows, recompute, offload)
        self.offload = offload
        self.takes_keys = takes_keys(rows, recompute, offload)
        self.groups = self.attention.groups if self.level == "layer" and not self.takes_keys else 1
        self.parked = parked_bytes(sizes, rows, recompute, offload)
        self.frame_saved = saved["frame"] if rows.offers and rows.loss is None and not offload else 0.0
        self.saved = sum(saved.values()) - self.frame_saved - self.parked

    # ---- forward

    def forward(self) -> None:
        """Runs the layer; what it saves stays."""
        rows, e = self.rows, self.e
        frame, n, width = rows.frame, rows.queries, self.width
        with self.ledger.scope() as work:
            work.add(normed=frame * width * e, rstd=frame * self.wide)
            if not rows.whole:
                work.add(frame=frame * width * e)
            self._project(work)
            work.drop("normed")
            self._turn(work, n, frame)
            self.attention.forward(work)
            self._save(work)
            self._middle(work)
            self._mlp_forward(work)
        self._keep(1)

    def _keep(self, sign: int) -> None:
        """Saved tensors, from the work into their own part, or away."""
        self.ledger.add("saved: rows of layers", sign * self.saved)
        self.ledger.add("saved: frames that offer keys", sign * self.frame_saved)

    def _project(self, work: Scope) -> None:
        """Queries, keys and values."""
        rows, sizes, e = self.rows, self.sizes, self.e
        ranks = sizes.adapter.inputs
        if not rows.split:
            work.add(low=rows.frame * sum(ranks) * e)
            work.add(query=rows.queries * sizes.query * e, pair=2 * rows.frame * sizes.key * e)
        else:
            work.add(low=rows.frame * sum(ranks[1:] or ranks) * e, pair=2 * rows.frame * sizes.key * e)
            work.drop("low")
            work.add(chosen=rows.queries * self.width * e, low=rows.queries * ranks[0] * e)
            work.add(query=rows.queries * sizes.query * e)
            work.drop("chosen")
        work.drop("low")

    def _turn(self, work: Scope, queries: int, keys: int) -> None:
        """Head norms copy queries and keys; rotation is in place."""
        if self.sizes.head_norms:
            e, shape = self.e, self.sizes.shape
            work.add(turned=queries * self.sizes.query * e)
            work.touch(queries * shape.heads * self.wide)
            work.add(turned=keys * self.sizes.key * e)
            work.touch(keys * shape.kv_heads * self.wide)

    def _save(self, work: Scope) -> None:
        """Copies for the backward pass, and the end of what is not needed any more."""
        rows, e, width = self.rows, self.e, self.width
        # Gate and up come later.
        level = "mlp" if self.recompute == "none" else self.recompute
        saved = saved_bytes(self.sizes, rows, level, self.offload)
        saved.pop("middle", None)  # later, too
        if rows.exact:
            of_keys = () if rows.keys else ("frame", "rstd", "mean", "key", "value")
            work.add(copies=sum(saved.get(name, 0.0) for name in ("output", "lse", "query", *of_keys)))
        if rows.whole and (rows.keys or not rows.exact) and not (self.offload and rows.offers):
            work.add(clone=rows.frame * width * e)
        work.clear()
        work.add(saved=sum(saved.values()) - parked_bytes(self.sizes, rows, level, self.offload))
        if rows.exact or self.level == "layer":
            work.add(output=rows.queries * self.sizes.query * e)
        if rows.exact and not rows.keys and not rows.whole:
            work.add(frame=rows.frame * width * e)

    @property
    def _in_stream(self) -> bool:
        """Rows between attention and MLP are written into the stream itself."""
        return self.rows.exact and self.rows.whole and not self.rows.split

    def _middle(self, work: Scope) -> None:
        """The output projection. An adapter's update has memory of its own before it is added to the residual."""
        rows, rank = self.rows, self.sizes.adapter.output
        size = rows.queries * self.width * self.e
        work.add(low=rows.queries * rank * self.e)
        if self._in_stream or "frame" in work.names:
            work.touch(size if rank else 0)
        else:
            work.add(middle=size)
            work.touch(size if rank and rows.split else 0)
        work.drop("low", "output")
        if rows.exact and self.level in ("none", "mlp"):
            work.add(saved=rows.back * self.width * self.e)

    def _mlp_forward(self, work: Scope) -> None:
        from lemo.runtime.fused.joined import joined_width, pays

        n, e, adapter = self.rows.queries, self.e, self.sizes.adapter
        # Where the last map goes into the stream, base and adapter are one product (`fused.joined`).
        joins = self._in_stream and adapter.down and pays(n, self.ffn)
        joined = joined_width(self.ffn, adapter.down) if joins else 0
        work.add(joined=self.width * joined * e)
        keep = self.level == "none" and not self.rows.exact
        if self.level == "none" and not keep:
            work.add(kept=self.ways * _kept_rows(self.rows) * self.ffn * e)
        chunk = n if keep else min(n, self.chunk_rows)
        for turn in range(1 if keep else min(2, -(-n // max(1, self.chunk_rows)))):
            if turn and n < 2 * self.chunk_rows:
                chunk = n - self.chunk_rows
            work.add(normed=chunk * self.width * e, rstd=chunk * self.wide, low=chunk * sum(adapter.gates) * e)
            work.add(wide=self.ways * chunk * self.ffn * e)
            work.drop("normed", "rstd", "low")
            work.add(next_act=chunk * max(self.ffn, joined) * e)
            work.drop("act")  # of the chunk before
            if not keep:
                work.drop("wide")
            work.names["act"] = work.names.pop("next_act")
            update = 0 if self._in_stream and (joined or not adapter.down) else chunk * self.width * e
            work.add(low=chunk * adapter.down * e, update=update)
            work.drop("low", "update")

    # ---- backward

    def backward(self) -> None:
        """Runs the layer's backward; what it saved goes at the end."""
        rows, e, width = self.rows, self.e, self.width
        n, selected = rows.back, rows.selects or rows.exact
        with self.ledger.scope() as work:
            if selected:
                work.add(grad=n * width * e)
            self._recompute(work)
            self._mlp_backward(work)
            work.drop("middle")
            self._attention_backward(work)
            # With several groups heads are gradients now.
            work.drop("turned", "output", "lse", *(["heads"] if self.groups == 1 else []))
            self._project_back(work)
        self._keep(-1)

    def _norm(self, work: Scope) -> None:
        frame = self.rows.back_frame
        work.add(normed=frame * self.width * self.e)
        work.touch(frame * self.wide)

    def _recompute(self, work: Scope) -> None:
        rows, sizes, e, width = self.rows, self.sizes, self.e, self.width
        n, frame = rows.back, rows.back_frame
        if self.level in ("none", "mlp"):
            self._turn(work, n, frame)
            return
        self._norm(work)
        split, ranks = rows.offers, sizes.adapter.inputs
        if self.takes_keys:
            work.add(low=(n * ranks[0] + n * width) * e)
        else:
            work.add(low=frame * sum(ranks) * e)
            if split:
                work.touch(n * width * e)
        work.add(heads=(n * sizes.query + (0 if self.takes_keys else 2 * frame * sizes.key)) * e)
        work.drop("low")
        self._turn(work, n, frame)
        work.drop("normed")
        if self.level == "layer":
            self.attention.passing(work)
        if split:
            work.add(ran=n * width * e)
        work.add(middle=n * width * e)
        work.touch(n * sizes.adapter.output * e)
        work.drop("ran")

    def _mlp_backward(self, work: Scope) -> None:
        e, adapter = self.e, self.sizes.adapter
        chunk = min(self.rows.back, self.chunk_rows)
        work.add(normed=chunk * self.width * e)
        if self.level != "none":
            work.add(chunk=chunk * self.ways * self.ffn * e)
        if not any(adapter.gates):
            work.drop("normed")
        work.add(act=chunk * self.ffn * e)
        work.touch(2 * chunk * adapter.down * e)
        work.drop("act")
        work.add(chunk=chunk * (self.width + 2 * sum(adapter.gates)) * e)
        work.drop("normed", "chunk")

    def _attention_backward(self, work: Scope) -> None:
        rows, sizes, e = self.rows, self.sizes, self.e
        work.add(grad_output=rows.back * sizes.query * e)
        work.touch(2 * rows.back * sizes.adapter.output * e)
        if rows.offers:
            work.drop("grad")  # back into the stream's
        if self.groups == 1:
            self.attention.backward(work)
        else:
            self.attention.backward_by_groups(self.groups)
        if sizes.head_norms:
            work.touch(rows.back * (sizes.query * e + sizes.shape.heads * self.wide))
        work.drop("grad_output")

    def _project_back(self, work: Scope) -> None:
        rows, sizes, e = self.rows, self.sizes, self.e
        ranks = sizes.adapter.inputs
        n, frame = rows.back, rows.back_frame
        low = 2 * sum(ranks) * e
        if any(ranks):
            self._norm(work)
        if not rows.offers:
            work.add(grad_normed=n * self.width * e)
            work.touch(n * low)
            return
        work.add(grad_normed=frame * self.width * e)
        work.touch(frame * low)
        if any(ranks):
            work.add(chosen=n * self.width * e)
        work.add(of_queries=n * self.width * e)
        work.touch(n * low)
        work.drop("chosen", "of_queries")
