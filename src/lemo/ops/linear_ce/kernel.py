"""Triton kernel of linear_ce: loss of every row of a segment, and its gradient in the memory of the logits.

One program owns a row. The first walk over the vocabulary finds maximum and sum of exponentials together, rescaling the
sum when the maximum grows; the second, over logits that are still in the second-level cache, writes
(softmax - onehot) · slope over them. All arithmetic is fp32 in registers: the logits have no wide copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lemo.ops.backend import interpreting, on_device_of, why_no_kernel


@dataclass(frozen=True)
class Tiling:
    """How a program walks its row: logits at a time, and its warps."""

    logits: int
    warps: int


# The first is in use; the benchmark times all.
CANDIDATES = (Tiling(16384, 16), Tiling(32768, 32), Tiling(8192, 8), Tiling(4096, 4), Tiling(8192, 16))
INTERPRETED = Tiling(8, 1)


def why_not(hidden: Tensor) -> str | None:
    """Why the kernel cannot run on this input of the head; None if it can."""
    return why_no_kernel(hidden)


def launch(
    logits: Tensor,
    labels: Tensor,
    loss: Tensor,
    softcap: float | None,
    logit_scale: float,
    grad: bool,
    tiling: Tiling | None = None,
) -> None:
    """Writes the loss of each row into `loss` (n,) fp32 and, if `grad`, its gradient over `logits` (n, V).

    A label outside the vocabulary makes the loss of its row NaN.
    """
    rows, vocabulary = logits.shape
    tiling = tiling or (INTERPRETED if interpreting() else CANDIDATES[0])
    with on_device_of(logits):
        _linear_ce_kernel[(rows,)](
            logits, labels, loss, logits.stride(0), labels.stride(0), float(softcap or 1.0), float(logit_scale),
            VOCABULARY=vocabulary, TILE=min(tiling.logits, 1 << (vocabulary - 1).bit_length()),
            SOFTCAP=softcap is not None, SCALE=logit_scale != 1.0, GRAD=grad, num_warps=tiling.warps,
        )  # fmt: skip


@triton.jit
def _tanh(x):
    """Tanh to fp32 accuracy near 0 as well, where (1-e)/(1+e) would cancel."""
    size = tl.abs(x)
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    decay = tl.exp(-2.0 * size)
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(size < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def _shape(logit, softcap, logit_scale, SOFTCAP: tl.constexpr, SCALE: tl.constexpr):
    """What a model does to its head's output, and the derivative of that."""
    z = logit.to(tl.float32)
    slope = 1.0
    if SCALE:
        z = z * logit_scale
        slope = logit_scale
    if SOFTCAP:
        bent = _tanh(z / softcap)
        z = softcap * bent
        slope = (1.0 - bent * bent) * slope
    return z, slope


@triton.jit
def _linear_ce_kernel(
    logits_ptr, labels_ptr, loss_ptr, logits_stride, labels_stride, softcap, logit_scale,
    VOCABULARY: tl.constexpr, TILE: tl.constexpr, SOFTCAP: tl.constexpr, SCALE: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * logits_stride
    label = tl.load(labels_ptr + row * labels_stride)
    token = tl.arange(0, TILE)
    # Read before it is overwritten.
    known = (label >= 0) & (label < VOCABULARY)
    chosen = tl.load(base + label, mask=known, other=0.0)
    picked, _picked_slope = _shape(chosen, softcap, logit_scale, SOFTCAP, SCALE)

    top = float("-inf")
    total = 0.0
    for at in range(0, VOCABULARY, TILE):
        inside = at + token < VOCABULARY
        logit = tl.load(base + at + token, mask=inside, other=float("-inf"), eviction_policy="evict_last")
        z, _ = _shape(logit, softcap, logit_scale, SOFTCAP, SCALE)
        # Softcap and a negative scale lift the padding's -inf.
        z = tl.where(inside, z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), axis=0)
        top = higher
    loss = top + tl.log(total) - picked
    tl.store(loss_ptr + row, tl.where(known, loss, float("nan")))

    if GRAD:
        for at in range(0, VOCABULARY, TILE):
            inside = at + token < VOCABULARY
            logit = tl.load(base + at + token, mask=inside, other=0.0, eviction_policy="evict_first")
            z, slope = _shape(logit, softcap, logit_scale, SOFTCAP, SCALE)
            gradient = tl.exp(z - top) / total - tl.where(at + token == label, 1.0, 0.0)
            tl.store(base + at + token, (gradient * slope).to(logits_ptr.dtype.element_ty), mask=inside)
