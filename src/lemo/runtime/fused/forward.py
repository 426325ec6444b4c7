"""One forward of a decoder layer in the fused engine: rows written into the stream, backward's needs saved."""

from __future__ import annotations

import torch
from torch import Tensor

from lemo.ops import bypass_rows_, write_rows_
from lemo.runtime.fused.attention import State, attend_frame, kept_heads, make_heads, turn_heads
from lemo.runtime.fused.call import FusedCall
from lemo.runtime.fused.joined import JoinedMap
from lemo.runtime.fused.mlp import mlp_bypass, norm_forward, run_mlp
from lemo.runtime.fused.offload import Parked
from lemo.runtime.fused.parts import LayerParts
from lemo.runtime.rows import MlpRows


class LayerForward:
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
        return add_update(parts, frame, parts.output.forward(output, (0,), call.rows_n)[0])

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

        joined = JoinedMap.of(parts.down, stream) if middle is stream and parts.multiplier == 1.0 else None

        def write(rows: slice, act: Tensor, numbers: Tensor | None) -> None:
            if joined is not None:
                joined.add(act, stream[rows], numbers)
                return
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
        self.saved |= run_mlp(parts, middle, write, rows_n=rows_n, keep=keep, only_m=only, joined=joined)

    def _skip_mlp(self, middle: Tensor, mlp: MlpRows) -> None:
        call = self.call
        assert call.rows_n is not None
        rows = middle.index_select(0, mlp.skipped_s)
        valid = None if call.valid_n is None else call.valid_n[mlp.skipped_s]
        update = mlp_bypass(self.parts, rows, mlp)
        write_rows_(self.stream, call.rows_n[mlp.skipped_s], rows, residual_nM=update, valid_n=valid)


def add_update(parts: LayerParts, rows: Tensor, update: Tensor) -> Tensor:
    """rows + m·update, in the memory of the update: `rows` stay."""
    return (update if parts.multiplier == 1.0 else update.mul_(parts.multiplier)).add_(rows)
