"""StarCoder2: LayerNorm and a plain two-map MLP."""

from lemo.families.family import Family, LayerNames

FAMILY = Family(
    model_type="starcoder2",
    mlp_down="mlp.c_proj",
    tiny={"sliding_window": None, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    names=LayerNames(norm="layer", gates=("mlp.c_fc",), gated=False, down="mlp.c_proj"),
)
