"""Tensors in, tensors out: the operations the method is made of, each with a plain torch reference."""

from lemo.ops.gather_rows.op import gather_rows
from lemo.ops.scatter_rows.op import scatter_rows

__all__ = ["gather_rows", "scatter_rows"]
