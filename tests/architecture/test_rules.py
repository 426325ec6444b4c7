"""The repository keeps its own rules, and each rule is able to fail."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

from tests.architecture import rules

EXCEPTIONS = tomllib.loads((Path(__file__).parent / "exceptions.toml").read_text())


def _excepted() -> set[tuple[str, str]]:
    return {(entry["rule"], entry["where"]) for entry in EXCEPTIONS.get("exception", [])}


def test_the_repository_keeps_its_rules():
    broken = [v for v in rules.all_violations() if (v.rule, v.where) not in _excepted()]
    assert not broken, "\n" + "\n".join(map(str, broken))


def test_exceptions_do_not_grow_unnoticed():
    entries = EXCEPTIONS.get("exception", [])
    assert len(entries) <= EXCEPTIONS["at_most"], "a new exception needs a higher at_most, and a reviewer who agrees"
    assert all(len(entry["reason"]) >= 20 for entry in entries), "every exception says why"


def test_no_exception_is_left_over():
    needed = {(v.rule, v.where) for v in rules.all_violations()}
    assert _excepted() <= needed, f"no longer needed: {_excepted() - needed}"


def _rules_of(parts: tuple[str, ...], source: str) -> set[str]:
    tree = ast.parse(source)
    where = "/".join(parts)
    found = rules.check_levels(where, parts, tree) + rules.check_fences(where, parts, tree)
    found += rules.check_name(where, parts) + rules.check_size(where, source, tree)
    return {v.rule for v in found}


@pytest.mark.parametrize(
    ("parts", "source", "rule"),
    [
        (("core", "plan.py"), "import lemo.runtime.attach", "levels"),
        (("core", "plan.py"), "def f():\n    from lemo.train import trainer", "levels"),
        (("ops", "op.py"), "from lemo import core", "levels"),
        (("ops", "op.py"), "import lemo\nlemo.attach", "levels"),
        (("novel", "part.py"), "x = 1", "levels"),
        (("ops", "gather", "op.py"), "import triton", "fences"),
        (("core", "plan.py"), "from transformers import AutoModel", "fences"),
        (("train", "lora.py"), "import peft", "fences"),
        (("report", "plots.py"), "from matplotlib import pyplot", "fences"),
        (("cli", "main.py"), "def f():\n    import pydantic", "fences"),
        (("core", "helpers.py"), "x = 1", "names"),
        (("core", "plan.py"), "x = 1\n" * 401, "file lines"),
        (("core", "plan.py"), "def f():\n" + "    x = 1\n" * 60, "function lines"),
        (("core", "plan.py"), "def f(a, b, c, d, e, f, g, h, *i):\n    pass", "parameters"),
    ],
)
def test_each_rule_catches_its_offence(parts: tuple[str, ...], source: str, rule: str):
    assert rule in _rules_of(parts, source)


@pytest.mark.parametrize(
    ("parts", "source"),
    [
        (("core", "plan.py"), "from lemo.errors import PlanError\nfrom lemo.core.layout import Layout"),
        (("runtime", "attach.py"), "from lemo.core.plan import Plan\nimport transformers"),
        (("train", "run.py"), "import lemo\nprint(lemo.__version__)"),
        (("config.py",), "from lemo.errors import ConfigError"),
        (("train", "lora.py"), "def f():\n    import peft"),
        (("core", "plan.py"), "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lemo.runtime.attach"),
        (("ops", "x", "kernel.py"), "import triton\n" + "x = 1\n" * 499),
        (("core", "plan.py"), 'def f():\n    """' + "text\n" * 70 + '"""\n    return 1'),
        (("core", "plan.py"), "class A:\n    def m(self, a, b, c, d, e, f, g, h):\n        pass"),
    ],
)
def test_rules_leave_good_source_alone(parts: tuple[str, ...], source: str):
    assert not _rules_of(parts, source)


def test_a_lazy_package_has_one_place():
    trees = {name: ast.parse("def f():\n    import peft") for name in ("train/lora.py", "runtime/layer.py")}
    found = rules.check_one_place(trees)
    assert [v.where for v in found] == ["train/lora.py"]


@pytest.mark.parametrize("line", ["open('/" + "home/someone/x')", "10.2.3" + ".4", "see https:" + "//example.org/x"])
def test_machine_bound_text_is_caught(line: str):
    assert rules.check_portable("f", line)


@pytest.mark.parametrize("line", ["127.0.0.1", "https:" + "//github.com/o/r", "x = a/tmp/b", "torch 2.13.0"])
def test_portable_text_is_left_alone(line: str):
    assert not rules.check_portable("f", line)
