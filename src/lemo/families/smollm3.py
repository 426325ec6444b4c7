"""SmolLM3: some layers without RoPE."""

from lemo.families.family import Family, LayerNames

FAMILY = Family(model_type="smollm3", tiny={"no_rope_layer_interval": 2}, names=LayerNames())
