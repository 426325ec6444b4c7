"""Ministral: full layers, and sliding ones that say so themselves."""

from lemo.families.family import Family, LayerNames

FAMILY = Family(model_type="ministral", tiny={"head_dim": 8, "layer_types": ["full_attention"] * 4}, names=LayerNames())
