"""Tensors in, tensors out: the operations the method is made of, each with a plain torch reference."""

from lemo.ops.attend_local.backward import attend_local_backward
from lemo.ops.attend_local.op import attend_local
from lemo.ops.attend_local.plan import plan_local
from lemo.ops.attend_rows.explicit import attend_backward, attend_forward
from lemo.ops.attend_rows.far import draw_far, plan_far
from lemo.ops.attend_rows.op import attend_rows, attend_rows_constant, attend_rows_with_lse
from lemo.ops.attend_rows.stripes import plan_rows
from lemo.ops.block_score.op import block_score, key_block_scores
from lemo.ops.dropout_rows.op import dropout_rows
from lemo.ops.gated_act.op import gated_act, gated_act_backward
from lemo.ops.gated_act.reference import LowRank
from lemo.ops.gather_rows.op import gather_rows
from lemo.ops.linear_ce.op import linear_ce, linear_ce_module
from lemo.ops.norm_rows.op import norm_rows, norm_rows_backward
from lemo.ops.pool_blocks.op import pool_blocks
from lemo.ops.rope_rows.op import rope_rows_
from lemo.ops.scatter_rows.op import scatter_rows, writable
from lemo.ops.score_blocks.op import score_blocks
from lemo.ops.select_rows.op import rank_blocks, select_rows
from lemo.ops.stream_rows.op import bypass_rows_, bypass_rows_backward_, write_rows_

__all__ = [
    "LowRank",
    "attend_backward",
    "attend_forward",
    "attend_local",
    "attend_local_backward",
    "attend_rows",
    "attend_rows_constant",
    "attend_rows_with_lse",
    "block_score",
    "bypass_rows_",
    "bypass_rows_backward_",
    "draw_far",
    "dropout_rows",
    "gated_act",
    "gated_act_backward",
    "gather_rows",
    "key_block_scores",
    "linear_ce",
    "linear_ce_module",
    "norm_rows",
    "norm_rows_backward",
    "plan_far",
    "plan_local",
    "plan_rows",
    "pool_blocks",
    "rank_blocks",
    "rope_rows_",
    "scatter_rows",
    "score_blocks",
    "select_rows",
    "writable",
    "write_rows_",
]
