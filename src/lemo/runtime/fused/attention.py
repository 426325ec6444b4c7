"""Queries, keys and values of a fused layer, its attention, and the way back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lemo.ops import (
    attend_backward,
    attend_forward,
    attend_local,
    attend_local_backward,
    norm_rows,
    norm_rows_backward,
    rope_rows_,
    write_rows_,
)
from lemo.ops.attend_rows.far import FarKeys
from lemo.ops.attend_rows.reference import Rows
from lemo.runtime.context import attend_near, put_wide
from lemo.runtime.fused.call import ExactRows, FusedCall
from lemo.runtime.fused.maps import Gradients
from lemo.runtime.fused.parts import LayerParts, Norm
from lemo.runtime.rows import PartedRows

State = dict[str, Tensor]

PART_BYTES = 2**30  # of a piece of attention's backward, where heads are spent; pieces that fill a GPU all the same
QUERY_BYTES = 8  # of a number of a query: its gradient in fp32 twice, ours and that of the vendor's kernel


def head_groups(kv_heads: int, pair_bytes: int, query_numbers: int) -> int:
    """Pieces of whole key heads that attention's backward takes by themselves, where heads are spent.

    Args:
        kv_heads: key heads, of which every piece has as many.
        pair_bytes: of the gradients of all keys and values.
        query_numbers: of all query heads of all queries.
    """
    needed = max(1, -(-(pair_bytes + QUERY_BYTES * query_numbers) // PART_BYTES))
    return next((n for n in range(needed, kv_heads) if kv_heads % n == 0), kv_heads)


def spent_groups(call: FusedCall, heads: State) -> int:
    """`head_groups` where nobody needs heads behind attention's backward: they were made again for it alone."""
    if call.keeps != "layer" or call.takes_keys:
        return 1
    key = heads["key"]
    return head_groups(len(key), 2 * key.numel() * key.element_size(), heads["query"].numel())


def make_heads(parts: LayerParts, call: FusedCall, normed_nM: Tensor) -> State:
    """Projections of a frame: `query`, `key`, `value` (rows, heads · D), before head norms and RoPE.

    Args:
        parts: the layer.
        call: the rows.
        normed_nM: (n, M) the frame's rows behind the first norm.
    """
    if call.places_n is None:
        query, key, value = parts.inputs.forward(normed_nM, (0, 1, 2), call.frame_rows)
    else:
        key, value = parts.inputs.forward(normed_nM, (1, 2), call.frame_rows)
        query = _make_queries(parts, call, normed_nM)
    return {"query": query, "key": key, "value": value}


def _make_queries(parts: LayerParts, call: FusedCall, normed_nM: Tensor) -> Tensor:
    """Projections (q, heads · D) of the rows that run, which are not all of the frame."""
    assert call.places_n is not None
    return parts.inputs.forward(normed_nM.index_select(0, call.places_n), (0,), call.rows_n)[0]


def remake_heads(
    parts: LayerParts, call: FusedCall, normed_nM: Tensor, saved: State, rows: tuple[Tensor | None, Tensor | None]
) -> tuple[State, State]:
    """Heads in backward as attention took them, and their projections where they are normed.

    Keys and values that forward kept (`FusedCall.takes_keys`) are taken as they are; queries are computed again.

    Args:
        parts: the layer.
        call: the rows.
        normed_nM: (n, M) the frame's rows behind the first norm.
        saved: `head_key` and `head_value`, or `pre_key` and `pre_value` where heads are normed, or neither.
        rows: flat rows of the queries and of the keys.
    """
    if "head_key" in saved:
        heads = turn_heads(parts, call, {"query": _make_queries(parts, call, normed_nM)}, rows)
        return heads | {name: saved[f"head_{name}"] for name in ("key", "value")}, {}
    if "pre_key" in saved:
        state = {name: saved[f"pre_{name}"] for name in ("key", "value")}
        state["query"] = _make_queries(parts, call, normed_nM)
    else:
        state = make_heads(parts, call, normed_nM)
    return turn_heads(parts, call, state, rows), state if parts.head_norms else {}


