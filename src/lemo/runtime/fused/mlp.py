"""The MLP of a fused layer, a chunk of rows at a time, so that its wide activations exist for one chunk only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lemo.core.bypass import Bypass
from lemo.ops import gated_act, gated_act_backward, norm_rows, norm_rows_backward, write_rows_
from lemo.ops.gated_act.op import MOST_RANK
from lemo.ops.gated_act.reference import Adapters
from lemo.runtime.fused.joined import JoinedMap
from lemo.runtime.fused.maps import NOTHING, Gradients
from lemo.runtime.fused.parts import LayerParts
from lemo.runtime.rows import MlpRows

CHUNK_ROWS = 16384  # rows whose wide activations exist at a time; products of this size still run at full rate


def chunks(rows: int) -> Iterator[slice]:
    """Slices of at most CHUNK_ROWS rows."""
    for at in range(0, rows, CHUNK_ROWS):
        yield slice(at, min(at + CHUNK_ROWS, rows))


def run_mlp(
    parts: LayerParts,
    middle_nM: Tensor,
    write: Callable[[slice, Tensor, Tensor | None], None],
    *,
    rows_n: Tensor | None,
    keep: bool,
    only_m: Tensor | None = None,
    joined: JoinedMap | None = None,
) -> dict[str, Tensor]:
    """The MLP up to its last map, which `write` applies chunk by chunk.

    Args:
        parts: the layer.
        middle_nM: (n, M) rows between attention and MLP; `write` may overwrite those of its chunk.
        write: takes a slice of the rows, their activation (rows, F), and their flat rows where dropout draws by them.
        rows_n: flat rows; None for the whole stream.
        keep: return the maps into the MLP, for backward.
        only_m: places of the rows for which they are returned; None for all.
        joined: of the last map; the activation then stands in the first columns of its room, which `write` gets.

    Returns:
        `gate` and, for a gated MLP, `up`: (n, F), or (m, F) with `only_m`, without what adapters of a low rank add,
        which is made again for backward; empty unless `keep`.
    """
    kept: dict[str, Tensor] = {}
    few = _Few(only_m, len(middle_nM)) if keep and only_m is not None else None
    # What is kept of all rows exists whole anyway.
    for rows in (slice(0, len(middle_nM)),) if keep and few is None else chunks(len(middle_nM)):
        numbers = _numbers(parts, rows_n, rows, middle_nM)
        normed = norm_forward(parts, 1, middle_nM[rows])[0]
        adapters = _adapters(parts, normed, numbers)
        wide = _wide(parts, normed, numbers)
        del normed
        room = None if joined is None else joined.room(len(wide[0]))
        out = None if joined is None or room is None else room[:, : joined.inputs]
        act = gated_act(wide[0], wide[1] if parts.gated else None, parts.act, adapters=adapters, out=out)
        if few is not None:
            few.take(rows, wide)
        elif keep:
            kept = dict(zip(("gate", "up"), wide, strict=False))
        del wide
        write(rows, act if room is None else room, numbers)
    return kept if few is None else dict(zip(("gate", "up"), few.found(), strict=False))


class _Few:
    """Maps into the MLP of some rows, picked up chunk by chunk.

    How many of them a chunk has is known to the device only. Of several chunks `write_rows_` takes the rows that are
    wanted and reads no other: those name a row behind the wanted ones, which nobody writes.
    """

    def __init__(self, places_m: Tensor, rows: int) -> None:
        self.places, self.count, self.buffers = places_m, len(places_m), []
        self.to_n = self.wanted_n = None
        if rows > CHUNK_ROWS:
            self.to_n = torch.full((rows,), self.count, dtype=torch.int64, device=places_m.device)
            self.to_n[places_m] = torch.arange(self.count, device=places_m.device)
            self.wanted_n = self.to_n < self.count

    def take(self, rows: slice, wide: list[Tensor]) -> None:
        if self.to_n is None or self.wanted_n is None:
            self.buffers = [t.index_select(0, self.places) for t in wide]
            return
        if not self.buffers:
            self.buffers = [t.new_empty(self.count + 1, t.shape[1]) for t in wide]
        for buffer, tensor in zip(self.buffers, wide, strict=True):
            write_rows_(buffer, self.to_n[rows], tensor, valid_n=self.wanted_n[rows])

    def found(self) -> list[Tensor]:
        return [buffer[: self.count] for buffer in self.buffers]


def _numbers(parts: LayerParts, rows_n: Tensor | None, part: slice, like: Tensor) -> Tensor | None:
    """Flat rows of a chunk, which dropout draws by; None where the chunk is the whole stream, or nothing drops."""
    if not parts.drops:
        return None
    if rows_n is not None:
        return rows_n[part]
    return torch.arange(part.start, part.stop, device=like.device)


def _wide(parts: LayerParts, normed_nM: Tensor, rows_n: Tensor | None) -> list[Tensor]:
    """Maps into the MLP, but for what `_adapters` says."""
    gates = parts.gates
    return gates.bases(normed_nM) if _adds(parts) else gates.forward(normed_nM, tuple(range(len(gates.parts))), rows_n)


def _adapters(parts: LayerParts, normed_nM: Tensor, rows_n: Tensor | None) -> Adapters:
    """What adapters add to the maps into the MLP while their activation is made: it is never written."""
    found = parts.gates.adapters(normed_nM, rows_n) if _adds(parts) else [None]
    return found[0], found[1] if parts.gated and len(found) > 1 else None


def _adds(parts: LayerParts) -> bool:
    """Whether adapters are added by `gated_act`."""
    return 0 < max(parts.gates.ranks) <= MOST_RANK


def mlp_backward(
    parts: LayerParts,
    grad_nM: Tensor,
    middle_nM: Tensor,
    saved: dict[str, Tensor],
    gradients: Gradients,
    rows_n: Tensor | None,
) -> None:
    """Turns the gradient of the rows behind the MLP into that of the rows before it, in place.

    Args:
        parts: the layer.
        grad_nM: (n, M) gradient behind the MLP, overwritten.
        middle_nM: (n, M) rows before it.
        saved: `gate` and `up` of `run_mlp`, or empty to compute them again. Their memory is used up.
        gradients: takes the tensors' gradients.
        rows_n: flat rows; None for the whole stream.
    """
    for rows in chunks(len(middle_nM)):
        wide = {k: v[rows] for k, v in saved.items()}
        numbers = _numbers(parts, rows_n, rows, middle_nM)
        _chunk_backward(parts, grad_nM[rows], middle_nM[rows], wide, gradients, numbers)


def _chunk_backward(
    parts: LayerParts,
    grad_nM: Tensor,
    middle_nM: Tensor,
    saved: dict[str, Tensor],
    gradients: Gradients,
    rows_n: Tensor | None,
) -> None:
    normed, _, rstd, mean = norm_forward(parts, 1, middle_nM)
    adapters = _adapters(parts, normed, rows_n)
    wide = list(saved.values()) if saved else _wide(parts, normed, rows_n)
    input_nM = normed if parts.gates.needs_input(gradients) else None
    del normed
    update = grad_nM if parts.multiplier == 1.0 else grad_nM * parts.multiplier
    want_act = parts.down.needs_input(gradients)
    grad_act = parts.down.backward(None, {0: update}, NOTHING, rows_N=rows_n)
    assert grad_act is not None
    # The gradients of gate and up take the memory of gate and up, the activation that of its own gradient.
    up = wide[1] if parts.gated else None
    options = {"adapters": adapters, "want_act": want_act, "reuse": True}
    found = gated_act_backward(grad_act, wide[0], up, parts.act, **options)
    del up, adapters
    del grad_act
    if want_act or any(gradients.wants(p) for p in parts.down.maps[0].places):
        parts.down.backward(found[2], {0: update}, gradients, want_input=False, rows_N=rows_n)
    grads = {0: found[0]} if found[1] is None else {0: found[0], 1: found[1]}
    del found  # and with it the activation
    grad_normed = parts.gates.backward(input_nM, grads, gradients, rows_N=rows_n)
    assert grad_normed is not None
    norm_backward(parts, 1, grad_normed, middle_nM, (rstd, mean), gradients, residual_nM=grad_nM, out_NM=grad_nM)


def norm_forward(
    parts: LayerParts, which: int, rows_nM: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """One of the layer's two norms; `options` are those of `norm_rows`."""
    norm = parts.norms[which]
    return norm_rows(rows_nM, norm.weight_M, bias_M=norm.bias_M, eps=norm.eps, kind=norm.kind, **options)


