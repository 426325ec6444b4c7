"""Chunks and the chunks before them, by the vendors' fused attention: one batched call a document.

Nothing here is used unseen: a small case of each kernel is compared with plain torch once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from lemo.ops.attend_local.plan import LocalRows
from lemo.ops.attend_rows.tiling import like_rows
from lemo.ops.attend_rows.vendor import PROBE_ERROR, Triple, varlen_backward, varlen_runs
from lemo.ops.attend_rows.vendor import why_not as why_no_attention

Batched = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""(query (B, H, Q, D), key (B, G, K, D), value, scaling) to output (B, H, Q, D) and natural log-sum-exp (B, H, Q)."""
# Shorter chunks leave a vendor's kernel less than our own loses to it.
SHORTEST = 512

# Of one call: bounds the memory that its output takes before it is put in place.
MOST_ROWS = 16384

_log = logging.getLogger("lemo")


def why_not(query: Tensor, local: LocalRows) -> str | None:
    """Why no vendor kernel can run on this input; None if one can."""
    reason = why_no_attention(query, local.window)
    if reason is not None:
        return reason
    if not local.whole:
        return "rows are missing, so chunks of positions are no chunks of rows"
    if local.chunk < SHORTEST or all(length < 2 * local.chunk for length in local.keys.lengths):
        return f"there is no whole chunk of {SHORTEST} rows or more behind another"
    if batched_kernel(query.dtype, query.shape[2], query.device) is None:
        return "every batched kernel failed its probe"
    return None


@lru_cache(maxsize=64)
def batched_kernel(dtype: torch.dtype, head_dim: int, device: torch.device) -> Batched | None:
    """The first kernel that passed its probe."""
    with torch.cuda.device(device), torch.no_grad():
        for name, kernel in KERNELS.items():
            reason = probe(kernel, dtype, head_dim, device)
            _log.info("attend_local: %s of %s, %d wide: %s", name, dtype, head_dim, reason or "passed its probe")
            if reason is None:
                return kernel
    return None


