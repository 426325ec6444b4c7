"""Chunks and the chunks before them, by the vendors' fused attention: batched calls forward, one of runs backward.

Nothing here is used unseen: a small case of each kernel is compared with plain torch once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from lemo.ops.attend_local.pieces import Rectangle, Runs
from lemo.ops.attend_local.plan import LocalRows
from lemo.ops.attend_rows.tiling import like_rows
from lemo.ops.attend_rows.vendor import PROBE_ERROR, Triple, varlen_backward, varlen_meets_corners, varlen_runs
from lemo.ops.attend_rows.vendor import why_not as why_no_attention

Batched = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
"""(query (B, H, Q, D), key (B, G, K, D), value, causal, scaling) to output (B, H, Q, D) and log-sum-exp (B, H, Q)."""
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
    for causal in (False, True):
        part = (query, key, value) if causal else (query[1:], key[:-1], value[:-1])
        wide = part[0].float(), *(t.float().repeat_interleave(2, 1) for t in part[1:])
        score = wide[0] @ wide[1].mT * 0.1
        if causal:
            score = score.masked_fill(torch.ones(chunk, chunk, dtype=torch.bool, device=device).triu(1), -torch.inf)
        expected = torch.softmax(score, -1) @ wide[2], torch.logsumexp(score, -1)
        try:
            found = kernel(*part, causal, 0.1)
            torch.cuda.synchronize(device)
        except (RuntimeError, TypeError, NotImplementedError, AttributeError) as error:
            return str(error).strip().splitlines()[0] or type(error).__name__
        for name, actual, wanted in zip(("output", "lse"), found, expected, strict=True):
            error = (actual.float() - wanted).abs().max() / wanted.abs().max() if actual.shape == wanted.shape else 1.0
            if not float(error) < PROBE_ERROR:
                return f"{name} {'causal' if causal else 'of a rectangle'} is off by {float(error):.2g}"
    return None


def forward_near(
    query: Tensor, pair: tuple[Tensor, Tensor], local: LocalRows, scaling: float, kernel: Batched
) -> tuple[Tensor, Tensor]:
    """Output (H, N, D) over rows in memory and log-sum-exp (H, N) of rows of whole chunks over near keys.

    0 and -inf behind the last whole chunk of a document; 0 and 0 outside all documents. Rows of a chunk that is not
    whole are left to our kernel: vendors' kernels are built for each size that they meet, and a data set of documents
    has as many sizes of last chunks as a chunk has rows.
    """
    from lemo.ops.attend_local.kernel import put_merged

    chunk = local.chunk
    covered = sum(length // chunk * chunk for length in local.keys.lengths) == query.shape[1]
    output = like_rows(query, covered)
    lse = (query.new_empty if covered else query.new_zeros)(query.shape[:2], dtype=torch.float32)
    sides = zip(local.queries.starts, local.keys.starts, local.keys.lengths, strict=True)
    for q_start, k_start, length in sides:
        full = length // chunk * chunk
        lse[:, q_start + full : q_start + length].fill_(-torch.inf)
        # The first chunk of a document alone: it has none before it.
        for begin, end in [(0, chunk), *_batches(length, chunk)] if full else []:
            rows, keys = slice(q_start + begin, q_start + end), slice(k_start + begin, k_start + end)
            asking = _chunks(query, rows, chunk)
            found = kernel(asking, *(_chunks(t, keys, chunk) for t in pair), True, scaling)
            if not begin:
                output[:, rows] = found[0].transpose(0, 1).flatten(1, 2)
                lse[:, rows] = found[1].transpose(0, 1).flatten(1, 2)
                continue
            keys = slice(keys.start - chunk, keys.stop - chunk)
            before = kernel(asking, *(_chunks(t, keys, chunk) for t in pair), False, scaling)
            put_merged(found, before, (_chunks(output, rows, chunk), _chunks(lse[..., None], rows, chunk)[..., 0]))
    return output, lse


def why_not_backward(query: Tensor, local: LocalRows) -> str | None:
    """Why no vendor kernel can take part in the backward pass on this input; None if one can."""
    reason = why_no_attention(query, local.window)
    if reason is not None:
        return reason
    if local.position_on_host_N is None:
        return "the host does not know the queries' positions, see plan_local"
    if local.chunk < SHORTEST or not local.reaches_back:
        return f"no query is behind a first chunk of {SHORTEST} rows or more"
    if not varlen_runs(query.dtype, query.shape[2], query.device):
        return "the kernel for varied lengths failed its probe"
    return None


def takes_runs(query: Tensor) -> bool:
    """Whether the vendor's kernel may have queries with their own chunk, besides what all of a chunk see."""
    return varlen_meets_corners(query.dtype, query.shape[2], query.device)


