"""linear_ce: loss of a language-model head whose logits never exist for the whole sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lemo.ops.backend import Backend, choose_backend
from lemo.ops.linear_ce.reference import count_items, shape_logits

# What the logits of one segment may take, with the copies that are made of them.
SEGMENT_BYTES = 512 << 20


def linear_ce(
    hidden_NM: Tensor,
    weight_VM: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_items: int | Tensor | None = None,
    segment_rows: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy of z = softcap·tanh(logit_scale·(h·Wᵀ + b) / softcap), logits in segments of rows.

    Gradients are computed in the forward pass, segment by segment, so the logits of one segment exist at a time. Rows
    whose label is `ignore_index` are dropped before the head. Without any label the loss is 0 with zero gradients.

    Args:
        hidden_NM: (..., M) floating input of the head.
        weight_VM: (V, M), frozen or trainable, may be tied to the embedding.
        labels_N: (...) integer label of each row, already shifted: row t holds the token that it predicts.
        bias_V: (V,) or None.
        ignore_index: label of rows without loss; None promises that every row carries a token, and nothing waits.
        softcap: final logit softcap, None for none.
        logit_scale: factor on the logits (a model that divides by s passes 1/s).
        num_items: divisor of the summed loss, an int or a 0-d tensor; None for the number of rows that carry a label.
        segment_rows: rows of a segment; None for as many as fit into 512 MiB (2,048 by the kernel in bf16 at 128,256
            tokens).
        backend: what turns logits into loss and gradient: `triton`, `reference` (torch, a wide copy of the logits), or
            `auto` to take the kernel where it can run.

    Returns:
        0-d loss, fp32 (fp64 for fp64 input).

    Raises:
        BackendError: `triton` was asked for and cannot run; the message says why.
        ValueError: shapes, dtypes or devices do not fit, `segment_rows` is not positive, or, on the CPU, the promise of
            `ignore_index=None` is broken.

    Cost:
        2·n·V·M FLOPs for the loss and as many each for the gradients of hidden and weight, n the rows with a label;
        in bf16 2·segment_rows·V bytes at a time by the kernel, else 6 (10 with a softcap); saves gradients of hidden
        (n·M) and, when trained, of the weight (V·M). One host synchronisation, to count the rows with a label, unless
        `ignore_index` is None.

    Numerics:
        logits in the input's (or autocast's) dtype as a model makes them, softmax and loss in fp32, the gradient of
        logits rounded to their dtype; the weight's gradient is accumulated over segments in fp32. Exact gradients; no
        second derivative.

    Source:
        LeMo section 4 (segment-based peak cutting); docs/method.md.
    """
    _check(hidden_NM, labels_N, segment_rows)
    if weight_VM.dim() != 2 or weight_VM.shape[1] != hidden_NM.shape[-1] or weight_VM.device != hidden_NM.device:
        raise ValueError(f"weight_VM must be (V, {hidden_NM.shape[-1]}), got {tuple(weight_VM.shape)}")
    if bias_V is not None and tuple(bias_V.shape) != (weight_VM.shape[0],):
        raise ValueError(f"bias_V must be ({weight_VM.shape[0]},), got {tuple(bias_V.shape)}")
    chosen = choose_backend("linear_ce", backend, lambda: _why_not_triton(hidden_NM))
    rows_NM, labels_N = _labelled(hidden_NM, labels_N, ignore_index)
    graph = torch.is_grad_enabled()
    total = torch.ops.lemo.linear_ce(
        rows_NM,
        weight_VM,
        labels_N,
        bias_V,
        softcap,
        logit_scale,
        segment_rows or _fitting_rows(hidden_NM, len(weight_VM), softcap, chosen),
        graph and rows_NM.requires_grad,
        graph and weight_VM.requires_grad,
        graph and bias_V is not None and bias_V.requires_grad,
        chosen == "triton",
    )[0]
    return total / _divisor(num_items, total, len(labels_N))


