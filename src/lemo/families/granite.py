"""Granite: multipliers on embeddings, residuals, attention and logits."""

from lemo.families.family import Family, LayerNames

FAMILY = Family(
    model_type="granite",
    tiny={
        "logits_scaling": 4.0,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.25,
    },
    names=LayerNames(multiplier="residual_multiplier"),
)
