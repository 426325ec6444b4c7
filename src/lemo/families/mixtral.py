"""Mixtral: a mixture of experts; the router sees the rows that run."""

from lemo.families.family import Family

FAMILY = Family(
    model_type="mixtral",
    mlp_down=None,
    tiny={"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
)
