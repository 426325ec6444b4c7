"""Importing lemo is fast in what it pulls in, and changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "matplotlib", "pydantic", "triton", "numpy")


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["lemo", "lemo.errors", "lemo.config", "lemo.measure.record", "lemo.report.tables"])
def test_import_loads_nothing_heavy(module: str):
    loaded = json.loads(_run(f"import sys, json; import {module}; print(json.dumps(sorted(sys.modules)))"))
    assert module in loaded
    assert not set(HEAVY) & set(loaded)


def test_import_changes_no_class_or_function_of_transformers_and_torch():
    code = """
import torch, transformers
from transformers.models.llama import modeling_llama as llama
def snapshot():
    places = {"llama": llama, "nn.Module": torch.nn.Module, "layer": llama.LlamaDecoderLayer, "torch": torch,
              "F": torch.nn.functional, "Trainer": transformers.Trainer}
    return {f"{p}.{n}": id(v) for p, owner in places.items() for n, v in vars(owner).items() if callable(v)}
hooks = lambda: len(torch.nn.modules.module._global_forward_pre_hooks)
before, hooks_before, threads = snapshot(), hooks(), torch.get_num_threads()
import lemo
lemo.attach, lemo.Plan, lemo.Record
after = snapshot()
changed = [name for name in before if after.get(name) != before[name]]
assert not changed, changed
assert (hooks(), torch.get_num_threads(), torch.is_grad_enabled()) == (hooks_before, threads, True)
"""
    _run(code)


def test_every_public_name_resolves_and_is_documented():
    import lemo

    assert sorted(lemo.__all__) == lemo.__all__
    for name in lemo.__all__:
        assert (getattr(lemo, name).__doc__ or "").strip(), f"lemo.{name} has no docstring"
        assert name in dir(lemo)


def test_unknown_name_is_an_attribute_error():
    import lemo

    with pytest.raises(AttributeError, match="no attribute 'attatch'"):
        _ = lemo.attatch


@pytest.mark.parametrize("first", ["import lemo.calibrate", "import lemo", "from lemo.calibrate import __doc__"])
def test_calibrate_is_callable_whatever_was_imported_before(first: str):
    assert _run(f"{first}\nimport lemo\nprint(callable(lemo.calibrate))").strip() == "True"