def turn_heads(parts: LayerParts, call: FusedCall, state: State, rows: tuple[Tensor | None, Tensor | None]) -> State:
    """Queries, keys and values as attention takes them: (heads, rows, D).

    Projections stay as they are where the head norms' backward needs them, and are rotated in place otherwise.

    Args:
        parts: the layer.
        call: the RoPE tables.
        state: `query`, `key`, `value` of `make_heads`, or `query` alone.
        rows: flat rows of the queries and of the keys.
    """
    split = {name: heads_NO.unflatten(-1, (-1, parts.head_dim)) for name, heads_NO in state.items()}
    if parts.head_norms:
        for name, norm in zip(("query", "key"), parts.head_norms, strict=True):
            split[name] = _norm_heads(norm, split[name])[0]
    _rotate(parts, call, split, rows, inverse=False)
    return {name: heads_NHD.transpose(0, 1) for name, heads_NHD in split.items()}


def _norm_heads(norm: Norm, heads_NHD: Tensor) -> tuple[Tensor, Tensor]:
    """Normed heads and their 1/rms (N·H,)."""
    normed, _, rstd, _ = norm_rows(heads_NHD.reshape(-1, heads_NHD.shape[-1]), norm.weight_M, eps=norm.eps)
    return normed.view(heads_NHD.shape), rstd


def _rotate(
    parts: LayerParts,
    call: FusedCall,
    split: State,
    rows: tuple[Tensor | None, Tensor | None],
    *,
    inverse: bool,
) -> None:
    """`query` and `key`, those that are there: (rows, heads, D)."""
    if not parts.rope or call.cosine_PR is None:
        return
    assert call.sine_PR is not None
    tables = call.cosine_PR, call.sine_PR
    if rows[0] is rows[1]:
        rope_rows_((split["query"], split["key"]), *tables, rows_N=rows[0], inverse=inverse)
        return
    for name, rows_N in zip(("query", "key"), rows, strict=True):
        if name in split:
            rope_rows_(split[name], *tables, rows_N=rows_N, inverse=inverse)


def attend(parts: LayerParts, heads: State, queries: Rows, keys: Rows) -> tuple[Tensor, Tensor]:
    """Attention output (rows, heads · D) and log-sum-exp (heads, rows)."""
    output_HND, lse_HN = attend_forward(
        heads["query"], heads["key"], heads["value"], queries, keys, scaling=parts.scaling, window=parts.window
    )
    return output_HND.transpose(0, 1).flatten(1), lse_HN


def attend_passing(parts: LayerParts, heads: State, call: FusedCall) -> tuple[Tensor, Tensor]:
    """`attend` for a call whose queries all pass gradient; some of them may be local loss rows."""
    parted = call.parted
    if parted is None:
        return attend(parts, heads, call.queries, call.keys)
    local = parted.local.windowed(parts.window)
    far_HfD, near_HlD = parted.cut(heads["query"], 1)
    if parted.near_all is None:
        near_HlD, near_Hl = attend_local(near_HlD, heads["key"], heads["value"], local, scaling=parts.scaling)
        near_lO = near_HlD.transpose(0, 1).flatten(1)
    else:
        near_lO, near_Hl = attend(parts, heads | {"query": near_HlD}, parted.near_all, call.keys)
    if not len(parted.far_n):
        return near_lO, near_Hl
    far_fO, far_Hf = attend(parts, heads | {"query": far_HfD}, parted.far, call.keys)
    return torch.cat([far_fO, near_lO]), torch.cat([far_Hf, near_Hl], 1)


def attend_frame(parts: LayerParts, heads: State, call: FusedCall) -> tuple[Tensor, Tensor]:
    """`attend` for the rows that run; those of exact forward may attend locally, but for wide rows with gradient."""
    if call.exact is None:
        return attend_passing(parts, heads, call)
    context = call.exact.context
    if context is None:
        return attend(parts, heads, call.queries, call.keys)
    pair = heads["key"], heads["value"]
    output_HND, lse_HN = attend_near(heads["query"], pair, context, parts.scaling, parts.window)
    for wide in context.wide:
        passing = heads | select_heads(heads, {"query": wide.places_n})
        far_nO, far_Hn = attend(parts, passing, wide.queries, call.keys)
        output_HND = put_wide(wide, output_HND, far_nO.unflatten(1, (-1, parts.head_dim)).transpose(0, 1))
        lse_HN.index_copy_(1, wide.places_n, far_Hn)
        del passing, far_nO, far_Hn  # before the next, if there is one
    return output_HND.transpose(0, 1).flatten(1), lse_HN


