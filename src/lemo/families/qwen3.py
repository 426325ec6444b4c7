"""Qwen3: q and k are normalised before RoPE."""

from lemo.families.family import Family, LayerNames

FAMILY = Family(
    model_type="qwen3", tiny={"head_dim": 8}, names=LayerNames(head_norms=("self_attn.q_norm", "self_attn.k_norm"))
)
