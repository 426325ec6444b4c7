"""Phi-3: fused q/k/v and gate/up projections."""

from lemo.families.family import Family, LayerNames

FAMILY = Family(
    model_type="phi3",
    tiny={"sliding_window": None},
    names=LayerNames(inputs=("self_attn.qkv_proj",), gates=("mlp.gate_up_proj",)),
)
