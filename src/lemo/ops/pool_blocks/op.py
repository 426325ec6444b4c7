"""pool_blocks: normalised, projected and pooled rows of every block, in one reading of the residual stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lemo.ops.backend import Backend, settle_backend
from lemo.ops.pool_blocks.reference import POOLS, Blocks, pool_blocks_reference


def pool_blocks(
    x_NM: Tensor,
    projection_MF: Tensor,
    blocks: Blocks,
    *,
    pools: Sequence[str] = POOLS,
    extra_KE: Tensor | None = None,
    eps: float = 1e-6,
    backend: Backend = "auto",
) -> Tensor:
    """out[k] = pools over the rows i of block k of (x_i / sqrt(mean(x_i²) + eps)) · P, then `extra_KE[k]`.

    Args:
        x_NM: (N, M) floating rows, any strides. Rows of no block are not read.
        projection_MF: (M, F) floating P.
        blocks: where the blocks lie, on the device of `x_NM`.
        pools: one or several of `mean`, `max` and `lse` (log of the mean of exponentials), each once.
        extra_KE: (K, E) further features, copied behind the pooled ones; None for none.
        eps: added to the mean square.
        backend: `triton`, `reference`, or `auto` to take the kernel where it can run.

    Returns:
        (K, len(pools)·F + E) fp32 (fp64 for fp64 input), F numbers of each pool in the order of `pools`. Never requires
        grad.

    Raises:
        BackendError: `triton` was asked for and cannot run; the message says why.
        ValueError: shapes, dtypes or devices do not fit, or `pools` is empty, repeats a name or holds an unknown one.

    Cost:
        2·N·M·F FLOPs; the kernel reads x once and holds nothing but the result. The reference makes wide copies of
        32,768 rows at a time and of all projected rows.

    Numerics:
        the kernel multiplies x by P rounded to the dtype of x (a P of another dtype is converted by each call) on the
        matrix units, adds up in fp32, and applies 1/rms to the product; squares and pools in fp32. The reference
        normalises in fp32 first and multiplies in fp32. For bf16 they differ by the rounding of P, 2^-9 relative.

    Source:
        LeMo section 4 (pattern predictors, block embeddings).
    """
    _check(x_NM, projection_MF, blocks, pools, extra_KE)
    chosen = settle_backend("pool_blocks", backend, x_NM, lambda: _why_not_triton(x_NM, blocks.rows), blocks.rows)
    with torch.no_grad():
        if chosen == "triton" and len(blocks.start_K):
            from lemo.ops.pool_blocks import kernel

            return kernel.launch(x_NM, projection_MF.to(x_NM.dtype), blocks, tuple(pools), extra_KE, eps)
        return pool_blocks_reference(x_NM, projection_MF, blocks, pools=pools, extra_KE=extra_KE, eps=eps)


def _check(x: Tensor, projection: Tensor, blocks: Blocks, pools: Sequence[str], extra: Tensor | None) -> None:
    if x.ndim != 2 or projection.ndim != 2 or x.shape[1] != projection.shape[0]:
        raise ValueError(f"x_NM {tuple(x.shape)} and projection_MF {tuple(projection.shape)} do not fit")
    if not x.is_floating_point() or not projection.is_floating_point():
        raise ValueError(f"x_NM and projection_MF must be floating, got {x.dtype} and {projection.dtype}")
    start, length = blocks.start_K, blocks.length_K
    if start.ndim != 1 or start.shape != length.shape or start.is_floating_point() or length.is_floating_point():
        raise ValueError(f"blocks must be (K,) integers, got {tuple(start.shape)} and {tuple(length.shape)}")
    if blocks.rows < 1:
        raise ValueError(f"blocks.rows must be positive, got {blocks.rows}")
    if not pools or len(set(pools)) != len(pools) or set(pools) - set(POOLS):
        raise ValueError(f"pools must be some of {', '.join(POOLS)}, each once, got {list(pools)}")
    if extra is not None and (extra.ndim != 2 or extra.shape[0] != start.shape[0]):
        raise ValueError(f"extra_KE must be ({len(start)}, E), got {tuple(extra.shape)}")
    device = x.device
    for tensor in (projection, start, length, extra):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"x_NM is on {device}, another tensor on {tensor.device}")


def _why_not_triton(x: Tensor, block_rows: int) -> str | None:
    try:
        from lemo.ops.pool_blocks import kernel
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return kernel.why_not(x, block_rows)
