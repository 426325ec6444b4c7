"""SmolLM3: some layers without RoPE."""

from lemo.families.family import Family

FAMILY = Family(model_type="smollm3", tiny={"no_rope_layer_interval": 2})
