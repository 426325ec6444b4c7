"""Families: data about Hugging Face architectures. A model type without a file here still skips rows generically."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from lemo.families.family import Family

__all__ = ["Family", "all_families", "find_family", "head_transform"]


@cache
def all_families() -> dict[str, Family]:
    """Every family by `model_type`, read from the modules of this package."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        family = getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILY", None)
        if family is not None:
            found[family.model_type] = family
    return found


def find_family(config: Any) -> Family | None:
    """The family of a Transformers configuration, or None when no file describes it."""
    wanted = config.get_text_config().model_type
    return next((x for x in all_families().values() if wanted == x.model_type or wanted in x.also), None)


def head_transform(config: Any) -> tuple[float, float | None]:
    """Factor and soft cap between the LM head's product and the logits: (logit_scale, softcap or None).

    Source: `final_logit_softcapping` (Gemma), `logit_scale` (Cohere), `logits_scaling` (Granite divides by it),
    `lm_head_multiplier` (Falcon-H1) of the Transformers configurations.
    """
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None)
    if scale is None:
        scale = getattr(text, "lm_head_multiplier", None)
    if scale is None and getattr(text, "logits_scaling", None) is not None:
        scale = 1.0 / text.logits_scaling
    return (1.0 if scale is None else float(scale)), getattr(text, "final_logit_softcapping", None)
