"""GPT-2: learned positions, Conv1D maps."""

from lemo.families.family import Family

FAMILY = Family(
    model_type="gpt2",
    mlp_down="mlp.c_proj",
    tiny={
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_inner": 64,
        "n_positions": 512,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    drop=(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    ),
)
