"""Qwen3: q and k are normalised before RoPE."""

from lemo.families.family import Family

FAMILY = Family(model_type="qwen3", tiny={"head_dim": 8})