def probe(kernel: Batched, dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
    """Why a kernel cannot be used; None when it agrees with plain torch on chunks of a sequence laid out by rows."""
    chunk, generator = 128, torch.Generator(device).manual_seed(0)

    def draw(heads: int) -> Tensor:
        made = torch.randn(4 * chunk, heads, head_dim, generator=generator, device=device)
        return made.to(dtype).transpose(0, 1)

    query, key, value = (_chunks(draw(heads), slice(0, 4 * chunk), chunk) for heads in (4, 2, 2))
    query, key, value = query[1:], key[:-1], value[:-1]
    wide = query.float(), *(t.float().repeat_interleave(2, 1) for t in (key, value))
    score = wide[0] @ wide[1].mT * 0.1
    expected = torch.softmax(score, -1) @ wide[2], torch.logsumexp(score, -1)
    try:
        found = kernel(query, key, value, 0.1)
        torch.cuda.synchronize(device)
    except (RuntimeError, TypeError, NotImplementedError, AttributeError) as error:
        return str(error).strip().splitlines()[0] or type(error).__name__
    for name, actual, wanted in zip(("output", "lse"), found, expected, strict=True):
        error = (actual.float() - wanted).abs().max() / wanted.abs().max() if actual.shape == wanted.shape else 1.0
        if not float(error) < PROBE_ERROR:
            return f"{name} is off by {float(error):.2g}"
    return None


def forward_before(
    query: Tensor, pair: tuple[Tensor, Tensor], local: LocalRows, scaling: float, kernel: Batched
) -> tuple[Tensor, Tensor]:
    """Output (H, N, D) over rows in memory and log-sum-exp (H, N) of rows of whole chunks over the chunk before.

    0 and -inf in the first chunk of a document, and behind its last whole one; 0 and 0 outside all documents. Rows of
    a chunk that is not whole are left to our kernel: vendors' kernels are built for each size that they meet, and a
    data set of documents has as many sizes of last chunks as a chunk has rows.
    """
    output = like_rows(query, False)
    lse = torch.zeros(query.shape[:2], dtype=torch.float32, device=query.device)
    chunk = local.chunk
    sides = zip(local.queries.starts, local.keys.starts, local.keys.lengths, strict=True)
    for q_start, k_start, length in sides:
        lse[:, q_start : q_start + min(chunk, length)].fill_(-torch.inf)
        lse[:, q_start + length // chunk * chunk : q_start + length].fill_(-torch.inf)
        for begin, end in _batches(length, chunk):
            rows = slice(q_start + begin, q_start + end)
            keys = [_chunks(t, slice(k_start + begin - chunk, k_start + end - chunk), chunk) for t in pair]
            found, weight = kernel(_chunks(query, rows, chunk), *keys, scaling)
            output[:, rows] = found.transpose(0, 1).flatten(1, 2)
            lse[:, rows] = weight.transpose(0, 1).flatten(1, 2)
    return output, lse


def why_not_backward(query: Tensor, local: LocalRows) -> str | None:
    """Why no vendor kernel can take part in the backward pass on this input; None if one can."""
    reason = why_no_attention(query, local.window)
    if reason is not None:
        return reason
    if local.position_on_host_N is None:
        return "the host does not know the queries' positions, see plan_local"
    if local.chunk < SHORTEST or not local.rectangles:
        return f"no query is behind a first chunk of {SHORTEST} rows or more"
    if not varlen_runs(query.dtype, query.shape[2], query.device):
        return "the kernel for varied lengths failed its probe"
    return None


def backward_before(tensors: tuple[Tensor, ...], local: LocalRows, scaling: float) -> Triple:
    """Gradients of query, key and value in fp32, heads inside rows, through the chunk before and the sink.

    Args:
        tensors: gradient, query, key, value, output and log-sum-exp of the rows.
        local: rows whose positions the host knows.
        scaling: factor of the scores.
    """
    grad, query, key, value, output, lse = tensors
    d_query, d_key, d_value = (like_rows(t, False, torch.float32) for t in (query, key, value))
    for part in local.rectangles:
        pair = (t.transpose(0, 1).index_select(0, part.index_K).transpose(0, 1) for t in (key, value))
        cut = [t[:, part.rows] for t in (grad, query, output, lse)]
        found = varlen_backward((*cut[:2], *pair, *cut[2:]), part.spans, scaling)
        d_query[:, part.rows] = found[0]
        for target, gathered in zip((d_key, d_value), found[1:], strict=True):
            target.transpose(0, 1).index_add_(0, part.index_K, gathered.transpose(0, 1).to(target.dtype))
    return d_query, d_key, d_value


def _batches(length: int, chunk: int) -> Iterator[tuple[int, int]]:
    """First row and end of each call: runs of whole chunks behind the first."""
    full, step = length // chunk * chunk, max(1, MOST_ROWS // chunk) * chunk
    for begin in range(chunk, full, step):
        yield begin, min(begin + step, full)


def _chunks(tensor: Tensor, rows: slice, size: int) -> Tensor:
    """(B, H, size, D) view of rows of (H, N, D)."""
    return tensor[:, rows].unflatten(1, (-1, size)).transpose(0, 1)


def _cudnn(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, False, False, scale=scaling
    )
    return output, lse.reshape(query.shape[:3])


def _flash(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, False, False, scale=scaling
    )
    return output, lse[..., : query.shape[2]]  # the kernel's log-sum-exp may be padded


def _repeating(kernel: Batched) -> Batched:
    """The same for kernels that want as many key heads as query heads."""

    def repeated(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        repeat = query.shape[1] // key.shape[1]
        wide = [t.transpose(1, 2).repeat_interleave(repeat, 2).transpose(1, 2) for t in (key, value)]
        return kernel(query, *wide, scaling)

    return repeated


KERNELS: dict[str, Batched] = {
    "cudnn": _cudnn,
    "cudnn, keys repeated": _repeating(_cudnn),
    "flash": _flash,
    "flash, keys repeated": _repeating(_flash),
}
