"""What one kept row costs in memory between forward and backward, in each layer that it runs."""

from __future__ import annotations

from lemo.measure.fused_memory import index_bytes, saved_bytes
from lemo.measure.layer_rows import LayerRows
from lemo.measure.sizes import ModelSizes


def saved_row_kib(
    sizes: ModelSizes, recompute: str, *, keep: float = 0.5, tokens: int = 65536, kv_all: bool = False
) -> float:
    """KiB that a layer of the fused engine keeps per row that passes gradient.

    Numbers of rows and positions count, and what skipped rows leave (1/rms of the bypass; their inputs, keys and values
    with `kv_all`). Masks of dropout are made again and count nothing.

    Args:
        sizes: of the model.
        recompute: `none`, `mlp`, `lin` or `layer`.
        keep: share of the rows that run the layer, forward and backward.
        tokens: rows of the batch.
        kv_all: rows that skip the layer still offer keys and values.
    """
    kept = round(keep * tokens)
    rows = LayerRows(tokens, kept, kept, kv_all=kv_all and kept < tokens)
    return (sum(saved_bytes(sizes, rows, recompute).values()) + index_bytes(rows)) / kept / 1024
