"""A decoder layer as one autograd function: one residual stream written in place, only backward rows saved."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lemo.errors import UnsupportedModelError
from lemo.ops import bypass_rows_, bypass_rows_backward_, writable, write_rows_
from lemo.runtime.fused.attention import (
    AttentionBackward,
    State,
    attend_frame,
    attend_passing,
    kept_heads,
    make_heads,
    project_back,
    remake_heads,
    spent_groups,
    turn_heads,
    unturn_heads,
)
from lemo.runtime.fused.call import FusedCall
from lemo.runtime.fused.maps import Gradients
from lemo.runtime.fused.mlp import mlp_backward, mlp_bypass, mlp_bypass_backward, norm_backward, norm_forward, run_mlp
from lemo.runtime.fused.offload import Parked
from lemo.runtime.fused.parts import LayerParts
from lemo.runtime.rows import MlpRows

OWNED = "_lemo_owned"  # attribute of gradients that only the next layer's backward reads


def run_fused(stream_BTM: Tensor, parts: LayerParts, call: FusedCall) -> Tensor:
    """Residual stream after a layer; the same tensor, written in place, where `call.in_place` says so.

    Args:
        stream_BTM: (B, T, M) residual stream before the layer.
        parts: the layer as it is now.
        call: which rows do what.

    Raises:
        UnsupportedModelError: in backward, when it runs a second time: saved activations were used up by the first;
            a sample of far keys for attention with a window.

    *Cost*: saves, per backward row, its input (M numbers) and, at recompute level `lin`, the attention's output; at
    `mlp` also queries, keys, values and the rows between attention and MLP; at `none` also the maps into the MLP. Rows
    that only offer keys leave their inputs too, on the host where `call.offload` is there; with `call.takes_keys` also
    their keys and values.
    *Numerics*: the adapters run in the layer's dtype; gradients of the bypass hold 1/rms constant.
    """
    if call.far is not None and parts.window is not None:
        raise UnsupportedModelError("far_share below 1 needs plain causal attention, but this layer has a window")
    if call.in_place and not writable(stream_BTM, True):
        # FSDP2 hands the layer a view of the stream, made by a function of its own.
        call = replace(call, in_place=False)
    return _FusedLayer.apply(stream_BTM, parts, call, *parts.tensors)


class _FusedLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, parts: LayerParts, call: FusedCall, *tensors: Tensor) -> Tensor:
        output = stream if call.in_place else stream.clone(memory_format=torch.contiguous_format)
        needs_grad = any(ctx.needs_input_grad)
        work = _Forward(parts, call, output.view(-1, output.shape[-1]), needs_grad)
        saved = work.run()
        if call.in_place:
            ctx.mark_dirty(stream)
        ctx.names, ctx.parts, ctx.call, ctx.spent = tuple(saved), parts, call.for_backward(), False
        ctx.versions = parts.versions()
        if needs_grad:
            ctx.save_for_backward(*saved.values())
            ctx.parked = work.parked
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise UnsupportedModelError(
                "a second backward through the fused engine: its first one used up the saved activations. Use "
                "engine='generic' for retain_graph=True"
            )
        ctx.spent = True
        ctx.parts.check_versions(ctx.versions)
        saved = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        wants_stream = ctx.needs_input_grad[0]
        shown = ctx.parts.shown  # then hooks may keep this gradient, and the one before the layer
        if shown or not (getattr(grad, OWNED, False) and grad.is_contiguous()):
            grad = grad.clone(memory_format=torch.contiguous_format)
        gradients = Gradients(tuple(ctx.needs_input_grad[3:]))
        flat = grad.view(-1, grad.shape[-1])
        with nullcontext({}) if ctx.parked is None else ctx.parked.fetched() as fetched:
            _Backward(ctx.parts, ctx.call, flat, saved | fetched, gradients, wants_stream).run()
        if wants_stream and not shown:
            setattr(grad, OWNED, True)
        return (grad if wants_stream else None, None, None, *gradients.finish(ctx.parts.tensors))


class _Forward:
    """One forward of a layer on the flat stream (B·T, M)."""

    def __init__(self, parts: LayerParts, call: FusedCall, stream: Tensor, needs_grad: bool) -> None:
        self.parts, self.call, self.stream = parts, call, stream
        self.level = call.keeps if needs_grad else "layer"
        self.needs_grad = needs_grad
        self.saved: State = {}
        self.parked: Parked | None = None

    def run(self) -> State:
        """Writes the layer's rows into the stream; returns what backward needs."""
        parts, call = self.parts, self.call
        normed, frame, rstd, mean = norm_forward(parts, 0, self.stream, rows_n=call.frame_rows, keep_rows=True)
        state = make_heads(parts, call, normed)
        del normed
        before = state if parts.head_norms else {}
        heads = turn_heads(parts, call, state, (call.rows_n, call.frame_rows))
        output, lse = attend_frame(parts, heads, call)
        assert frame is not None
        if self.needs_grad:
            self._save(frame, rstd, mean, heads, before, output, lse)
        del state, before, heads, lse
        middle = self._middle(frame, output)
        del output, frame
        if self.needs_grad and self.level in ("none", "mlp"):
            self.saved["middle"] = middle if call.exact is None else middle.index_select(0, call.exact.ran_n)
        self._finish(middle)
        return self.saved

    def _middle(self, frame: Tensor, output: Tensor) -> Tensor:
        """Rows between attention and MLP: the stream itself, written over, where exact forward runs all of it."""
        parts, call = self.parts, self.call
        if call.places_n is not None:
            return parts.output.add(output, frame.index_select(0, call.places_n), call.rows_n, parts.multiplier)
        if call.exact is not None and (call.frame_rows is None or not call.exact.keys):
            # Backward has its own copy of what it needs of the frame, which may be the stream.
            into = self.stream if call.frame_rows is None else frame
            return parts.output.add(output, into, call.rows_n, parts.multiplier)
        return _add_update(parts, frame, parts.output.forward(output, (0,), call.rows_n)[0])

    def _save(
        self,
        frame: Tensor,
        rstd: Tensor,
        mean: Tensor | None,
        heads: State,
        before: State,
        output: Tensor,
        lse: Tensor,
    ) -> None:
        """What backward needs of all that comes before the output projection."""
        call, saved, exact = self.call, self.saved, self.call.exact
        if exact is not None and not exact.keys:
            frame, rstd = frame.index_select(0, exact.places_n), rstd.index_select(0, exact.places_n)
            mean = None if mean is None else mean.index_select(0, exact.places_n)
            if not exact.pairs:
                saved |= {"all_key": heads["key"], "all_value": heads["value"]}
        saved |= {"frame": frame, "rstd": rstd}
        if mean is not None:
            saved["mean"] = mean
        if self.level != "layer":
            if exact is not None:
                output, lse = output.index_select(0, exact.ran_n), lse.index_select(1, exact.ran_n)
            saved |= {"output": output, "lse": lse}
        if self.level in ("none", "mlp"):
            saved |= kept_heads(heads, before, exact)
        elif call.takes_keys:
            pair, before = ({n: t for n, t in x.items() if n != "query"} for x in (heads, before))
            saved |= kept_heads(pair, before, None)
        self._offload()
        if "frame" in saved and call.frame_rows is None and (exact is None or exact.keys):
            # A frame that is the whole stream is the stream itself, which is about to be written over.
            saved["frame"] = frame.clone()

    def _offload(self) -> None:
        """Sends what only keys need on its way to the host."""
        names = [name for name in self.call.offloaded if name in self.saved]
        if names:
            assert self.call.offload is not None
            self.parked = self.call.offload.park({name: self.saved.pop(name) for name in names})

    def _finish(self, middle: Tensor) -> None:
        """MLP, then the rows, the bypass and the update go into the stream."""
        parts, call, stream = self.parts, self.call, self.stream
        if call.skipped_s is not None and call.bypass is not None and len(call.skipped_s):
            rstd = bypass_rows_(stream, call.skipped_s, call.bypass.down_MR, call.bypass.up_RM)
            if self.needs_grad:
                self.saved["bypass_rstd"] = rstd
        if call.valid_n is not None and call.bypass is not None:
            assert call.rows_n is not None
            rstd = bypass_rows_(stream, call.rows_n, call.bypass.down_MR, call.bypass.up_RM, apply_s=~call.valid_n)
            if self.needs_grad:
                self.saved["unchosen_rstd"] = rstd

        rows_n, valid_n = call.rows_n, call.valid_n
        if call.mlp is not None:
            # Rows of the frame that skip the MLP are done; the MLP sees the others alone.
            assert rows_n is not None
            self._skip_mlp(middle, call.mlp)
            chosen = call.mlp.rows_n
            middle, rows_n = middle.index_select(0, chosen), rows_n[chosen]
            valid_n = None if valid_n is None else valid_n[chosen]

        def write(rows: slice, act: Tensor, numbers: Tensor | None) -> None:
            if middle is stream:
                parts.down.add(act, stream[rows], numbers, parts.multiplier)
                return
            update = parts.down.forward(act, (0,), numbers)[0]
            if parts.multiplier != 1.0:
                update.mul_(parts.multiplier)
            if rows_n is None:
                torch.add(middle[rows], update, out=stream[rows])
                return
            valid = None if valid_n is None else valid_n[rows]
            write_rows_(stream, rows_n[rows], update, residual_nM=middle[rows], valid_n=valid)

        keep = self.needs_grad and self.level == "none"
        only = None if call.exact is None else call.exact.ran_n
        self.saved |= run_mlp(parts, middle, write, rows_n=rows_n, keep=keep, only_m=only)

    def _skip_mlp(self, middle: Tensor, mlp: MlpRows) -> None:
        call = self.call
        assert call.rows_n is not None
        rows = middle.index_select(0, mlp.skipped_s)
        valid = None if call.valid_n is None else call.valid_n[mlp.skipped_s]
        update = mlp_bypass(self.parts, rows, mlp)
        write_rows_(self.stream, call.rows_n[mlp.skipped_s], rows, residual_nM=update, valid_n=valid)


def _add_update(parts: LayerParts, rows: Tensor, update: Tensor) -> Tensor:
    """rows + m·update, in the memory of the update: `rows` stay."""
    return (update if parts.multiplier == 1.0 else update.mul_(parts.multiplier)).add_(rows)


class _Backward:
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
            middle = _add_update(parts, frame, parts.output.forward(output, (0,), self.rows)[0])
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