@dataclass(frozen=True)
class AttentionBackward:
    """What the backward of one attention needs: heads as attention saw them, and which rows they are.

    Attributes:
        heads: `query`, `key`, `value` (heads, rows, D).
        queries: documents and positions of the queries.
        keys: those of the keys.
        own: keys and values (G, n, D) of the query rows when all others are constants.
        far: the far keys that count; None for all.
        parted: the queries, when some of them attend locally.
        start: gradients (G, K, D) of keys and values to which these are added, in place; None for none.
        groups: pieces of as many heads that are done one after the other, a divisor of G; not with `own` or `start`.
            With more than one, gradients are written over `heads`.
    """

    heads: State
    queries: Rows
    keys: Rows
    own: tuple[Tensor, Tensor] | None = None
    far: FarKeys | None = None
    parted: PartedRows | None = None
    start: tuple[Tensor, Tensor] | None = None
    groups: int = 1

    def run(self, parts: LayerParts, grad_nO: Tensor, output_nO: Tensor, lse_HN: Tensor) -> State:
        """Gradients of `query`, `key`, `value`: (rows, heads, D)."""
        if self.groups > 1:
            return self._run_groups(parts, (grad_nO, output_nO), lse_HN)
        if self.parted is not None:
            return self._run_parted(self.parted, parts, (grad_nO, output_nO), lse_HN)
        shape = (-1, parts.head_dim)
        grads = attend_backward(
            grad_nO.unflatten(-1, shape).transpose(0, 1),
            self.heads["query"],
            self.heads["key"],
            self.heads["value"],
            output_nO.unflatten(-1, shape).transpose(0, 1),
            lse_HN,
            self.queries,
            self.keys,
            scaling=parts.scaling,
            window=parts.window,
            own=self.own,
            far=self.far,
            start=self.start,
        )
        return {name: g.transpose(0, 1) for name, g in zip(("query", "key", "value"), grads, strict=True)}

    def _run_groups(self, parts: LayerParts, rows: tuple[Tensor, Tensor], lse_HN: Tensor) -> State:
        """Gradients of some heads at a time, in the memory of these heads."""
        assert self.own is None and self.start is None
        pieces = zip(*(heads.chunk(self.groups) for heads in self.heads.values()), strict=True)
        columns = (t.chunk(self.groups, 1) for t in rows)
        for cut, grad, output, lse in zip(pieces, *columns, lse_HN.chunk(self.groups), strict=True):
            heads = dict(zip(self.heads, cut, strict=True))
            grads = replace(self, heads=heads, groups=1).run(parts, grad, output, lse)
            for name in heads:
                heads[name].transpose(0, 1).copy_(grads.pop(name))
        return {name: heads.transpose(0, 1) for name, heads in self.heads.items()}

    def _run_parted(self, parted: PartedRows, parts: LayerParts, rows: tuple[Tensor, Tensor], lse_HN: Tensor) -> State:
        """Gradients from local loss rows, to whose sums those from far rows are added.

        Local rows that saw all keys in forward bring the output and log-sum-exp of that: no more is needed for a
        gradient through near keys alone.
        """
        (far_grad, grad), (far_output, output) = (parted.cut(t, 0) for t in rows)
        (far_query, query), (far_lse, lse) = (parted.cut(t, 1) for t in (self.heads["query"], lse_HN))
        grad, output = (t.unflatten(-1, (-1, parts.head_dim)).transpose(0, 1) for t in (grad, output))
        operands = (grad, query, self.heads["key"], self.heads["value"], output, lse.contiguous())
        local = parted.local.windowed(parts.window)
        near_query, *pair = attend_local_backward(*operands, local, scaling=parts.scaling)
        near = near_query.transpose(0, 1)
        if not len(parted.far_n):
            return {"query": near, "key": pair[0].transpose(0, 1), "value": pair[1].transpose(0, 1)}
        heads = self.heads | {"query": far_query}
        work = replace(self, heads=heads, queries=parted.far, parted=None, start=(pair[0], pair[1]))
        grads = work.run(parts, far_grad, far_output, far_lse.contiguous())
        return grads | {"query": torch.cat([grads["query"], near])}


