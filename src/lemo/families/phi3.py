"""Phi-3: fused q/k/v and gate/up projections."""

from lemo.families.family import Family

FAMILY = Family(model_type="phi3", tiny={"sliding_window": None})
