"""The vendors' fused attention, through torch: cuDNN and FlashAttention-2, dense and of varied length.

Nothing here is used unseen: `probe` runs a small case of each once and compares it with the reference; what fails, or
is missing in this version of torch, is not used, and `why_not` says why.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lemo.ops.attend_rows.reference import Rows, Segments, attend_backward_reference, attend_rows_reference
from lemo.ops.attend_rows.tiling import laid_out, like_rows
from lemo.ops.backend import send

Triple = tuple[Tensor, Tensor, Tensor]
PROBE_ROWS, FURTHER_KEYS = 200, 72
# Largest error of a probed result, relative to the largest entry: bf16 resolves 2**-8, a wrong kernel is off by more.
PROBE_ERROR = 0.03

_log = logging.getLogger("lemo")


@dataclass(frozen=True)
class Dense:
    """One vendor's attention of all queries and all keys of one sequence, causal or not.

    Attributes:
        name: cudnn or flash.
        forward: (query (H, n, D), key (G, k, D), value, causal, scaling) to output (H, n, D) and natural log-sum-exp
            (H, n) fp32.
        backward: (gradient, query, key, value, output, log-sum-exp, causal, scaling) to three gradients.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Triple]


def why_not(query: Tensor, window: int | None) -> str | None:
    """Why no vendor kernel can run on this input; None if one can."""
    if query.device.type != "cuda":
        return f"the tensors are on {query.device.type}, it needs a CUDA device"
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes fp16 and bf16, not {query.dtype}"
    if window is not None:
        return "it counts a window on compact rows, not on positions"
    if query.shape[2] % 8 or query.shape[2] > 256:
        return f"head dimension {query.shape[2]} is no multiple of 8 up to 256"
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms were asked for, and its backward pass adds in no fixed order"
    if not dense_kernels(query.dtype, query.shape[2], query.device):
        return "every kernel failed its probe"
    return None


def dense_kernels(dtype: torch.dtype, head_dim: int, device: torch.device) -> tuple[Dense, ...]:
    """The dense kernels that passed their probe, fastest first."""
    return _probed(dtype, head_dim, device)[0]


