"""The laws of design section 2, checked on the user's own layers before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lemo.core.layout import Layout
from lemo.core.plan import LayerPlan, Plan
from lemo.core.policy import select
from lemo.core.selection import Selection
from lemo.errors import LemoError, UnsupportedModelError
from lemo.runtime.attention import attention_module
from lemo.runtime.batch import BatchContext
from lemo.runtime.head import segmented_forward, why_not_segmented
from lemo.runtime.model import decoder_layers, window_of
from lemo.runtime.rows import ACTIVE
from lemo.runtime.stream import LayerStream

_BLOCK, _BLOCKS = 4, 8
# Largest relative error of a layer's update. Eager softmax runs in fp32 whatever the dtype. Low precision rounds
# differently in every attention kernel; a row that attends to wrong keys differs by order one.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


def check_layers(handle: Any) -> None:
    """Compares one layer of each kind with dense and masked references on random tokens.

    Raises:
        UnsupportedModelError: a layer does not obey `y = x; y[rows] = layer(x[rows])`; the message says which.
    """
    model = handle.model
    parameters = list(model.parameters())
    if any(p.is_meta or hasattr(p, "full_tensor") for p in parameters):
        handle.note("self-test skipped: weights are sharded or not loaded")
        return
    skips = any(not x.is_dense for x in handle.plan.layers)
    tokens = _BLOCK * _BLOCKS
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, tokens), generator=generator)
    training, returns = model.training, model.config.return_dict
    model.eval()
    model.config.return_dict = True  # Transformers' own forwards fail on tuples in some releases
    attached, model.__dict__["_lemo_handle"] = model.__dict__.get("_lemo_handle"), None
    devices = [parameters[0].device] if parameters[0].is_cuda else []
    try:
        with torch.random.fork_rng(devices=devices):
            _check_head(handle, ids.to(parameters[0].device))
            stream = _open_stream(model, ids) if skips else None
            fused = handle.fused_layers() if skips else frozenset()
            for index in _one_of_each_kind(handle.plan, model) if skips else ():
                _try_layer(stream, index, frozenset())
                if index in fused:
                    _try_layer(stream, index, frozenset({index}))
    finally:
        model.__dict__["_lemo_handle"] = attached
        model.train(training)
        model.config.return_dict = returns


def _open_stream(model: Any, ids_BT: Tensor) -> LayerStream:
    try:
        return LayerStream.open(model, ids_BT, block_size=_BLOCK)
    except LemoError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot skip rows: its decoder expects more of a layer than hidden states "
            f"({_said(error)})"
        ) from error


def _said(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


@torch.no_grad()
def _check_head(handle: Any, ids_BT: Tensor) -> None:
    """Leaves the loss to a model that does more between its decoder and its loss than a linear head."""
    model, options = handle.model, handle._options
    own_forward = "forward" not in model.__dict__
    inputs = {"input_ids": ids_BT, "labels": ids_BT, "use_cache": False}
    segments = options["loss"] == "segmented" and not options["logits"] and own_forward
    if not segments or why_not_segmented(model, inputs) is not None:
        return
    own, segmented = model(**inputs).loss, segmented_forward(model, inputs, options["segment_rows"]).loss
    error = float((own.float() - segmented.float()).abs() / own.float().abs().clamp_min(1e-30))
    if not error <= _TOLERANCE[model.get_input_embeddings().weight.dtype]:
        options["loss"] = "model"
        handle.note(
            f"the model's own loss runs instead of the segmented one: they differ by {error:.1e} on a test sequence, "
            "so more than a linear head lies between the decoder and the loss"
        )


def _try_layer(stream: Any, index: int, fused: frozenset[int]) -> None:
    """`_check_layer`, where a layer that fails altogether is one that cannot skip rows."""
    try:
        _check_layer(stream, index, fused)
    except LemoError:
        raise
    except Exception as error:
        kind = type(decoder_layers(stream.model)[index]).__name__
        raise UnsupportedModelError(
            f"layer {index} ({kind}) cannot skip rows: it fails on some of its rows ({_said(error)}). "
            "Name it in dense_layers to run it densely"
        ) from error


def _one_of_each_kind(plan: Plan, model: Any) -> list[int]:
    """First skipping layer of each (class, attention type)."""
    found: dict[tuple, int] = {}
    named = getattr(model.config.get_text_config(), "layer_types", None) or ()
    for index, layer in enumerate(decoder_layers(model)):
        kind = (type(layer).__mro__[2], getattr(layer, "attention_type", None), getattr(layer, "layer_type", None))
        attention = getattr(layer, "self_attn", None)
        kind += (getattr(attention, "sliding_window", None), getattr(attention, "use_rope", None))
        kind += tuple(named[index : index + 1])
        if not plan.layers[index].is_dense:
            found.setdefault(kind, index)
    return sorted(found.values())


def _check_layer(stream: Any, index: int, fused: frozenset[int]) -> None:
    x_BTM, layout = stream.hidden_BTM, stream.layout
    dense_BTM = stream.dense(index, x_BTM).output_BTM
    scores_K = torch.rand(len(layout.block_start_K), generator=torch.Generator().manual_seed(1)).to(x_BTM.device)
    half = Plan(tuple(LayerPlan(0.5, 0.5) for _ in range(stream.layers)), block_size=_BLOCK, scorer="random")
    rows = select(layout, scores_K, forward_ratio=0.5, backward_ratio=0.5).forward
    assert rows is not None and ACTIVE.call is None
    kept_T = torch.zeros(layout.tokens, dtype=torch.bool, device=x_BTM.device)
    kept_T[rows.rows_N] = True
    for kv, keys_T in (("kept", kept_T), ("all", torch.ones_like(kept_T))):
        seen_TT = _window(stream, index, layout) & keys_T[None, :] | torch.eye(layout.tokens, dtype=torch.bool).to(
            kept_T.device
        )
        wanted = torch.where(kept_T[None, :, None], stream.masked(index, x_BTM, seen_TT), x_BTM)
        got = _run(stream, index, replace(half, kv=kv), Selection(rows, rows), fused)
        _compare(stream, index, got - x_BTM, wanted - x_BTM, f"rows kept by half (kv: {kv}) and a masked dense run")
    exact = replace(half, layers=tuple(LayerPlan(1.0, 0.5) for _ in range(stream.layers)))
    got = _run(stream, index, exact, Selection(None, rows), fused)
    _compare(stream, index, got - x_BTM, dense_BTM - x_BTM, "exact forward and a dense run")


def _run(stream: Any, index: int, plan: Plan, selection: Selection, fused: frozenset[int]) -> Tensor:
    """The layer under a selection given from outside."""
    context = BatchContext(plan, stream.layout, in_place=False, fused=fused)
    context.select = lambda i, x: selection  # type: ignore[method-assign]
    return stream.under(context, index, stream.hidden_BTM)


def _window(stream: Any, index: int, layout: Layout) -> Tensor:
    """(T, T) bool causal mask of the layer, with its sliding window."""
    window = window_of(attention_module(decoder_layers(stream.model)[index]))
    position_T = layout.position_of_row_N
    distance_TT = position_T[:, None] - position_T[None, :]
    seen_TT = distance_TT >= 0
    return seen_TT if window is None else seen_TT & (distance_TT < window)


def _compare(stream: Any, index: int, got: Tensor, wanted: Tensor, what: str) -> None:
    error = float((got.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-30))
    if not error <= _TOLERANCE[got.dtype]:
        kind = type(decoder_layers(stream.model)[index]).__name__
        raise UnsupportedModelError(
            f"layer {index} ({kind}) cannot skip rows: {what} differ by {error:.1e} of the layer's update. "
            "Name it in dense_layers to run it densely"
        )
