"""Qwen2: biases on q, k and v."""

from lemo.families.family import Family, LayerNames

FAMILY = Family(model_type="qwen2", names=LayerNames())
