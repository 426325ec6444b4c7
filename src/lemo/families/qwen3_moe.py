"""Qwen3 mixture of experts: the router sees the rows that run."""

from lemo.families.family import Family

FAMILY = Family(
    model_type="qwen3_moe",
    mlp_down=None,
    tiny={"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
)
