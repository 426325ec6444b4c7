"""Gemma 2: sandwich norms, soft caps, sliding and full layers in turn."""

from lemo.families.family import Family

FAMILY = Family(
    model_type="gemma2",
    tiny={"head_dim": 8, "sliding_window": 24, "query_pre_attn_scalar": 8},
    attention="eager",  # its soft cap is not in SDPA
)
