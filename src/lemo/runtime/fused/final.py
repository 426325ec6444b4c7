"""The norm before the head on loss rows only: the others' normed values would never be read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lemo.ops import norm_rows, norm_rows_backward
from lemo.runtime.fused.hooks import OUTPUT, RECORDERS, SHARDERS, why_hooked, why_replaced
from lemo.runtime.fused.layer import OWNED
from lemo.runtime.fused.parts import Norm, why_no_norm
from lemo.runtime.model import decoder_layers, in_force
from lemo.runtime.rows import without_class


@dataclass(frozen=True)
class Deferred:
    """What the decoder leaves to the loss: the norm before the head, on the rows that the loss reads.

    Attributes:
        norm: that norm.
        rows_S: (S,) int64 flat rows.
        labelled: every one of them carries a label, so that nobody has to ask the device which do.
    """

    norm: Norm
    rows_S: Tensor
    labelled: bool


class DeferringNorm:
    """Mixed in before the class of the norm in front of the head. `_lemo_norm` is set on the instance by `attach`."""

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hands the stream on as it is while a batch asks for loss rows only; else the norm."""
        handle = self.__dict__.get("_lemo_norm")
        if handle is not None and handle.context is not None and handle.context.defers_norm:
            return hidden_states
        return super().__call__(hidden_states, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are the norm without lemo."""
        return without_class(super().__reduce_ex__(protocol), DeferringNorm, ("_lemo_norm",))


@cache
def deferring_class(norm_class: type) -> type:
    """The subclass of a norm's class that can be deferred; same `__name__`, one per class."""
    body = {"__module__": norm_class.__module__, "__qualname__": norm_class.__qualname__, "__doc__": norm_class.__doc__}
    return type(norm_class.__name__, (DeferringNorm, norm_class), body)


def install_norm(module: nn.Module, handle: Any) -> None:
    """Makes a norm deferrable."""
    module.__dict__["_lemo_norm"] = handle
    module.__class__ = deferring_class(type(module))


def remove_norm(module: nn.Module) -> None:
    """Undoes `install_norm`."""
    del module.__dict__["_lemo_norm"]
    module.__class__ = type(module).__mro__[2]


def may_defer(handle: Any, name: str) -> bool:
    """Whether nobody but the loss would see that the norm before the head ran on some rows only, and not when called.

    Args:
        handle: has `model` and `note`, which is told why not.
        name: of the norm, in the model's decoder.
    """
    decoder = handle.model.base_model
    norm, above = decoder.get_submodule(name), name.split(".")[:-1]
    found = [(name, _has(why_hooked(m) or why_replaced(m))) for m in (norm, in_force(norm))]
    plain = why_no_norm(in_force(norm))
    found.append((name, _why_away(in_force(norm)) if plain is None else f"is {plain}"))
    # Who sees what the last layer returns sees all of it.
    last = decoder_layers(handle.model)[-1]
    found.append(("the last layer", _has(why_hooked(last, RECORDERS + SHARDERS, OUTPUT) or why_replaced(last))))
    # What hangs onto the modules around it runs, but would be given rows that are not normed.
    for depth in range(len(above) + 1):
        path = ".".join(above[:depth])
        module = decoder.get_submodule(path)
        found.append((path or "the decoder", _has(why_hooked(module, RECORDERS + SHARDERS) or why_replaced(module))))
    reason = next((f"{where} {what}" for where, what in found if what is not None), None)
    if reason is not None:
        handle.note(f"the last layer and the norm behind it run on all rows, not on those of the loss alone: {reason}")
    return reason is None


def _why_away(norm: nn.Module) -> str | None:
    sharded = hasattr(norm.weight, "full_tensor")
    return "is sharded and not gathered before the decoder runs" if sharded else None


def _has(what: str | None) -> str | None:
    return None if what is None else f"has {what}"


def final_rows(stream_BTM: Tensor, norm: Norm, rows_S: Tensor) -> Tensor:
    """Normed loss rows (S, M) of the stream behind the last layer.

    Args:
        stream_BTM: (B, T, M).
        norm: the norm before the head.
        rows_S: (S,) int64 flat rows.

    *Cost*: saves the S rows. Its backward makes the stream's gradient, zero elsewhere, which the layers then use in
    place.
    """
    return _FinalRows.apply(stream_BTM, norm, rows_S, norm.weight_M, norm.bias_M)


class _FinalRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, norm: Norm, rows_S: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        flat = stream.view(-1, stream.shape[-1])
        normed, rows, rstd, mean = norm_rows(
            flat, weight, bias_M=bias, rows_n=rows_S, eps=norm.eps, kind=norm.kind, keep_rows=True
        )
        ctx.shape = stream.shape
        ctx.save_for_backward(rows, rstd, mean, weight, rows_S)
        return normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, rstd, mean, weight, rows_S = ctx.saved_tensors
        stream = grad.new_zeros(ctx.shape)
        wanted = {"weight_grad": ctx.needs_input_grad[3], "bias_grad": ctx.needs_input_grad[4]}
        _, grad_weight, grad_bias = norm_rows_backward(
            grad.contiguous(),
            rows,
            weight,
            rstd,
            mean_n=mean,
            out_NM=stream.view(-1, stream.shape[-1]),
            out_rows_n=rows_S,
            **wanted,
        )
        setattr(stream, OWNED, True)
        grads = (None if g is None else g.to(weight.dtype) for g in (grad_weight, grad_bias))
        return stream, None, None, *grads
