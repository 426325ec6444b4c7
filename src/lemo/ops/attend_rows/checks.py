"""What the forms of attend_rows demand of their arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lemo.ops.attend_rows import tiling
from lemo.ops.attend_rows.reference import Rows

Options = tuple[float, int | None]
"""Scaling and window."""


def check(query: Tensor, pair: Sequence[Tensor], queries: Rows, keys: Rows, options: Options) -> None:
    """Raises ValueError when shapes, dtypes, devices or documents do not fit, or an option is not positive."""
    scaling, window = options
    key, value = pair
    if query.ndim != 3 or key.ndim != 3 or query.shape[2] != key.shape[2] or key.shape != value.shape:
        raise ValueError(f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)} do not fit")
    if key.shape[0] == 0 or query.shape[0] % key.shape[0]:
        raise ValueError(f"{query.shape[0]} query heads are no multiple of {key.shape[0]} key heads")
    dtype, device = query.dtype, query.device
    alike = key.dtype == dtype == value.dtype and key.device == device == value.device
    if not alike or not query.is_floating_point():
        raise ValueError(
            f"query is {query.dtype} on {query.device}, key {key.dtype} on {key.device}, "
            f"value {value.dtype} on {value.device}"
        )
    for tensor, rows, name in ((query, queries, "queries"), (key, keys, "keys")):
        position = rows.position_N
        count = tensor.shape[1]
        if position.shape != (count,) or position.dtype != torch.int64 or position.device != device:
            raise ValueError(
                f"positions of the {name} must be ({tensor.shape[1]},) int64 on {query.device}, "
                f"got {tuple(position.shape)} {position.dtype} on {position.device}"
            )
        if len(rows.starts) != len(queries.lengths) or len(rows.lengths) != len(queries.lengths):
            raise ValueError("queries and keys must have the same documents, each with a start and a length")
        for start, length in zip(rows.starts, rows.lengths, strict=True):
            if start < 0 or length < 0 or start + length > count:
                raise ValueError(f"documents of the {name} reach beyond their {count} rows")
    if not scaling > 0 or (window is not None and window < 1):
        raise ValueError(f"scaling and window must be positive, got {scaling} and {window}")


def check_saved(grad: Tensor, query: Tensor, output: Tensor, lse: Tensor) -> None:
    """Raises ValueError unless what a backward pass is given beside its operands has their shapes."""
    if grad.shape != query.shape or output.shape != query.shape:
        raise ValueError(
            f"gradient {tuple(grad.shape)} and output {tuple(output.shape)} must have the query's shape "
            f"{tuple(query.shape)}"
        )
    if lse.shape != query.shape[:2]:
        raise ValueError(f"log-sum-exp must be {tuple(query.shape[:2])}, got {tuple(lse.shape)}")


def why_not_triton(query: Tensor, keys: Rows) -> str | None:
    """Why the Triton kernels cannot run on this input; None if they can."""
    if keys.valid_N is not None:
        return "keys that are not valid break the order of positions"
    try:
        from lemo.ops.attend_rows import kernel  # noqa: F401 - imports triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return tiling.why_not(query)