def norm_backward(
    parts: LayerParts,
    which: int,
    grad_nM: Tensor,
    rows_nM: Tensor,
    statistics: tuple[Tensor, Tensor | None],
    gradients: Gradients,
    **options: Tensor | None,
) -> Tensor | None:
    """Gradient through one of the layer's two norms; `options` are those of `norm_rows_backward`."""
    norm = parts.norms[which]
    weight, bias = (gradients.wants(place) for place in norm.places)
    found, grad_weight, grad_bias = norm_rows_backward(
        grad_nM,
        rows_nM,
        norm.weight_M,
        statistics[0],
        mean_n=statistics[1],
        weight_grad=weight,
        bias_grad=bias,
        **options,  # type: ignore[arg-type]
    )
    if weight:
        gradients.add(norm.places[0], grad_weight.to(norm.weight_M.dtype))
    if bias:
        assert norm.bias_M is not None
        gradients.add(norm.places[1], grad_bias.to(norm.bias_M.dtype))
    return found


def mlp_bypass(parts: LayerParts, rows_sM: Tensor, mlp: MlpRows) -> Tensor | None:
    """Update, with the layer's multiplier, of rows that skip an MLP with rows of its own; None for none."""
    if mlp.down_MR is None or mlp.up_RM is None:
        return None
    normed = norm_forward(parts, 1, rows_sM)[0]
    return Bypass(mlp.down_MR, mlp.up_RM).update(normed).mul_(parts.multiplier)


def mlp_bypass_backward(
    parts: LayerParts, grad_sM: Tensor, rows_sM: Tensor, mlp: MlpRows, gradients: Gradients
) -> Tensor:
    """Gradient of the rows before the MLP from that behind it, for rows that skip it."""
    assert mlp.down_MR is not None and mlp.up_RM is not None
    normed, _, rstd, mean = norm_forward(parts, 1, rows_sM)
    with torch.enable_grad():
        leaf = normed.requires_grad_()
        update = Bypass(mlp.down_MR, mlp.up_RM).update(leaf)
    (grad_normed,) = torch.autograd.grad(update, leaf, grad_sM * parts.multiplier)
    found = norm_backward(parts, 1, grad_normed, rows_sM, (rstd, mean), gradients, residual_nM=grad_sM)
    assert found is not None
    return found