def varlen_runs(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Whether the kernel for sequences of varied length passed its probe."""
    return _probed(dtype, head_dim, device)[1]


def varlen_meets_corners(dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Whether, causal, it lets the last query of a sequence see the last of more keys than there are queries."""
    return _probed(dtype, head_dim, device)[2]


@lru_cache(maxsize=64)
def _probed(dtype: torch.dtype, head_dim: int, device: torch.device) -> tuple[tuple[Dense, ...], bool, bool]:
    with torch.cuda.device(device), torch.no_grad():
        reasons = {}
        dense = []
        for kernel in (CUDNN, CUDNN_REPEATED, FLASH, FLASH_REPEATED):
            if any(found.name == kernel.name for found in dense):
                continue
            reasons[kernel.name] = probe(kernel, dtype, head_dim, device)
            if reasons[kernel.name] is None:
                dense.append(kernel)
        reasons["varlen"] = probe(VARLEN, dtype, head_dim, device)
        corner = ((True, PROBE_ROWS + FURTHER_KEYS),)
        reasons["varlen, corner"] = reasons["varlen"] or probe(VARLEN, dtype, head_dim, device, corner)
    for name, reason in reasons.items():
        _log.info("attend_rows: %s of %s, %d wide: %s", name, dtype, head_dim, reason or "passed its probe")
    return tuple(dense), reasons["varlen"] is None, reasons["varlen, corner"] is None


def probe(
    kernel: Dense,
    dtype: torch.dtype,
    head_dim: int,
    device: torch.device,
    shapes: tuple[tuple[bool, int], ...] = ((True, PROBE_ROWS), (False, PROBE_ROWS - FURTHER_KEYS)),
) -> str | None:
    """Why a kernel cannot be used; None when it agrees with the reference, both passes.

    `shapes`: whether it is causal, and with how many keys.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(heads: int, rows: int) -> Tensor:
        made = torch.randn(rows, heads, head_dim, generator=generator, device=device)
        return made.to(dtype).transpose(0, 1)

    grad, query = (draw(4, PROBE_ROWS) for _ in range(2))
    key, value = (draw(2, PROBE_ROWS + FURTHER_KEYS) for _ in range(2))
    for causal, columns in shapes:
        pair = key[:, :columns], value[:, :columns]
        queries, keys = _probe_rows(columns, causal, device)
        wide = query.float(), pair[0].float(), pair[1].float()
        exact = attend_rows_reference(*wide, queries, keys, scaling=0.1)
        operands = (grad.float(), *wide, *exact)
        expected = (*exact, *attend_backward_reference(operands, queries, keys, scaling=0.1))
        try:
            found = kernel.forward(query, *pair, causal, 0.1)
            found = (*found, *kernel.backward(grad, query, *pair, *found, causal, 0.1))
            torch.cuda.synchronize(device)
        except (RuntimeError, TypeError, NotImplementedError, AttributeError) as error:
            return str(error).strip().splitlines()[0] or type(error).__name__
        for name, actual, wanted in zip(("output", "lse", "dq", "dk", "dv"), found, expected, strict=True):
            error = (actual.float() - wanted).abs().max() / wanted.abs().max() if actual.shape == wanted.shape else 1.0
            if not float(error) < PROBE_ERROR:
                return f"{name} {'causal' if causal else 'of a rectangle'} is off by {float(error):.2g}"
    return None


def _probe_rows(columns: int, causal: bool, device: torch.device) -> tuple[Rows, Rows]:
    place = torch.arange(columns, device=device)
    last = columns if causal else columns + PROBE_ROWS
    queries = Segments((0,), (PROBE_ROWS,), torch.arange(last - PROBE_ROWS, last, device=device))
    # The reference takes `valid` queries for such that need not see a key of their own.
    return queries, Segments((0,), (columns,), place, None if causal else torch.ones_like(place).bool())


# ---- dense


def _batched(tensor: Tensor) -> Tensor:
    """(1, heads, rows, D) with a stride of the batch that no other code has.

    torch keeps cuDNN's graphs by sizes and strides of query, key and value, and not by those of gradient and output. A
    backward of other code on the same sizes whose gradient lies otherwise would be taken for ours, or ours for it:
    gradients are then read in the wrong order. The stride of a batch of one is free, so ours keeps graphs of its own.
    """
    return tensor.as_strided((1, *tensor.shape), (tensor.numel() + 64, *tensor.stride()))


def _cudnn_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        _batched(query), _batched(key), _batched(value), None, True, 0.0, causal, False, scale=scaling
    )
    return output[0], lse.reshape(query.shape[:2])


def _cudnn_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, causal: bool, scaling: float
) -> Triple:
    heads, rows, _ = query.shape
    # The graph is kept by the layout of query, key and value only: the others must have the query's.
    grad, output = (laid_out(t, query.stride()) for t in (grad, output))
    seed = torch.zeros((), dtype=torch.int64, device=query.device)
    found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        _batched(grad), _batched(query), _batched(key), _batched(value), _batched(output),
        lse.contiguous().reshape(1, heads, rows, 1), seed, seed, None, None, None, rows, key.shape[1], 0.0, causal,
        scale=scaling,
    )  # fmt: skip
    return found[0][0], found[1][0], found[2][0]


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query[None], key[None], value[None], 0.0, causal, False, scale=scaling
    )
    # The kernel's log-sum-exp may be padded.
    return output[0], lse[0, :, : query.shape[1]]


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, causal: bool, scaling: float
) -> Triple:
    grad, output = (laid_out(t, query.stride()) for t in (grad, output))
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
    found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad[None], query[None], key[None], value[None], output[None], lse[None].contiguous(), None, None,
        query.shape[1], key.shape[1], 0.0, causal, seed, seed.new_zeros(()), scale=scaling,
    )  # fmt: skip
    return found[0][0], found[1][0], found[2][0]


def _repeating(kernel: Dense) -> Dense:
    """The same for kernels that want as many key heads as query heads; gradients are summed over a group in fp32."""

    def repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        repeat = query.shape[0] // key.shape[0]
        # Repeated inside rows, as projections lay heads out.
        return tuple(t.transpose(0, 1).repeat_interleave(repeat, 1).transpose(0, 1) for t in (key, value))

    def forward(query: Tensor, key: Tensor, value: Tensor, *options) -> tuple[Tensor, Tensor]:
        return kernel.forward(query, *repeated(query, key, value), *options)

    def backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest) -> Triple:
        d_query, *pair = kernel.backward(grad, query, *repeated(query, key, value), *rest)
        groups = key.shape[0]
        d_key, d_value = (t.unflatten(0, (groups, -1)).sum(1, dtype=torch.float32).to(query.dtype) for t in pair)
        return d_query, d_key, d_value

    return Dense(kernel.name, forward, backward)


CUDNN = Dense("cudnn", _cudnn_forward, _cudnn_backward)
FLASH = Dense("flash", _flash_forward, _flash_backward)
CUDNN_REPEATED, FLASH_REPEATED = _repeating(CUDNN), _repeating(FLASH)


# ---- sequences of varied length, whose ends may be known to the device only


@dataclass(frozen=True)
class Spans:
    """Sequences of queries and keys: the s-th is rows [q[s], q[s + 1]) and [k[s], k[s + 1]).

    Attributes:
        query_S: (S + 1,) int32 on the device.
        key_S: (S + 1,) int32 on the device.
        most: most queries and most keys of a sequence (host), or bounds of them.
        causal: whether a query sees the keys up to its own place only.
    """

    query_S: Tensor
    key_S: Tensor
    most: tuple[int, int]
    causal: bool


def varlen_forward(query: Tensor, pair: tuple[Tensor, Tensor], spans: Spans, scaling: float) -> tuple[Tensor, Tensor]:
    """FlashAttention-2 of every sequence: (H, N, D) and natural log-sum-exp (H, N); undefined outside sequences."""
    packed = [t.transpose(0, 1) for t in (query, *pair)]
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        *packed, spans.query_S, spans.key_S, *spans.most, 0.0, spans.causal, False, scale=scaling
    )
    return output.transpose(0, 1), lse


def varlen_backward(tensors: tuple[Tensor, ...], spans: Spans, scaling: float) -> Triple:
    """Gradients of query, key and value, given gradient, query, key, value, output and log-sum-exp."""
    *packed, lse = tensors
    grad, query, key, value, output = (t.transpose(0, 1) for t in packed)
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
    found = torch.ops.aten._flash_attention_backward(
        grad, query, key, value, output, lse.contiguous(), spans.query_S, spans.key_S, *spans.most, 0.0,
        spans.causal, seed, seed.new_zeros(()), scale=scaling,
    )  # fmt: skip
    return found[0].transpose(0, 1), found[1].transpose(0, 1), found[2].transpose(0, 1)


def _span_of_one(query: Tensor, key: Tensor, causal: bool) -> Spans:
    ends = [torch.tensor([0, t.shape[1]], dtype=torch.int32, device=query.device) for t in (query, key)]
    return Spans(ends[0], ends[1], (query.shape[1], key.shape[1]), causal)


VARLEN = Dense(
    "varlen",
    lambda q, k, v, causal, scaling: varlen_forward(q, (k, v), _span_of_one(q, k, causal), scaling),
    lambda g, q, k, v, o, lse, causal, scaling: varlen_backward(
        (g, q, k, v, o, lse), _span_of_one(q, k, causal), scaling
    ),
)


# ---- compact causal attention


@lru_cache(maxsize=256)
def _document_ends(lengths: tuple[int, ...], starts: tuple[int, ...], device: torch.device) -> Tensor:
    ends = torch.tensor([starts[0], *(s + n for s, n in zip(starts, lengths, strict=True))], dtype=torch.int32)
    return send(ends, device)


def causal_forward(query: Tensor, pair: tuple[Tensor, Tensor], rows: Rows, scaling: float) -> tuple[Tensor, Tensor]:
    """Compact causal attention by document, of rows that `refuses` has nothing against."""
    part, spans = _covered(query, rows)
    if spans is None:
        kernel = dense_kernels(query.dtype, query.shape[2], query.device)[0]
        output, lse = kernel.forward(query[:, part], *(t[:, part] for t in pair), True, scaling)
    else:
        output, lse = (t[:, part] for t in varlen_forward(query, pair, spans, scaling))
    return _placed(output, query, part), _placed_lse(lse, query, part)


def causal_backward(tensors: tuple[Tensor, ...], rows: Rows, scaling: float) -> Triple:
    """Gradients of compact causal attention by document, of rows that `refuses` has nothing against."""
    query = tensors[1]
    part, spans = _covered(query, rows)
    if spans is None:
        kernel = dense_kernels(query.dtype, query.shape[2], query.device)[0]
        found = kernel.backward(*(t[:, part] for t in tensors), True, scaling)
    else:
        found = tuple(t[:, part] for t in varlen_backward(tensors, spans, scaling))
    d_query, d_key, d_value = (_placed(t, full, part) for t, full in zip(found, tensors[1:4], strict=True))
    return d_query, d_key, d_value


def refuses(query: Tensor, rows: Rows) -> str | None:
    """Why compact causal attention cannot run on these documents; None if it can."""
    live = _live(rows)
    if not live:
        return "there are no rows"
    if len(live) > 1 and _documents(query, live) is None:
        return "several documents need the kernel for varied lengths, and no rows between them"
    return None


def _live(rows: Rows) -> list[tuple[int, int]]:
    return [(start, length) for start, length in zip(rows.starts, rows.lengths, strict=True) if length]


def _covered(query: Tensor, rows: Rows) -> tuple[slice, Spans | None]:
    """Rows from the first document to the last, and the documents when there are several."""
    live = _live(rows)
    return slice(live[0][0], sum(live[-1])), _documents(query, live) if len(live) > 1 else None


def _documents(query: Tensor, live: list[tuple[int, int]]) -> Spans | None:
    """Sequences of documents that lie end to end; None when they do not, or the kernel is missing."""
    adjacent = all(s + n == after for (s, n), (after, _) in itertools.pairwise(live))
    if not live or not adjacent or not varlen_runs(query.dtype, query.shape[2], query.device):
        return None
    starts, lengths = zip(*live, strict=True)
    ends = _document_ends(lengths, starts, query.device)
    return Spans(ends, ends, (max(lengths), max(lengths)), True)


def _placed(part_HND: Tensor, full_HND: Tensor, where: slice) -> Tensor:
    """The part with heads inside rows in memory, among zeros where the whole has more rows."""
    heads, rows, head_dim = part_HND.shape
    covered = rows == full_HND.shape[1]
    if covered and part_HND.stride() == (head_dim, heads * head_dim, 1):
        return part_HND
    made = like_rows(full_HND, covered)
    made[:, where] = part_HND
    return made


def _placed_lse(lse_HN: Tensor, query: Tensor, where: slice) -> Tensor:
    if lse_HN.shape[1] == query.shape[1]:
        return lse_HN.contiguous()
    made = lse_HN.new_zeros(query.shape[:2])
    made[:, where] = lse_HN
    return made
