"""A decoder layer as one autograd function: one residual stream written in place, only backward rows saved."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lemo.errors import UnsupportedModelError
from lemo.ops import writable
from lemo.runtime.fused.backward import LayerBackward
from lemo.runtime.fused.call import FusedCall
from lemo.runtime.fused.forward import LayerForward
from lemo.runtime.fused.maps import Gradients
from lemo.runtime.fused.parts import LayerParts

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
        work = LayerForward(parts, call, output.view(-1, output.shape[-1]), needs_grad)
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
            LayerBackward(ctx.parts, ctx.call, flat, saved | fetched, gradients, wants_stream).run()
        if wants_stream and not shown:
            setattr(grad, OWNED, True)
        return (grad if wants_stream else None, None, None, *gradients.finish(ctx.parts.tensors))
