"""Llama 1 to 3, SmolLM2 and everything that shares their class."""

from lemo.families.family import Family, LayerNames

FAMILY = Family(model_type="llama", names=LayerNames(), also=("internlm3", "iquestcoder"))
