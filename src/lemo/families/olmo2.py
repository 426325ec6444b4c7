"""OLMo 2: norms after attention and MLP."""

from lemo.families.family import Family

FAMILY = Family(model_type="olmo2")
