"""dropout_rows: dropout by a counter, so that backward makes the mask again and nothing is saved."""

from __future__ import annotations

import torch
from torch import Tensor

from lemo.ops.backend import Backend, settle_backend
from lemo.ops.checks import check_like, check_rows, flat_rows
from lemo.ops.dropout_rows.reference import MASK, Key, dropout_rows_reference


def dropout_rows(
    x_nM: Tensor,
    p: float,
    key: Key,
    rows_n: Tensor | None = None,
    *,
    into_nM: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """x·mask/(1 - p), where the mask is a function of the key, the row's number and the column. No autograd.

    It is its own gradient: the same call on the gradient of the result gives that of x.

    Args:
        x_nM: (n, M) floating and contiguous.
        p: probability that an element is dropped, 0 <= p < 1.
        key: two numbers of 32 bits. Other keys draw other masks.
        rows_n: (n,) int64 number of each row, below 2^32; the same number gets the same mask wherever it stands. None:
            0, 1, 2, ...
        into_nM: (n, M) contiguous, same dtype; the result is added to it, in place.
        backend: `triton`, `reference`, or `auto` to take the kernel where it can run.

    Returns:
        (n, M) in the dtype of `x_nM`; `into_nM` if given.

    Raises:
        BackendError: `triton` was asked for and cannot run; the message says why.
        ValueError: shapes, dtypes or devices do not fit, p lies outside [0, 1), or the key is not two 32-bit numbers.

    Cost:
        2·n·M elements moved, 3·n·M with `into_nM`; a few integer operations an element.

    Numerics:
        fp32 (fp64 for fp64), one rounding. The mask is the same bit for bit by kernel and reference. p is rounded to a
        multiple of 2^-32.
    """
    x = flat_rows("x_nM", x_nM)
    if not 0 <= p < 1:
        raise ValueError(f"p must lie in [0, 1), got {p}")
    if len(key) != 2 or not (0 <= key[0] <= MASK and 0 <= key[1] <= MASK):
        raise ValueError(f"key must be two numbers of 32 bits, got {key}")
    if rows_n is not None:
        check_rows("rows_n", rows_n, x)
        if rows_n.shape[0] != x.shape[0]:
            raise ValueError(f"rows_n has {rows_n.shape[0]} rows, x_nM {x.shape[0]}")
    if into_nM is not None:
        check_like("into_nM", into_nM, x.shape, x)
        flat_rows("into_nM", into_nM)
    if settle_backend("dropout_rows", backend, x, lambda: _why_not_triton(x)) == "triton":
        from lemo.ops.dropout_rows import kernel

        out = torch.empty_like(x) if into_nM is None else into_nM
        kernel.launch(x, p, key, rows_n, into_nM, out)
        return out
    with torch.no_grad():
        value = dropout_rows_reference(x, p, key, rows_n, into_nM=into_nM)
    return value if into_nM is None else into_nM.copy_(value)


def _why_not_triton(x: Tensor) -> str | None:
    try:
        from lemo.ops.dropout_rows import kernel
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return kernel.why_not(x)
