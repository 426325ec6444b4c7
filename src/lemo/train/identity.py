"""Whose an output folder is: the settings that decide what a run trains, and how those of two runs differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lemo.config import RunConfig, resolved
from lemo.measure.record import config_hash

# Those did not store their settings, and their hash was of more keys.
_EARLIER = ": its recipe differs, or an earlier version of lemo began it"


# Keys of training that do not change what is trained: how often one looks and saves, and what a step keeps in memory.
_FREE = (
    *("logging_steps", "eval_steps", "save_steps", "save_total_limit", "report_to"),
    *("gradient_checkpointing", "segment_rows", "engine", "recompute", "offload"),
)


def run_identity(run: RunConfig) -> str:
    """Hash of everything that changes what is trained: not the output folder, logging, saving or memory."""
    return config_hash(run_settings(run))


def run_settings(run: RunConfig) -> dict[str, Any]:
    """The keys that change what is trained."""
    values = resolved(run)
    del values["output"]
    for key in _FREE:
        del values["training"][key]
    return values


def why_another(stored: Mapping[str, Any] | None, now: Mapping[str, Any], most: int = 6) -> str | None:
    """How settings that a folder stores differ from those of a run that wants to go on there; None for not at all.

    A key that the stored ones lack came with a later version: it counts as its default, which trains as before.

    Args:
        stored: None where the folder stores none.
        now: of the run.
        most: keys that are named, with both values.
    """
    if stored is None:
        return _EARLIER
    defaults = run_settings(RunConfig())
    there = {part: {**defaults[part], **values} for part, values in {**defaults, **stored}.items()}
    flat = [{f"{a}.{b}": value for a, part in each.items() for b, value in part.items()} for each in (there, now)]
    texts = [{key: json.dumps(value) for key, value in each.items()} for each in flat]
    differ = [key for key in dict.fromkeys([*texts[0], *texts[1]]) if texts[0].get(key) != texts[1].get(key)]
    if not differ:
        return None
    said = [f"{key} is {texts[0].get(key, 'not set')} there and {texts[1].get(key, 'not set')} here" for key in differ]
    more = f", and {len(said) - most} keys more" if len(said) > most else ""
    return f": {', '.join(said[:most])}{more}"
