"""Attention of selected rows, registered with Transformers' attention interface as `lemo`.

Inside a layer call of lemo the rows' own documents and positions decide who attends to whom; positions, not the
compact order, count for sliding windows. Outside of one, the implementation that the model was loaded with runs.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lemo.errors import UnsupportedModelError
from lemo.ops import attend_forward, attend_rows, attend_rows_constant
from lemo.ops.attend_local.plan import LocalRows
from lemo.ops.attend_local.reference import local_mask
from lemo.ops.attend_rows.reference import Rows
from lemo.ops.attend_rows.tiling import laid_out
from lemo.runtime.context import attend_near, put_wide
from lemo.runtime.far import attend_far
from lemo.runtime.local import attend_local_rows
from lemo.runtime.pairs import attend_pairs
from lemo.runtime.rows import ACTIVE, LayerCall, RowRange

NAME = "lemo"
_QUERY_CHUNK = 1024  # rows whose mask or scores exist at a time


class CapturedKeys(Exception):
    """Carries keys and values of rows that offer nothing else; raised and caught inside one layer call."""

    def __init__(self, key_GSD: Tensor, value_GSD: Tensor) -> None:
        """Args: key_GSD, value_GSD: (G, S, D) keys after RoPE, and values."""
        super().__init__()
        self.key_GSD, self.value_GSD = key_GSD, value_GSD


class AttentionConfig:
    """A layer's configuration that names lemo's attention and is the model's own in everything else."""

    def __init__(self, config: Any) -> None:
        """Args: config: the configuration that the attention module had."""
        self.__dict__["base"] = config

    _attn_implementation = NAME

    def __getattr__(self, name: str) -> Any:
        """Everything else comes from the model's configuration, as it is now."""
        return getattr(self.__dict__["base"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Writes go to the model's configuration."""
        setattr(self.__dict__["base"], name, value)

    def __deepcopy__(self, memo: dict) -> Any:
        """A copy of the configuration itself: copies of a model are without lemo."""
        return copy.deepcopy(self.__dict__["base"], memo)

    def __reduce__(self) -> tuple:
        """Pickles as the configuration itself."""
        return _same, (self.__dict__["base"],)


def _same(config: Any) -> Any:
    return config


def register() -> None:
    """Adds `lemo` to Transformers' attention interface (an entry of its own; nothing existing changes)."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)


def register_mask() -> None:
    """Adds `lemo` to Transformers' mask interface: no mask at all, because rows carry documents and positions."""
    from transformers import AttentionMaskInterface

    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def attention_module(layer: nn.Module) -> nn.Module | None:
    """The one child of a decoder layer that computes softmax attention through Transformers' interface."""
    found = [child for child in layer.children() if hasattr(child, "config") and "Attention" in type(child).__name__]
    return found[0] if len(found) == 1 else None


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function. query (B, H, T, D), key and value (B, G, T, D); returns ((B, T, H, D), weights or None).

    Keywords as Transformers passes them: scaling, dropout, sliding_window, softcap, s_aux (sinks).
    """
    call = ACTIVE.call
    if call is not None:
        query, key, value = _as_autocast(query, key, value)
    if ACTIVE.capture:
        raise CapturedKeys(_flat(key), _flat(value))
    if call is None:
        return _base_function(module)(module, query, key, value, attention_mask, **kwargs)
    if call.queries is None:
        return _recorded_dense(call, module, query, key, value, attention_mask, kwargs)
    query_HND, key_GND, value_GND = query[0], key[0], value[0]
    output_HND = _attend_rows(call, module, query_HND, key_GND, value_GND, kwargs)
    return output_HND.transpose(0, 1).unsqueeze(0), None


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast hands to torch's own attention: RoPE leaves queries and keys in fp32 beside values in bf16."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _base_function(module: nn.Module) -> Callable:
    """The attention function that would run without lemo."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = module.config
    name = ACTIVE.base_implementation or config.__dict__["base"]._attn_implementation
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def _flat(state_BGTD: Tensor) -> Tensor:
    """(B, G, T, D) → (G, B·T, D)."""
    return state_BGTD.transpose(0, 1).flatten(1, 2)


def _recorded_dense(
    call: LayerCall, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict
) -> tuple[Tensor, Tensor | None]:
    """All rows in their usual shape; keys, values and, if asked, queries are recorded."""
    record = call.record
    assert record is not None and not record.want_lse  # the exact pass of `pairs` gives its rows as a range
    record.key_GND, record.value_GND = _flat(key), _flat(value)
    record.scaling = _scaling(query, kwargs)
    if record.want_query:
        record.query_HND = _flat(query)
    return _base_function(module)(module, query, key, value, mask, **kwargs)


def _attend_rows(
    call: LayerCall, module: nn.Module, query_HND: Tensor, key_GND: Tensor, value_GND: Tensor, kwargs: dict
) -> Tensor:
    """Attention of the packed rows of one layer call: (H, N, D)."""
    queries, record = call.queries, call.record
    assert queries is not None
    scaling = _scaling(query_HND, kwargs)
    window, softcap, sinks = kwargs.get("sliding_window"), kwargs.get("softcap"), kwargs.get("s_aux")
    dropout = kwargs.get("dropout") or 0.0
    plain = window is None and softcap is None and sinks is None
    if (call.dense is not None or (record is not None and record.want_lse)) and not plain:
        raise UnsupportedModelError(
            f"the `pairs` gradient needs plain causal attention, but {type(module).__name__} has a sliding window, "
            "soft cap or sinks; use gradient='rows'"
        )
    if call.dense is not None:
        return attend_pairs(query_HND, key_GND, value_GND, *call.dense, queries, scaling)
    simple = softcap is None and sinks is None and dropout == 0
    if call.far is not None and (window is not None or not simple):
        raise UnsupportedModelError(
            f"far_share below 1 needs plain causal attention, but {type(module).__name__} has a sliding window, soft "
            "cap, sinks or dropout"
        )
    if call.keys is not None and call.keys.constant is not None and simple:
        own, limits = (key_GND, value_GND), {"scaling": scaling, "window": window}
        if call.far is not None:
            return attend_far(query_HND, own, call.keys.constant, (queries, call.keys.range), call.far, scaling)
        return attend_rows_constant(query_HND, own, call.keys.constant, queries, call.keys.range, **limits)
    keys = queries
    if call.keys is not None:
        keys = call.keys.range
        key_GND, value_GND = _all_keys(call, key_GND, value_GND)
    if call.parted is not None:
        options = (scaling, dropout, window, softcap, sinks)
        return _attend_parted(call, query_HND, (key_GND, value_GND), keys, options)
    if call.far is not None:
        return attend_far(query_HND, (key_GND, value_GND), None, (queries, keys), call.far, scaling)
    if record is not None:
        record.key_GND, record.value_GND, record.scaling = key_GND, value_GND, scaling
        if call.context is not None:
            options = (scaling, dropout, window, softcap, sinks)
            return _attend_locally(call, query_HND, (key_GND, value_GND), keys, options)
        if record.want_lse:
            output_HND, lse_HN = attend_forward(query_HND, key_GND, value_GND, queries, keys, scaling=scaling)
            record.output_HND, record.lse_HN = output_HND, lse_HN
            return output_HND
    if keys is queries and plain:
        return _causal(query_HND, key_GND, value_GND, queries, scaling, dropout)
    if simple:
        return attend_rows(query_HND, key_GND, value_GND, queries, keys, scaling=scaling, window=window)
    return _positioned(query_HND, key_GND, value_GND, queries, keys, (scaling, dropout, window, softcap, sinks))


def _attend_locally(
    call: LayerCall, query_HND: Tensor, pair: tuple[Tensor, Tensor], keys: RowRange, options: tuple
) -> Tensor:
    """Attention of an exact pass: of wide rows to all keys, of the others to those near them; no gradient."""
    context, record, (scaling, _, window, softcap, sinks) = call.context, call.record, options
    assert context is not None and record is not None and call.queries is not None
    explicit = softcap is not None or sinks is not None
    if explicit:
        output_HND = _positioned(query_HND, *pair, call.queries, keys, options, context.local.windowed(window))
        lse_HN = None
    else:
        output_HND, lse_HN = attend_near(query_HND, pair, context, scaling, window)
    for wide in context.wide:
        passing, queries = query_HND.index_select(1, wide.places_n), wide.queries
        if explicit:
            far_HnD = _positioned(passing, *pair, queries, keys, options)
        elif not record.want_lse:
            far_HnD = attend_rows(passing, *pair, queries, keys, scaling=scaling, window=window)
        else:
            far_HnD, far_Hn = attend_forward(passing, *pair, queries, keys, scaling=scaling)
            assert lse_HN is not None
            lse_HN = lse_HN.index_copy(1, wide.places_n, far_Hn)
        output_HND = put_wide(wide, output_HND, far_HnD)
    if record.want_lse and context.wide:
        record.output_HND, record.lse_HN = output_HND, lse_HN
    return output_HND


def _attend_parted(
    call: LayerCall, query_HND: Tensor, pair: tuple[Tensor, Tensor], keys: RowRange, options: tuple
) -> Tensor:
    """Attention of rows with gradient: of far ones to all keys, of local loss rows to those near them.

    Local loss rows may see all keys; then, too, their gradient goes through the near ones alone.
    """
    parted, (scaling, _, window, softcap, sinks) = call.parted, options
    assert parted is not None
    local = parted.local.windowed(window)
    near_HlD, far_HfD = (query_HND.index_select(1, places) for places in (parted.near_n, parted.far_n))
    explicit = softcap is not None or sinks is not None
    if explicit:
        near_HlD = _positioned(near_HlD, *pair, local.queries, keys, options, local, parted.near_all is not None)
    else:
        all_of = None if parted.near_all is None else (parted.near_all, keys)
        near_HlD = attend_local_rows(near_HlD, pair, local, scaling, all_of)
    if not len(parted.far_n):
        return near_HlD
    if explicit:
        far_HfD = _positioned(far_HfD, *pair, parted.far, keys, options)
    elif call.far is not None:
        far_HfD = attend_far(far_HfD, pair, None, (parted.far, keys), call.far, scaling)
    else:
        far_HfD = attend_rows(far_HfD, *pair, parted.far, keys, scaling=scaling, window=window)
    places = torch.cat([parted.near_n, parted.far_n])
    return torch.empty_like(query_HND).index_copy(1, places, torch.cat([near_HlD, far_HfD], 1))


def _scaling(query: Tensor, kwargs: dict) -> float:
    scaling = kwargs.get("scaling")
    return query.shape[-1] ** -0.5 if scaling is None else float(scaling)


def _all_keys(call: LayerCall, key_GND: Tensor, value_GND: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of every key row: the queries' own with gradient, the others as the call gives them."""
    keys = call.keys
    assert keys is not None
    if keys.constant is not None:
        key_GKD, value_GKD = keys.constant
    else:
        size = keys.range.position_N.shape[0]
        key_GKD = key_GND.new_zeros(key_GND.shape[0], size, key_GND.shape[2])
        value_GKD = value_GND.new_zeros(value_GND.shape[0], size, value_GND.shape[2])
        if ACTIVE.scratch:
            key_GKD = key_GKD.index_copy(1, keys.offered_S, ACTIVE.scratch["key"].to(key_GKD.dtype))
            value_GKD = value_GKD.index_copy(1, keys.offered_S, ACTIVE.scratch["value"].to(value_GKD.dtype))
    return key_GKD.index_copy(1, keys.own_N, key_GND), value_GKD.index_copy(1, keys.own_N, value_GND)


def _causal(
    query_HND: Tensor, key_GND: Tensor, value_GND: Tensor, rows: RowRange, scaling: float, dropout: float
) -> Tensor:
    """Causal attention inside each document of the compact rows, by the vendor's kernel."""
    grouped = query_HND.shape[0] != key_GND.shape[0]
    pieces = []
    for start, length in zip(rows.starts, rows.lengths, strict=True):
        piece = slice(start, start + length)
        output_1HND = F.scaled_dot_product_attention(
            query_HND[None, :, piece],
            key_GND[None, :, piece],
            value_GND[None, :, piece],
            dropout_p=dropout,
            is_causal=length > 1,
            scale=scaling,
            enable_gqa=grouped,
        )
        if output_1HND.requires_grad:
            # torch keeps cuDNN's backward by the layout of query, key and value only: with a gradient that lies as
            # the output does, one graph is right for every caller of the same sizes.
            output_1HND.register_hook(partial(laid_out, strides=output_1HND.stride()))
        pieces.append(output_1HND.squeeze(0))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _positioned(
    query_HND: Tensor,
    key_GKD: Tensor,
    value_GKD: Tensor,
    queries: Rows,
    keys: Rows,
    options: tuple,
    local: LocalRows | None = None,
    see_all: bool = False,
) -> Tensor:
    """Attention by original positions with soft caps, sinks or dropout: scores exist for one chunk at a time.

    With `local`, to near keys alone; if `see_all`, to all keys, of which only near ones pass gradient.
    """
    scaling, dropout, window, softcap, sinks = options
    repeat = query_HND.shape[0] // key_GKD.shape[0]
    pieces = []
    for q_start, q_length, k_start, k_length in zip(
        queries.starts, queries.lengths, keys.starts, keys.lengths, strict=True
    ):
        key_HKD = key_GKD[:, k_start : k_start + k_length].repeat_interleave(repeat, 0)
        value_HKD = value_GKD[:, k_start : k_start + k_length].repeat_interleave(repeat, 0)
        for begin in range(0, q_length, _QUERY_CHUNK):
            end = min(begin + _QUERY_CHUNK, q_length)
            # Rows ascend, so the last query of the chunk cannot see past this key (invalid rows break the order).
            ordered = queries.valid_N is None and keys.valid_N is None
            seen = k_length - (q_length - end) if ordered else k_length
            rows = slice(q_start + begin, q_start + end)
            columns = slice(k_start, k_start + seen)
            near_QK = None if local is None else local_mask(local, rows, columns)
            wide = near_QK is None or see_all
            mask_QK = _mask(queries, keys, rows, columns, window) if wide else near_QK
            inputs = (query_HND[:, rows], key_HKD[:, :seen], value_HKD[:, :seen], mask_QK)
            passing_QK = near_QK if see_all else None
            pieces.append(_explicit(*inputs, (scaling, dropout, softcap, sinks), passing_QK))
    return torch.cat(pieces, dim=1)


def _mask(queries: Rows, keys: Rows, q: slice, k: slice, window: int | None) -> Tensor:
    """(Q, K) bool: which keys a query may see."""
    distance_QK = queries.position_N[q, None] - keys.position_N[None, k]
    mask_QK = distance_QK >= 0
    if window is not None:
        mask_QK &= distance_QK < window
    if keys.valid_N is not None:
        mask_QK &= keys.valid_N[None, k]
    # A row that was not chosen is computed to no effect; without its own key its softmax would be empty (NaN).
    return mask_QK | (distance_QK == 0)


def _explicit(
    query_HQD: Tensor,
    key_HKD: Tensor,
    value_HKD: Tensor,
    mask_QK: Tensor,
    options: tuple,
    passing_QK: Tensor | None = None,
) -> Tensor:
    """Scores written out, for soft caps, sinks and dropout, which no kernel here takes.

    Where `passing_QK` is not, scores and values are constants.
    """
    scaling, dropout, softcap, sinks = options
    scores_HQK = query_HQD @ key_HKD.transpose(1, 2) * scaling
    if passing_QK is not None:
        scores_HQK = torch.where(passing_QK, scores_HQK, scores_HQK.detach())
    if softcap is not None:
        scores_HQK = torch.tanh(scores_HQK / softcap) * softcap
    scores_HQK = scores_HQK.masked_fill(~mask_QK, torch.finfo(scores_HQK.dtype).min)
    if sinks is not None:
        sink_HQ1 = sinks.reshape(-1, 1, 1).expand(-1, scores_HQK.shape[1], 1).to(scores_HQK.dtype)
        scores_HQK = torch.cat([scores_HQK, sink_HQ1], dim=-1)
    accumulate = torch.float64 if scores_HQK.dtype == torch.float64 else torch.float32
    weights_HQK = torch.softmax(scores_HQK, dim=-1, dtype=accumulate).to(query_HQD.dtype)
    weights_HQK = F.dropout(weights_HQK[..., : key_HKD.shape[1]], p=dropout, training=dropout > 0)
    if passing_QK is None:
        return weights_HQK @ value_HKD
    near_HQK = weights_HQK.masked_fill(~passing_QK, 0)
    return near_HQK @ value_HKD + (weights_HQK - near_HQK) @ value_HKD.detach()