def backward_runs(tensors: tuple[Tensor, ...], runs: Runs, scaling: float) -> Triple:
    """Gradients of query, key and value, heads inside rows, through all keys that the queries see.

    Args:
        tensors: gradient, query, key, value, output and log-sum-exp of the rows.
        runs: the queries, of which each is in one.
        scaling: factor of the scores.
    """
    from lemo.ops.attend_local.kernel import sum_copies

    _, query, key, value, *_ = tensors
    if not runs.calls:
        return tuple(like_rows(t, False) for t in (query, key, value))  # type: ignore[return-value]
    d_query = like_rows(query, runs.covers(query.shape[1]))
    gathered: tuple[list[Tensor], list[Tensor]] = [], []
    for part in runs.calls:
        found = _among_gathered(tensors, part, scaling)
        d_query[:, part.rows] = found[0]
        for target, copies in zip(gathered, found[1:], strict=True):
            target.append(copies.transpose(0, 1).flatten(1))
    sums = []
    for copies in gathered:
        table = copies[0] if len(copies) == 1 else torch.cat(copies)
        copies.clear()
        found_KO = sum_copies(table, runs.order_C, runs.first_K)
        sums.append(found_KO.unflatten(1, (len(key), -1)).transpose(0, 1))
    return d_query, sums[0], sums[1]


def _among_gathered(tensors: tuple[Tensor, ...], part: Rectangle, scaling: float) -> Triple:
    """Gradients of a part's queries, and of the copies of keys and values that are gathered for it."""
    grad, query, key, value, output, lse = tensors
    pair = (t.transpose(0, 1).index_select(0, part.index_K).transpose(0, 1) for t in (key, value))
    cut = [t[:, part.rows] for t in (grad, query, output, lse)]
    return varlen_backward((*cut[:2], *pair, *cut[2:]), part.spans, scaling)


def backward_before(tensors: tuple[Tensor, ...], local: LocalRows, scaling: float) -> Triple:
    """Gradients of query, key and value in fp32, heads inside rows, through the chunk before and the sink.

    Args:
        tensors: gradient, query, key, value, output and log-sum-exp of the rows.
        local: rows whose positions the host knows.
        scaling: factor of the scores.
    """
    _, query, key, value, *_ = tensors
    d_query, d_key, d_value = (like_rows(t, False, torch.float32) for t in (query, key, value))
    for part in local.rectangles:
        found = _among_gathered(tensors, part, scaling)
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


def _cudnn(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, causal, False, scale=scaling
    )
    return output, lse.reshape(query.shape[:3])


def _flash(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, False, scale=scaling
    )
    return output, lse[..., : query.shape[2]]  # the kernel's log-sum-exp may be padded


def _repeating(kernel: Batched) -> Batched:
    """The same for kernels that want as many key heads as query heads."""

    def repeated(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
        repeat = query.shape[1] // key.shape[1]
        wide = [t.transpose(1, 2).repeat_interleave(repeat, 2).transpose(1, 2) for t in (key, value)]
        return kernel(query, *wide, causal, scaling)

    return repeated


KERNELS: dict[str, Batched] = {
    "cudnn": _cudnn,
    "cudnn, keys repeated": _repeating(_cudnn),
    "flash": _flash,
    "flash, keys repeated": _repeating(_flash),
}
