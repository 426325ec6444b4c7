"""One backward of a decoder layer in the fused engine: the stream's gradient turned in place."""

from __future__ import annotations

from torch import Tensor

from lemo.ops import bypass_rows_backward_, write_rows_
from lemo.runtime.fused.attention import (
    AttentionBackward,
    State,
    attend_passing,
    project_back,
    remake_heads,
    spent_groups,
    turn_heads,
    unturn_heads,
)
from lemo.runtime.fused.call import FusedCall
from lemo.runtime.fused.forward import add_update
from lemo.runtime.fused.maps import Gradients
from lemo.runtime.fused.mlp import mlp_backward, mlp_bypass_backward, norm_backward, norm_forward
from lemo.runtime.fused.parts import LayerParts


class LayerBackward:
    """One backward of a layer: turns the stream's gradient (B·T, M) behind it into the one before it, in place."""

    def __init__(
        self,
        parts: LayerParts,
        call: FusedCall,
        grad: Tensor,
        saved: State,
        gradients: Gradients,
        wants_stream: bool,
    ) -> None:
        self.parts, self.call, self.grad, self.saved = parts, call, grad, saved
        self.gradients, self.wants_stream = gradients, wants_stream
        exact = call.exact
        self.rows, self.valid = (call.rows_n, call.valid_n) if exact is None else (exact.rows_n, exact.valid_n)
        self.key_rows = call.frame_rows if exact is None else exact.rows_n

    def run(self) -> None:
        """Fills `gradients`, and turns `grad` where the stream wants its gradient."""
        grad_nM = self._taken()
        self._bypass()
        heads, before, output, lse, middle = self._recompute()
        self._mlp(grad_nM, middle)
        del middle
        grad_output = self._into_output(grad_nM, output)
        if (own := self._among_keys) is not None and self._wants_frame():
            # The stream's gradient holds these rows' until that of their keys comes.
            write_rows_(self.grad, own, grad_nM)
            grad_nM = self.grad
        grads = self._attention(grad_output, heads, before, output, lse)
        del grad_output, heads, before, output, lse
        # Made only now, or once more: all rows that offer keys, normed, would stand beside attention's gradients.
        normed = self._normed() if self.parts.inputs.needs_input(self.gradients) else None
        grad_normed = project_back(self.parts, self.call, grads, normed, self.gradients, self._wants_frame())
        del grads, normed
        if grad_normed is not None:
            self._give_back(grad_nM, grad_normed)

    def _mlp(self, grad_nM: Tensor, middle: Tensor) -> None:
        wide = {k: self.saved.pop(k) for k in ("gate", "up") if k in self.saved}
        mlp = self.call.mlp
        if mlp is None:
            mlp_backward(self.parts, grad_nM, middle, wide, self.gradients, self.rows)
            return
        chosen = grad_nM.index_select(0, mlp.rows_n)
        rows = None if self.rows is None else self.rows[mlp.rows_n]
        mlp_backward(self.parts, chosen, middle.index_select(0, mlp.rows_n), wide, self.gradients, rows)
        write_rows_(grad_nM, mlp.rows_n, chosen)
        if mlp.down_MR is not None:
            rows = middle.index_select(0, mlp.skipped_s)
            skipped = mlp_bypass_backward(self.parts, grad_nM.index_select(0, mlp.skipped_s), rows, mlp, self.gradients)
            write_rows_(grad_nM, mlp.skipped_s, skipped)

    def _wants_frame(self) -> bool:
        """Whether the gradient of the normed frame is of use: for the stream, or for the norm's own tensors."""
        return self.wants_stream or any(self.gradients.wants(p) for p in self.parts.norms[0].places)

    def _taken(self) -> Tensor:
        """Gradient of the rows that ran: a copy, or the stream's own when it is all of them."""
        if self.rows is None:
            return self.grad
        grad_nM = self.grad.index_select(0, self.rows)
        if self.valid is not None:
            grad_nM.mul_(self.valid[:, None])
        return grad_nM

    def _bypass(self) -> None:
        call, bypass = self.call, self.call.bypass
        if not self.wants_stream or bypass is None:
            return
        for rows, name in ((call.skipped_s, "bypass_rstd"), (call.rows_n, "unchosen_rstd")):
            if name in self.saved:
                assert rows is not None
                bypass_rows_backward_(self.grad, rows, self.saved[name], bypass.down_MR, bypass.up_RM)

    def _normed(self) -> Tensor:
        """The frame's rows behind the first norm."""
        return norm_forward(self.parts, 0, self.saved["frame"])[0]

    def _recompute(self) -> tuple[State, State, Tensor, Tensor, Tensor]:
        """Heads, their projections before head norms, attention's output, its lse, and middle rows."""
        parts, call, saved = self.parts, self.call, self.saved
        frame, level = saved["frame"], call.keeps
        rows = (self.rows, self.key_rows)
        if level in ("none", "mlp"):
            before = {n: saved[f"pre_{n}"] for n in ("query", "key", "value") if f"pre_{n}" in saved}
            heads = (
                turn_heads(parts, call, before, rows)
                if before
                else {n: saved[f"head_{n}"] for n in ("query", "key", "value")}
            )
            return heads, before, saved["output"], saved["lse"], saved["middle"]
        compact = call if call.exact is None else call.passing_alone()
        heads, before = remake_heads(parts, compact, self._normed(), saved, rows)
        if level == "layer":
            output, lse = attend_passing(parts, heads, call)
        else:
            output, lse = saved["output"], saved["lse"]
        if compact.places_n is None:
            middle = add_update(parts, frame, parts.output.forward(output, (0,), self.rows)[0])
        else:
            ran = frame.index_select(0, compact.places_n)
            middle = parts.output.add(output, ran, self.rows, parts.multiplier)
        return heads, before, output, lse, middle

    @property
    def _among_keys(self) -> Tensor | None:
        """The rows that run, all of them valid, where others of the frame offer keys and nothing else."""
        alone = self.call.places_n is None or self.call.exact is not None or self.valid is not None
        return None if alone else self.rows

    def _into_output(self, grad_nM: Tensor, output: Tensor) -> Tensor:
        update = grad_nM if self.parts.multiplier == 1.0 else grad_nM * self.parts.multiplier
        found = self.parts.output.backward(output, {0: update}, self.gradients, rows_N=self.rows)
        assert found is not None
        return found

    def _attention(self, grad_output: Tensor, heads: State, before: State, output: Tensor, lse: Tensor) -> State:
        """Gradients of the projections to queries, keys and values."""
        parts, call = self.parts, self.call
        if call.exact is None:
            groups = spent_groups(call, heads)
            work = AttentionBackward(heads, call.queries, call.keys, far=call.far, parted=call.parted, groups=groups)
        elif call.exact.pairs:
            work = AttentionBackward(heads, call.exact.range, call.exact.range)
        else:
            constants = heads | {"key": self.saved["all_key"], "value": self.saved["all_value"]}
            own = heads["key"], heads["value"]
            work = AttentionBackward(constants, call.exact.range, call.keys, own, call.far)
        grads = work.run(parts, grad_output, output, lse)
        return unturn_heads(parts, call, grads, before, (self.rows, self.key_rows), self.gradients)

    def _give_back(self, grad_nM: Tensor, grad_normed: Tensor) -> None:
        """The gradient through the first norm and the residual, into the stream's."""
        call, frame = self.call, self.saved["frame"]
        statistics = self.saved["rstd"], self.saved.get("mean")
        options: dict[str, Tensor | None] = {"residual_nM": grad_nM, "out_NM": self.grad, "out_rows_n": self.rows}
        if self.valid is not None:
            found = norm_backward(
                self.parts, 0, grad_normed, frame, statistics, self.gradients,
                residual_nM=grad_nM if call.places_n is None or call.exact is not None else None,
            )  # fmt: skip
            self._write_valid(grad_nM, found)
            return
        if self._among_keys is not None:
            # Rows that only offered keys keep the gradient that the stream has for them, and get that of their keys.
            residual = self.grad if call.frame_rows is None else self.grad.index_select(0, call.frame_rows)
            options = {"residual_nM": residual, "out_NM": self.grad, "out_rows_n": call.frame_rows}
        norm_backward(self.parts, 0, grad_normed, frame, statistics, self.gradients, **options)

    def _write_valid(self, grad_nM: Tensor, found: Tensor | None) -> None:
        """The same where some rows were not chosen: those keep the gradient that the stream has for them."""
        call = self.call
        assert found is not None and self.rows is not None
        if call.places_n is None or call.exact is not None:
            write_rows_(self.grad, self.rows, found, valid_n=self.valid)
            return
        write_rows_(self.grad, self.rows, grad_nM, valid_n=self.valid)
        if call.frame_rows is None:
            self.grad.add_(found)
        else:
            write_rows_(self.grad, call.frame_rows, found, add=True)