def linear_ce_module(
    head: Callable[[Tensor], Tensor],
    hidden_NM: Tensor,
    labels_N: Tensor,
    *,
    ignore_index: int | None = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_items: int | Tensor | None = None,
    segment_rows: int = 2048,
) -> Tensor:
    """linear_ce for a head that is not a plain linear (LoRA on the head, a sharded weight), by checkpointed segments.

    The head runs at least once, on no rows if need be, so that its parameters always get a gradient. It runs
    ceil(n / segment_rows) times, n the rows with a label: a head whose call is a collective must be given so many
    `segment_rows` that every rank calls it equally often.

    Args:
        head: maps (n, M) to logits (n, V), bias included, softcap and scale not.
        hidden_NM: as in `linear_ce`, like all arguments that follow.
        labels_N: (...) integer labels, already shifted.
        ignore_index: label of rows without loss; None promises that every row carries a token, and nothing waits.
        softcap: final logit softcap, None for none.
        logit_scale: factor on the logits.
        num_items: divisor of the summed loss; None for the number of rows that carry a label.
        segment_rows: rows of a segment.

    Returns:
        0-d loss, fp32 (fp64 for fp64 input).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, `segment_rows` is not positive, or, on the CPU, the promise of
            `ignore_index=None` is broken.

    Cost:
        the head twice forward and once backward; the logits of one segment exist at a time.
    """
    _check(hidden_NM, labels_N, segment_rows)
    rows_NM, labels_N = _labelled(hidden_NM, labels_N, ignore_index)

    def loss_of(segment_NM: Tensor, segment_labels_N: Tensor) -> Tensor:
        return F.cross_entropy(shape_logits(head(segment_NM), softcap, logit_scale), segment_labels_N, reduction="sum")

    pieces = zip(rows_NM.split(segment_rows), labels_N.split(segment_rows), strict=True)
    # Segments run under a checkpoint even without gradient: then checkpoint is a plain call.
    total = torch.stack([checkpoint(loss_of, *piece, use_reentrant=False) for piece in pieces]).sum()
    return total / _divisor(num_items, total, len(labels_N))


def _check(hidden: Tensor, labels: Tensor, segment_rows: int | None) -> None:
    if hidden.dim() < 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden_NM must be (..., M) floating, got {tuple(hidden.shape)} {hidden.dtype}")
    if labels.numel() * hidden.shape[-1] != hidden.numel() or labels.dtype.is_floating_point:
        raise ValueError(
            f"labels_N must be integers, one per row of {tuple(hidden.shape)}, got {tuple(labels.shape)} {labels.dtype}"
        )
    if labels.device != hidden.device:
        raise ValueError(f"labels_N is on {labels.device}, hidden_NM on {hidden.device}")
    if segment_rows is not None and segment_rows < 1:
        raise ValueError(f"segment_rows must be positive, got {segment_rows}")


def _why_not_triton(hidden: Tensor) -> str | None:
    try:
        from lemo.ops.linear_ce import kernel
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return kernel.why_not(hidden)


