"""OPT: LayerNorm, learned positions, MLP maps on the layer itself."""

from lemo.families.family import Family, LayerNames

FAMILY = Family(
    model_type="opt",
    mlp=("fc1", "fc2"),
    mlp_down="fc2",
    tiny={"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    drop=("intermediate_size", "num_key_value_heads"),
    names=LayerNames(
        norms=("self_attn_layer_norm", "final_layer_norm"),
        norm="layer",
        output="self_attn.out_proj",
        gates=("fc1",),
        gated=False,
        down="fc2",
        final_norm=None,
    ),
)
