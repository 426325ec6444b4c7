"""OLMo 3: norms after attention and MLP, sliding and full layers in turn."""

from lemo.families.family import Family

FAMILY = Family(model_type="olmo3", tiny={"sliding_window": 24})
