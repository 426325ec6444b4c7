"""StableLM: LayerNorm, partial RoPE."""

from lemo.families.family import Family, LayerNames

FAMILY = Family(
    model_type="stablelm",
    tiny={"hidden_dropout": 0.0, "attention_dropout": 0.0},
    names=LayerNames(norm="layer"),
)
