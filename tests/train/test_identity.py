"""Whose a folder is: keys of later versions count as their defaults."""

from __future__ import annotations

import copy

from lemo.config import LoraConfig, RunConfig
from lemo.train.identity import run_settings, why_another


def test_settings_of_an_earlier_version():
    """A key that was not there yet makes no other run, unless it is set now; a section neither."""
    now = run_settings(RunConfig())
    stored = copy.deepcopy(now)
    del stored["model"]["load_in_4bit"]
    del stored["calibration"]
    assert why_another(stored, now) is None
    packed = copy.deepcopy(now)
    packed["model"]["load_in_4bit"] = True
    said = why_another(stored, packed)
    assert said is not None and "model.load_in_4bit is false there and true here" in said


def test_differences_are_named():
    """Both values of the keys that differ, six at most; of a key that is gone that it was set."""
    stored, now = run_settings(RunConfig()), run_settings(RunConfig(lora=LoraConfig(rank=3)))
    assert why_another(stored, stored) is None
    assert why_another(stored, now) == ": lora.rank is 16 there and 3 here"
    stored["lora"]["gone"] = 1
    assert "lora.gone is 1 there and not set here" in (why_another(stored, now) or "")
    assert "earlier version" in (why_another(None, now) or "")
