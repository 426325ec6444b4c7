"""Tensors in, tensors out: the operations the method is made of, each with a plain torch reference."""

from lemo.ops.attend_rows.explicit import attend_backward, attend_forward
from lemo.ops.attend_rows.op import attend_rows, attend_rows_constant, attend_rows_with_lse
from lemo.ops.block_score.op import block_score, key_block_scores
from lemo.ops.gather_rows.op import gather_rows
from lemo.ops.linear_ce.op import linear_ce, linear_ce_module
from lemo.ops.scatter_rows.op import scatter_rows
from lemo.ops.select_rows.op import rank_blocks, select_rows

__all__ = [
    "attend_backward",
    "attend_forward",
    "attend_rows",
    "attend_rows_constant",
    "attend_rows_with_lse",
    "block_score",
    "gather_rows",
    "key_block_scores",
    "linear_ce",
    "linear_ce_module",
    "rank_blocks",
    "scatter_rows",
    "select_rows",
]
