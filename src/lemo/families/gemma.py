"""Gemma: tied and scaled embeddings."""

from lemo.families.family import Family

FAMILY = Family(model_type="gemma", tiny={"head_dim": 8})