def unturn_heads(
    parts: LayerParts,
    call: FusedCall,
    grads: State,
    state: State,
    rows: tuple[Tensor | None, Tensor | None],
    gradients: Gradients,
) -> State:
    """Gradients of the projections, (rows, heads · D), from those of rotated and normed heads."""
    grads = {name: g if g.stride(-1) == 1 and g.is_contiguous() else g.contiguous() for name, g in grads.items()}
    _rotate(parts, call, grads, rows, inverse=True)
    if parts.head_norms:
        for name, norm in zip(("query", "key"), parts.head_norms, strict=True):
            grads[name] = _unnorm_heads(norm, grads[name], state[name], gradients)
    return {name: g.flatten(1) for name, g in grads.items()}


def _unnorm_heads(norm: Norm, grad_NHD: Tensor, before_NO: Tensor, gradients: Gradients) -> Tensor:
    width = grad_NHD.shape[-1]
    before = before_NO.unflatten(-1, (-1, width)).reshape(-1, width)
    rstd = norm_rows(before, norm.weight_M, eps=norm.eps)[2]
    wanted = gradients.wants(norm.places[0])
    found, weight, _ = norm_rows_backward(grad_NHD.reshape(-1, width), before, norm.weight_M, rstd, weight_grad=wanted)
    if wanted:
        gradients.add(norm.places[0], weight.to(norm.weight_M.dtype))
    return found.view(grad_NHD.shape)


def project_back(
    parts: LayerParts,
    call: FusedCall,
    grads: State,
    normed_nM: Tensor | None,
    gradients: Gradients,
    want_input: bool,
) -> Tensor | None:
    """Gradient of the normed frame rows (n, M), and of the input maps' tensors."""
    parts_of = {"query": 0, "key": 1, "value": 2}
    if call.places_n is None or call.exact is not None:
        numbered = {parts_of[name]: g for name, g in grads.items()}
        rows = call.frame_rows if call.exact is None else call.exact.rows_n
        return parts.inputs.backward(normed_nM, numbered, gradients, want_input=want_input, rows_N=rows)
    offered = {1: grads["key"], 2: grads["value"]}
    options = {"want_input": want_input, "rows_N": call.frame_rows}
    frame = parts.inputs.backward(normed_nM, offered, gradients, **options)
    chosen = None if normed_nM is None else normed_nM.index_select(0, call.places_n)
    options["rows_N"] = call.rows_n
    queries = parts.inputs.backward(chosen, {0: grads["query"]}, gradients, **options)
    if not want_input:
        return None
    assert frame is not None and queries is not None
    # Places are distinct: no atomics. Rows that are not valid pass no gradient.
    write_rows_(frame, call.places_n, queries, valid_n=call.valid_n, add=True)
    return frame


def kept_heads(heads: State, before: State, exact: ExactRows | None) -> State:
    """Queries, keys and values that levels `none` and `mlp` keep: of rows that pass gradient, and keys that get some.

    Where heads are normed, the projections `before` that are kept, and their norm and rotation made again.
    """
    if exact is not None:
        places = {"query": exact.ran_n}
        if not exact.keys:
            places |= {"key": exact.places_n, "value": exact.places_n}
        if before:
            before = before | {n: before[n].index_select(0, p) for n, p in places.items()}
        else:
            heads = heads | select_heads(heads, places)
    return {f"pre_{n}": t for n, t in before.items()} or {f"head_{n}": t for n, t in heads.items()}


def select_heads(heads: State, places: State) -> State:
    """Heads (heads, rows, D) of some rows, by name, laid out as projections are."""
    return {n: torch.index_select(heads[n].transpose(0, 1), 0, p).transpose(0, 1) for n, p in places.items()}
