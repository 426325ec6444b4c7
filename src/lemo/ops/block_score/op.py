"""block_score: the paper's informativeness of every pair of blocks, in linear memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lemo.ops.backend import Backend, choose_backend
from lemo.ops.block_score.reference import block_score_reference, key_block_scores_reference


def block_score(
    query_HND: Tensor,
    key_GND: Tensor,
    block_start_K: Tensor,
    block_length_K: Tensor,
    block_document_K: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """map[m, n] = max of s_ij over i in block m, j in block n, j <= i, in one document; 0 elsewhere.

    s_ij = mean over heads of relu(q_i·k_j·scaling), with a softcap mean of relu(softcap·tanh(q_i·k_j·scaling/softcap)).

    Args:
        query_HND: (H, N, D) floating, after RoPE, any strides.
        key_GND: (G, N, D) of the same dtype, H a multiple of G.
        block_start_K: (K,) integer first flat row of each block, ascending. On the CPU (as in a Layout) it costs no
            synchronisation.
        block_length_K: (K,) integer rows of each block.
        block_document_K: (K,) integer document of each block, ascending.
        scaling: positive factor on the logits, 1/sqrt(D) usually.
        softcap: logit softcap of the attention, None for none.
        backend: `triton`, `reference`, or `auto` to take the kernel where it can run.

    Returns:
        (K, K) fp32 (fp64 for fp64 input) on the device of `query_HND`. Never requires grad.

    Raises:
        BackendError: `triton` was asked for and cannot run; the message says why.
        ValueError: shapes, dtypes or devices do not fit, or `scaling` or `softcap` is not positive.

    Cost:
        H·N²·D FLOPs (half of causal attention's forward); reads Q and K once per tile of rows; 4·K² bytes of output and
        nothing else. The reference forms slices of scores (128 MiB).

    Numerics:
        products accumulate in fp32, tf32 is never used; mean and max in fp32.

    Source:
        LeMo section 4 (informativeness, block score); docs/method.md.
    """
    _check(query_HND, key_GND, (block_start_K, block_length_K, block_document_K), scaling, softcap)
    block_rows = int(block_length_K.max()) if len(block_length_K) else 0
    chosen = choose_backend("block_score", backend, lambda: _why_not_triton(query_HND, block_rows))
    return torch.ops.lemo.block_score(
        query_HND.detach(),
        key_GND.detach(),
        block_start_K,
        block_length_K,
        block_document_K,
        scaling,
        softcap,
        block_rows,
        chosen == "triton",
    )


def key_block_scores(pairs_KK: Tensor, block_document_K: Tensor) -> Tensor:
    """Score of key block n = mean of map[m, n] over the query blocks m >= n of its document.

    Args:
        pairs_KK: (K, K) floating map of `block_score`.
        block_document_K: (K,) integer document of each block, ascending.

    Returns:
        (K,) in the dtype of `pairs_KK`. A mean, because a sum would grow with the length of the document.

    Raises:
        ValueError: shapes do not fit.
    """
    if pairs_KK.dim() != 2 or pairs_KK.shape != (len(block_document_K), len(block_document_K)):
        raise ValueError(f"pairs_KK must be (K, K), K = {len(block_document_K)}, got {tuple(pairs_KK.shape)}")
    return key_block_scores_reference(pairs_KK, block_document_K)


def _check(
    query: Tensor, key: Tensor, layout: tuple[Tensor, Tensor, Tensor], scaling: float, softcap: float | None
) -> None:
    if query.dim() != 3 or key.dim() != 3 or query.shape[1:] != key.shape[1:]:
        raise ValueError(f"query_HND {tuple(query.shape)} and key_GND {tuple(key.shape)} do not fit")
    if key.shape[0] == 0 or query.shape[0] % key.shape[0]:
        raise ValueError(f"{query.shape[0]} query heads are no multiple of {key.shape[0]} key heads")
    if query.dtype != key.dtype or not query.is_floating_point() or query.device != key.device:
        raise ValueError(f"query_HND is {query.dtype} on {query.device}, key_GND {key.dtype} on {key.device}")
    if any(t.dim() != 1 or t.shape != layout[0].shape or t.is_floating_point() for t in layout):
        raise ValueError("block_start_K, block_length_K and block_document_K must be (K,) integers")
    if not scaling > 0 or (softcap is not None and not softcap > 0):
        raise ValueError(f"scaling and softcap must be positive, got {scaling} and {softcap}")


def _why_not_triton(query: Tensor, block_rows: int) -> str | None:
    try:
        from lemo.ops.block_score import kernel
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return kernel.why_not(query, block_rows)


_SCHEMA = (
    "(Tensor query, Tensor key, Tensor start, Tensor length, Tensor document, float scaling, float? softcap, "
    "int block_rows, bool triton) -> Tensor"
)


@torch.library.custom_op("lemo::block_score", mutates_args=(), schema=_SCHEMA)
def _block_score(query: Tensor, key: Tensor, *rest: Any) -> Tensor:
    start, length, document, scaling, softcap, block_rows, triton = rest
    if triton and len(start):
        from lemo.ops.block_score import kernel

        return kernel.launch(query, key, (start, length, document), scaling, softcap, block_rows)
    return block_score_reference(query, key, start, length, document, scaling=scaling, softcap=softcap)


@_block_score.register_fake
def _fake(query: Tensor, key: Tensor, start: Tensor, *_: Any) -> Tensor:
    return query.new_empty(len(start), len(start), dtype=torch.promote_types(query.dtype, torch.float32))
