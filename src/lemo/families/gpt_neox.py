"""GPT-NeoX, Pythia: attention and MLP in parallel, partial RoPE."""

from lemo.families.family import Family

FAMILY = Family(
    model_type="gpt_neox",
    mlp_down="mlp.dense_4h_to_h",
    drop=("num_key_value_heads",),
)
