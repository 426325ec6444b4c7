"""Gemma 3 (text): its own RoPE for sliding and for full layers."""

from lemo.families.family import Family

FAMILY = Family(
    model_type="gemma3_text",
    tiny={"head_dim": 8, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2},
)
