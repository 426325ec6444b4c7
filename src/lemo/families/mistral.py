"""Mistral: one causal or sliding mask for all layers."""

from lemo.families.family import Family, LayerNames

FAMILY = Family(model_type="mistral", tiny={"sliding_window": None}, names=LayerNames())
