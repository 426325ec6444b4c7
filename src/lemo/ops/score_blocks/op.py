"""score_blocks: the estimated score of every block as a key, no map of pairs formed."""

from __future__ import annotations

import torch
from torch import Tensor

from lemo.ops.backend import Backend, settle_backend
from lemo.ops.score_blocks.reference import Net, score_blocks_reference


def score_blocks(
    features_KE: Tensor,
    standard: tuple[Tensor, Tensor],
    query_net: Net,
    key_net: Net,
    end_K: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """score[n] = mean over m in [n, end[n]) of Q(f_m) · K(f_n) / sqrt(R), f = (features - mean) · scale.

    Q and K are three linear maps each with ReLU between. The mean is taken over Q's outputs, so no pair is formed.

    Args:
        features_KE: (K, E) floating, a row per block.
        standard: mean (E,) and scale (E,).
        query_net: weight (out, in) and bias (out,) of Q's three maps, six tensors in the dtype of the features.
        key_net: the same of K; both end in R numbers.
        end_K: (K,) int64, index behind the last block of each block's document, on the device of the features.
        backend: `triton`, `reference`, or `auto` to take the kernel where it can run.

    Returns:
        (K,) in the dtype of the features. Never requires grad; the reference is differentiable.

    Raises:
        BackendError: `triton` was asked for and cannot run; the message says why.
        ValueError: shapes, dtypes or devices do not fit.

    Cost:
        about 4·(E·W + W² + W·R) FLOPs a block, and K²·R for the mean (134 MFLOP at 128K rows); two launches.

    Numerics:
        all in the dtype of the features, fp32 by the kernel, tf32 never; the mean is summed in fp32 by the kernel and
        in fp64 by the reference.

    Source:
        LeMo section 4 (pattern predictors).
    """
    _check(features_KE, standard, query_net, key_net, end_K)
    widest = max([bias.shape[0] for bias in (*query_net[1::2], *key_net[1::2])])
    chosen = settle_backend("score_blocks", backend, features_KE, lambda: _why_not_triton(features_KE, widest), widest)
    with torch.no_grad():
        if chosen == "triton" and len(end_K):
            from lemo.ops.score_blocks import kernel

            return kernel.launch(features_KE, standard, tuple(query_net), tuple(key_net), end_K)
        return score_blocks_reference(features_KE, standard, query_net, key_net, end_K)


def _check(features: Tensor, standard: tuple[Tensor, Tensor], query_net: Net, key_net: Net, end: Tensor) -> None:
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"features_KE must be (K, E) floating, got {tuple(features.shape)} {features.dtype}")
    blocks, inputs = features.shape
    if standard[0].shape != (inputs,) or standard[1].shape != (inputs,):
        raise ValueError(f"mean and scale must be ({inputs},), got {[tuple(t.shape) for t in standard]}")
    if end.shape != (blocks,) or end.is_floating_point():
        raise ValueError(f"end_K must be ({blocks},) integers, got {tuple(end.shape)} {end.dtype}")
    for name, net in (("query_net", query_net), ("key_net", key_net)):
        sizes = [inputs, *[bias.shape[0] for bias in net[1::2]]]
        if len(net) != 6 or [weight.shape for weight in net[::2]] != list(zip(sizes[1:], sizes[:-1], strict=True)):
            raise ValueError(f"{name} must be three linear maps from {inputs}, got {[tuple(t.shape) for t in net]}")
    if query_net[4].shape[0] != key_net[4].shape[0]:
        raise ValueError("query_net and key_net must end in equally many numbers")
    device, dtype = features.device, features.dtype
    for tensor in (*standard, *query_net, *key_net):
        if tensor.device != device or tensor.dtype != dtype:
            raise ValueError(f"all tensors must be {dtype} on {device}")
    if end.device != device:
        raise ValueError(f"end_K must be on {device}")


def _why_not_triton(features: Tensor, widest: int) -> str | None:
    try:
        from lemo.ops.score_blocks import kernel
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return kernel.why_not(features, widest)