def _fitting_rows(hidden: Tensor, vocabulary: int, softcap: float | None, backend: Backend) -> int:
    """Rows whose logits, with the copies that are made of them, fit into SEGMENT_BYTES; in steps of 256 if so many."""
    wide = torch.promote_types(hidden.dtype, torch.float32).itemsize
    copies = 0 if backend == "triton" else 1 if softcap is None else 2
    rows = max(1, SEGMENT_BYTES // (vocabulary * (hidden.dtype.itemsize + copies * wide)))
    return rows // 256 * 256 or rows


def _labelled(hidden: Tensor, labels: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Rows that carry a label, and their labels."""
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    if ignore_index is None:
        if labels.device.type == "cpu" and bool((labels < 0).any()):
            raise ValueError(
                "ignore_index=None promises that every row carries a token, but labels_N has negative ones"
            )
        return hidden, labels
    rows = (labels != ignore_index).nonzero().squeeze(1)
    if len(rows) == len(labels):
        return hidden, labels
    return hidden.index_select(0, rows), labels.index_select(0, rows)


def _divisor(num_items: int | Tensor | None, total: Tensor, valid_rows: int) -> int | Tensor:
    items = count_items(num_items, valid_rows)
    return items.to(total.device) if isinstance(items, Tensor) else items


_SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, float? softcap, float logit_scale, int segment_rows, "
    "bool grad_hidden, bool grad_weight, bool grad_bias, bool triton) -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("lemo::linear_ce", mutates_args=(), schema=_SCHEMA)
def _linear_ce(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """Summed loss and its gradients; a gradient that is not asked for is an empty tensor."""
    softcap, logit_scale, segment_rows, grad_hidden, grad_weight, grad_bias, triton = rest
    wide, grad = torch.promote_types(hidden.dtype, torch.float32), grad_hidden or grad_weight or grad_bias
    losses = []
    d_hidden = hidden.new_empty(hidden.shape if grad_hidden else (0,))
    d_weight = weight.new_zeros(weight.shape if grad_weight else (0,), dtype=wide)
    d_bias = weight.new_zeros(len(weight) if grad_bias else 0, dtype=wide)
    for at in range(0, len(labels), segment_rows):
        rows = slice(at, at + segment_rows)
        segment = hidden[rows]
        logits = F.linear(segment, weight, bias)
        loss = _segment_loss_in_place if triton else _segment_loss
        loss_sum, z = loss(logits, labels[rows], softcap, logit_scale, grad)
        losses.append(loss_sum)
        if grad_bias:
            d_bias += z.sum(0, dtype=wide)
        # Into the memory of the logits, which are needed no more.
        d_logits = logits.copy_(z) if (grad_hidden or grad_weight) and z is not logits else logits
        if grad_hidden and d_logits.dtype == weight.dtype == d_hidden.dtype:
            torch.mm(d_logits, weight, out=d_hidden[rows])
        elif grad_hidden:
            d_hidden[rows] = d_logits @ weight.to(d_logits.dtype)
        if grad_weight:
            d_weight += d_logits.mT @ segment.to(d_logits.dtype)
        del logits, d_logits, z  # or they would live beside the next segment's
    total = torch.stack(losses).sum() if losses else hidden.new_zeros((), dtype=wide)
    return total, d_hidden, d_weight.to(weight.dtype), d_bias.to(weight.dtype if bias is None else bias.dtype)


def _segment_loss_in_place(
    logits: Tensor, labels: Tensor, softcap: float | None, logit_scale: float, grad: bool
) -> tuple[Tensor, Tensor]:
    """As `_segment_loss`, by the kernel: the gradient takes the place of the logits."""
    from lemo.ops.linear_ce import kernel

    loss_N = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
    kernel.launch(logits, labels, loss_N, softcap, logit_scale, grad)
    return loss_N.sum(), logits


def _segment_loss(
    logits: Tensor, labels: Tensor, softcap: float | None, logit_scale: float, grad: bool
) -> tuple[Tensor, Tensor]:
    """Summed loss of a segment and, in `logits`' wide dtype, its gradient with respect to the logits."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    slope = logit_scale
    if logit_scale != 1.0:
        z.mul_(logit_scale)
    if softcap is not None:
        z.div_(softcap).tanh_()
        slope = z.square().neg_().add_(1.0).mul_(logit_scale) if grad else None
        z.mul_(softcap)
    # Log-sum-exp and softmax in place: torch's own would hold a second copy of the logits.
    top, picked = z.amax(-1, keepdim=True), z.gather(1, labels[:, None])
    sum_exp = z.sub_(top).exp_().sum(-1, keepdim=True)
    loss = (top + sum_exp.log() - picked).sum()
    if grad:
        z.div_(sum_exp).scatter_add_(1, labels[:, None], z.new_full((len(z), 1), -1.0))
        if softcap is not None or logit_scale != 1.0:
            z.mul_(slope)
    return loss, z


@_linear_ce.register_fake
def _fake(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    grad_hidden, grad_weight, grad_bias = rest[-4:-1]
    return (
        hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32)),
        hidden.new_empty(hidden.shape if grad_hidden else (0,)),
        weight.new_empty(weight.shape if grad_weight else (0,)),
        weight.new_empty(len(weight) if grad_bias else 0, dtype=weight.dtype if bias is None else bias.dtype),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    # Gradients are saved outputs; without this autograd would make zeros of their size in backward.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.grads = inputs[-4:-1]


def _backward(ctx: Any, grad_total: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        # `once_differentiable` would say so only where the incoming gradient requires grad, and a loss's own does not.
        raise RuntimeError(
            "linear_ce has no second derivative: its gradients were made in forward, so create_graph=True cannot "
            "differentiate them. For lemo.attach, loss='model' keeps the model's own loss"
        )
    scaled = [
        # The scale stays fp32: rounding 1/num_items to bf16 would bend every gradient by the same 0.2 %.
        torch.mul(saved, grad_total.reshape(1), out=torch.empty_like(saved))
        if wanted and grad_total is not None
        else None
        for saved, wanted in zip(ctx.saved_tensors, ctx.grads, strict=True)
    ]
    return (scaled[0], scaled[1], None, scaled[2], *[None] * 7)


_linear_ce.register_autograd(_backward, setup_context=_setup_context)
