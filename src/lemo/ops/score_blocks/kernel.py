"""Triton kernels of score_blocks.

The first runs both nets: a program takes a tile of blocks through the three maps of one net without leaving registers.
The second takes a tile of key blocks, adds up the Q outputs of the blocks from each to the end of its document as a
product with a matrix of ones and zeros, and multiplies with K's. Everything is tiny; what counts is few launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo.ops.backend import interpreting, on_device_of, padded

MAX_NET_WIDTH = 256
BLOCKS, INPUTS, OTHERS = 16, 64, 64


def why_not(features: Tensor, net_width: int) -> str | None:
    """Why the kernels cannot run on this input; None if they can."""
    if features.dtype != torch.float32:
        return f"they take fp32, not {features.dtype}"
    if net_width > MAX_NET_WIDTH:
        return f"nets {net_width} wide exceed {MAX_NET_WIDTH}"
    if not interpreting() and features.device.type != "cuda":
        return f"the tensors are on {features.device.type}, they need a CUDA device"
    return None


def launch(
    features: Tensor,
    standard: tuple[Tensor, Tensor],
    query_net: tuple[Tensor, ...],
    key_net: tuple[Tensor, ...],
    end: Tensor,
) -> Tensor:
    """Runs the kernels; arguments as in `score_blocks`."""
    blocks, inputs = features.shape
    rank = query_net[4].shape[0]
    sizes = {
        f"{net}{place}": padded(len(maps[2 * place - 1]))
        for net, maps in (("QUERY", query_net), ("KEY", key_net))
        for place in (1, 2)
    }
    maps = [t if t.is_contiguous() else t.contiguous() for t in (*standard, *query_net, *key_net)]
    output = torch.empty(2, blocks, rank, dtype=torch.float32, device=features.device)
    score = torch.empty(blocks, dtype=torch.float32, device=features.device)
    tiles = -(-blocks // BLOCKS)
    with on_device_of(features):
        _nets_kernel[(tiles, 2)](
            features.contiguous(), *maps, output, blocks,
            query_net[0].shape[0], query_net[2].shape[0], key_net[0].shape[0], key_net[2].shape[0],
            **sizes, ALL_INPUTS=inputs, RANK=rank, PADDED_RANK=padded(rank), BLOCKS=BLOCKS, INPUTS=INPUTS,
            num_warps=4,
        )  # fmt: skip
        _scores_kernel[(tiles,)](
            output, end.contiguous(), score, blocks, rank**-0.5,
            RANK=rank, PADDED_RANK=padded(rank), BLOCKS=BLOCKS, OTHERS=OTHERS, num_warps=4,
        )  # fmt: skip
    return score


@triton.jit
def _map(value, weight_ptr, bias_ptr, outputs, inputs, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr):
    """value (blocks, WIDTH) times the transposed (outputs, inputs) weight, plus bias: (blocks, OUTPUTS)."""
    to, of = tl.arange(0, OUTPUTS), tl.arange(0, WIDTH)
    mask = (of[:, None] < inputs) & (to[None, :] < outputs)
    weight = tl.load(weight_ptr + to[None, :] * inputs + of[:, None], mask=mask, other=0.0)
    bias = tl.load(bias_ptr + to, mask=to < outputs, other=0.0)
    return tl.dot(value, weight, input_precision="ieee") + bias[None, :]


@triton.jit
def _net(
    features_ptr, mean_ptr, scale_ptr, weight1, bias1, weight2, bias2, weight3, bias3, out_ptr,
    block, blocks, width1, width2,
    WIDTH1: tl.constexpr, WIDTH2: tl.constexpr, ALL_INPUTS: tl.constexpr, RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr, BLOCKS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """One net on a tile of blocks; writes (blocks, RANK)."""
    exists = block < blocks
    to = tl.arange(0, WIDTH1)
    bias = tl.load(bias1 + to, mask=to < width1, other=0.0)
    hidden = tl.zeros((BLOCKS, WIDTH1), dtype=tl.float32) + bias[None, :]
    for at in range(0, ALL_INPUTS, INPUTS):
        column = at + tl.arange(0, INPUTS)
        inside = column < ALL_INPUTS
        feature = tl.load(
            features_ptr + block[:, None].to(tl.int64) * ALL_INPUTS + column[None, :],
            mask=exists[:, None] & inside[None, :],
            other=0.0,
        )
        mean = tl.load(mean_ptr + column, mask=inside, other=0.0)
        scale = tl.load(scale_ptr + column, mask=inside, other=0.0)
        feature = (feature - mean[None, :]) * scale[None, :]
        weight = tl.load(
            weight1 + to[None, :] * ALL_INPUTS + column[:, None],
            mask=inside[:, None] & (to[None, :] < width1),
            other=0.0,
        )
        hidden = tl.dot(feature, weight, hidden, input_precision="ieee")
    hidden = tl.maximum(hidden, 0.0)
    hidden = tl.maximum(_map(hidden, weight2, bias2, width2, width1, WIDTH2, WIDTH1), 0.0)
    out = _map(hidden, weight3, bias3, RANK, width2, PADDED_RANK, WIDTH2)
    rank = tl.arange(0, PADDED_RANK)
    out_ptrs = out_ptr + block[:, None].to(tl.int64) * RANK + rank[None, :]
    tl.store(out_ptrs, out, mask=exists[:, None] & (rank[None, :] < RANK))


# The number of blocks changes from batch to batch and must not compile the kernels anew.
@triton.jit(do_not_specialize=["blocks"])
def _nets_kernel(
    features_ptr, mean_ptr, scale_ptr,
    query_weight1, query_bias1, query_weight2, query_bias2, query_weight3, query_bias3,
    key_weight1, key_bias1, key_weight2, key_bias2, key_weight3, key_bias3,
    out_ptr, blocks, query_width1, query_width2, key_width1, key_width2,
    QUERY1: tl.constexpr, QUERY2: tl.constexpr, KEY1: tl.constexpr, KEY2: tl.constexpr,
    ALL_INPUTS: tl.constexpr, RANK: tl.constexpr, PADDED_RANK: tl.constexpr,
    BLOCKS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    if tl.program_id(1) == 0:
        _net(
            features_ptr, mean_ptr, scale_ptr,
            query_weight1, query_bias1, query_weight2, query_bias2, query_weight3, query_bias3, out_ptr,
            block, blocks, query_width1, query_width2,
            QUERY1, QUERY2, ALL_INPUTS, RANK, PADDED_RANK, BLOCKS, INPUTS,
        )  # fmt: skip
    else:
        _net(
            features_ptr, mean_ptr, scale_ptr,
            key_weight1, key_bias1, key_weight2, key_bias2, key_weight3, key_bias3,
            out_ptr + tl.cast(blocks, tl.int64) * RANK,
            block, blocks, key_width1, key_width2,
            KEY1, KEY2, ALL_INPUTS, RANK, PADDED_RANK, BLOCKS, INPUTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["blocks"])
def _scores_kernel(
    output_ptr, end_ptr, score_ptr, blocks, factor,
    RANK: tl.constexpr, PADDED_RANK: tl.constexpr, BLOCKS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    exists = block < blocks
    end = tl.load(end_ptr + block, mask=exists, other=0).to(tl.int32)
    rank = tl.arange(0, PADDED_RANK)
    total = tl.zeros((BLOCKS, PADDED_RANK), dtype=tl.float32)
    # Blocks are ordered by document, so the last one's document ends last.
    for at in range(first, tl.max(end, axis=0), OTHERS):
        other = at + tl.arange(0, OTHERS)
        # Rows past the last block count with weight 0, and 0 times what lies there must be 0.
        mask = (other[:, None] < blocks) & (rank[None, :] < RANK)
        query = tl.load(output_ptr + other[:, None].to(tl.int64) * RANK + rank[None, :], mask=mask, other=0.0)
        later = (other[None, :] >= block[:, None]) & (other[None, :] < end[:, None])
        total = tl.dot(later.to(tl.float32), query, total, input_precision="ieee")
    mask = exists[:, None] & (rank[None, :] < RANK)
    key_ptr = output_ptr + tl.cast(blocks, tl.int64) * RANK
    key = tl.load(key_ptr + block[:, None].to(tl.int64) * RANK + rank[None, :], mask=mask, other=0.0)
    count = tl.where(exists, end - block, 1).to(tl.float32)
    tl.store(score_ptr + block, tl.sum(total * key, axis=1) * factor / count, mask=exists)
