"""Seed-OSS: Llama's layers with biases on q, k and v."""

from lemo.families.family import Family, LayerNames

FAMILY = Family(
    model_type="seed_oss", tiny={"head_dim": 8, "residual_dropout": 0.0, "attention_dropout": 0.0}, names=LayerNames()
)
