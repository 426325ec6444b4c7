"""Memory of Transformers' own layers under autograd: plain training, and the generic executor, which runs them on rows.

Autograd keeps what each operation's formula needs. Layers of one model type differ in small things; the walk follows
the common pre-norm decoder: RMSNorm computed in fp32 by steps, or LayerNorm as one op; attention that keeps queries,
keys, values and its output; an MLP that keeps its maps' outputs and their products.
"""

from __future__ import annotations

from lemo.measure.attention_memory import INDEX, Workspace
from lemo.measure.fused_memory import index_bytes
from lemo.measure.layer_rows import LayerRows
from lemo.measure.ledger import Ledger, Scope
from lemo.measure.sizes import ModelSizes

WIDE = 4


class PlainLayerMemory:
    """Forward and backward of one layer in a ledger, as autograd runs it.

    Attributes:
        parked: bytes that it moves to the host: none.
    """

    parked = 0.0

    def __init__(
        self, ledger: Ledger, sizes: ModelSizes, rows: LayerRows, checkpoint: bool, vendor: Workspace, gathers: bool
    ) -> None:
        """What the layer will hold.

        Args:
            ledger: takes it.
            sizes: of the model.
            rows: of the layer.
            checkpoint: Transformers recomputes the whole layer in backward.
            vendor: workspace of the attention backward.
            gathers: the generic executor gathers rows and scatters them back.
        """
        self.ledger, self.sizes, self.rows, self.checkpoint = ledger, sizes, rows, checkpoint
        self.vendor, self.gathers = vendor, gathers and rows.selects
        self.e, self.width = sizes.element_bytes, sizes.shape.width
        self.adapter_copy = WIDE if sizes.adapter.element_bytes > self.e else 0

    @property
    def n(self) -> int:
        """Rows that pass gradient."""
        return self.rows.passes

    def norm_bytes(self, n: int, ranks: tuple[int, ...]) -> float:
        """Kept of a norm and of its result, which adapters with these ranks read."""
        # The steps of RMSNorm: the row in fp32, which two operations share, and 1/rms.
        kept = self.width * (WIDE if self.sizes.wide_norm else self.e) + 2 * WIDE
        kept += self._read_by(self.width, ranks)
        return n * kept

    def _read_by(self, width: int, ranks: tuple[int, ...]) -> float:
        """Kept of an input by the adapters that read it: itself, or a wide copy for each."""
        used = [rank for rank in ranks if rank]
        low = sum(used) * self.sizes.adapter.element_bytes
        if not used:
            return 0.0
        return low + (len(used) * self.adapter_copy * width if self.adapter_copy else self.e * width)

    def _dora_bytes(self, n: int, ranks: tuple[int, ...], outputs: tuple[int, ...]) -> float:
        """Kept of the outputs of maps and of their adapters by DoRA, which scales both; one map may have them all."""
        if not self.sizes.adapter.dora:
            return 0.0
        widths = outputs if len(ranks) > 1 else (sum(outputs),)
        return 2 * n * self.e * sum(width for rank, width in zip(ranks, widths, strict=True) if rank)

    def attention_bytes(self) -> float:
        """Kept between the first norm and the residual."""
        sizes, rows, n = self.sizes, self.rows, self.n
        keys = rows.stream if rows.kv_all else n
        if rows.exact and not rows.pairs:
            keys = rows.frame + n
        kept = n * (2 * sizes.query * self.e + sizes.shape.heads * WIDE) + 2 * keys * sizes.key * self.e
        if sizes.adapter.output:
            # Without a wide copy it is the output that attention keeps anyway.
            kept += n * (
                self._read_by(sizes.query, (sizes.adapter.output,)) - (0 if self.adapter_copy else self.e * sizes.query)
            )
        if sizes.head_norms:
            kept += n * WIDE * (sizes.query + sizes.key + 2 * sizes.shape.heads)
        if self.gathers and sizes.rope:
            kept += 2 * n * sizes.shape.head_dim * self.e
        if rows.kv_all and rows.runs < rows.stream and not rows.exact:
            kept += self.norm_bytes(rows.stream - rows.runs, sizes.adapter.inputs)
        kept += self._dora_bytes(n, sizes.adapter.inputs, (sizes.query, sizes.key, sizes.key))
        kept += self._dora_bytes(n, (sizes.adapter.output,), (self.width,))
        return kept

    def mlp_bytes(self) -> float:
        """Kept between the second norm and the residual."""
        sizes, e, ffn = self.sizes, self.e, self.sizes.shape.ffn
        experts = sizes.experts
        if experts is None:
            kept = (3 if sizes.shape.gated else 1) * ffn * e
            down = self._read_by(ffn, (sizes.adapter.down,))
            scaled = self._dora_bytes(self.n, sizes.adapter.gates, (ffn, ffn) if sizes.shape.gated else (ffn,))
            scaled += self._dora_bytes(self.n, (sizes.adapter.down,), (self.width,))
            return self.n * (kept + down) + scaled
        # For each of its experts: gate and up in one, the activation, the result before its weight, and what sorts
        # the copies. Products with frozen weights keep no input.
        each = (self.width + 3 * ffn) * e + 4 * INDEX
        return self.n * (experts.chosen * each + experts.count * WIDE)

    def kept_bytes(self) -> float:
        """Kept without checkpoint."""
        adapter = self.sizes.adapter
        kept = self.norm_bytes(self.n, adapter.inputs) + self.attention_bytes()
        gates = adapter.gates if self.sizes.experts is None else ()
        return kept + self.norm_bytes(self.n, gates) + self.mlp_bytes()

    def forward(self) -> None:
        """Runs the layer; what autograd keeps stays."""
        e, rows, width = self.e, self.rows, self.width
        held = self.n * width * e if self.checkpoint else self.kept_bytes()
        held += index_bytes(rows) if self.gathers else 0.0
        with self.ledger.scope() as work:
            if self.gathers:
                work.add(gathered=max(self.n, rows.runs if rows.exact else 0) * width * e)
            if rows.exact:
                self._run(work, rows.runs, kept=0.0)
                work.add(passed=rows.runs * width * e, keys=2 * rows.frame * self.sizes.key * e)
            self._run(work, self.n, kept=0.0 if self.checkpoint else self.kept_bytes())
            work.add(output=self.n * width * e)
        self.ledger.add("saved: rows of layers", held)
        self.held = held

    def _run(self, work: Scope, n: int, kept: float) -> None:
        """The most that a forward of the layer holds beside its input: in its MLP, at the end of it."""
        e, sizes, width = self.e, self.sizes, self.width
        copies = 1 if sizes.experts is None else sizes.experts.chosen
        wide = n * copies * sizes.shape.ffn * e
        if kept:
            work.add(kept=kept, middle=n * width * e)
            work.touch((0 if sizes.adapter.down else wide) + copies * n * width * e)
            work.touch(2 * n * width * WIDE)
        else:
            work.add(middle=n * width * e)
            work.touch((4 if sizes.shape.gated else 2) * wide)
            work.touch(n * width * (3 * WIDE if sizes.wide_norm else e))
            far = 2 * self.rows.wide if self.rows.near else 0  # queries that see all keys, and what they get
            work.touch((n * (2 * sizes.query + 2 * sizes.key) + far * sizes.query) * e)
        work.drop("kept", "middle")

    def backward(self) -> None:
        """Runs the layer's backward; what it kept goes piece by piece."""
        e, n, width, sizes = self.e, self.n, self.width, self.sizes
        copies = 1 if sizes.experts is None else sizes.experts.chosen
        wide = n * copies * sizes.shape.ffn * e
        with self.ledger.scope() as work:
            if self.checkpoint:
                work.add(again=self.kept_bytes())
            if self.gathers:
                work.add(grad=n * width * e)
            kept = self.kept_bytes()
            work.touch((3 if sizes.shape.gated else 2) * wide + n * copies * width * e * (2 if copies > 1 else 1))
            self._free(work, kept, self.mlp_bytes())
            # Through the norm in fp32: the gradient, its products with the row and with 1/rms, their sum.
            work.touch(n * width * (3 * WIDE if sizes.wide_norm else 2 * e))
            self._free(work, kept, self.norm_bytes(n, sizes.adapter.gates if copies == 1 else ()))
            work.add(grads=n * (2 * sizes.query + 2 * sizes.key) * e)
            self.ledger.touch("attention workspace", self.vendor.size_bytes(sizes, n, n))
            work.drop("grads")
            self._free(work, kept, self.attention_bytes())
            work.touch(n * width * (3 * WIDE if sizes.wide_norm else 2 * e))
        self.ledger.drop("saved: rows of layers", self.held)

    def _free(self, work: Scope, kept: float, size_bytes: float) -> None:
        """Ends a piece of what was kept."""
        if self.checkpoint:
            self.ledger.drop("work of one layer", size_bytes)
            work.names["again"] -= size_bytes
            return
        self.ledger.drop("saved: rows of layers", size_bytes)
        self.held -= size_bytes
