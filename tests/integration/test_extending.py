"""The worked examples of docs/extending.md are run as they stand: an op, a family, a scorer, a verb."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import lemo.cli
import lemo.families
import lemo.ops
from lemo.cli.main import ErrorGroup
from lemo.testing import check_case, check_gradient, specs_of
from tests.integration.pages import blocks
from tests.runtime.oracle import batch, tiny_model
from tests.runtime.test_exact import in_double
from tests.runtime.test_fused import assert_equal_engines, plan_of
from tests.train.tiny import save_tiny_model

CODE = blocks("extending.md", "python")
FILES = {found[1]: code for code in CODE if (found := re.match(r"# src/lemo/(\S+)\n", code))}


class ExampleConfig(LlamaConfig):
    model_type = "example"


class ExampleForCausalLM(LlamaForCausalLM):
    config_class = ExampleConfig


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The page's files beside those of the package, importable under their names."""
    for name, code in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    for package in (lemo.ops, lemo.families, lemo.cli):
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / package.__name__.split(".")[1])])
    before = set(sys.modules)
    lemo.families.all_families.cache_clear()
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("lemo.") and str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    monkeypatch.undo()
    lemo.families.all_families.cache_clear()


def test_the_page_names_files_that_would_be_new_or_that_exist():
    assert len(FILES) == 6 and len(CODE) == 7
    new = {name for name in FILES if not (Path(lemo.__file__).parent / name).exists()}
    assert set(FILES) - new == {"core/score.py"}


def test_the_op_meets_its_reference(written):
    (spec,) = specs_of("lemo.ops.scale_rows")
    for case in spec.cases:
        check_gradient(spec, case)
        for dtype in (torch.float32, torch.bfloat16):
            check_case(spec, case, dtype)
    op = importlib.import_module("lemo.ops.scale_rows.op").scale_rows
    with pytest.raises(lemo.BackendError, match="no kernel"):
        op(torch.ones(2, 2), torch.tensor([0]), 2.0, backend="triton")
    with pytest.raises(ValueError, match="int64"):
        op(torch.ones(2, 2), torch.tensor([0.0]), 2.0)


def test_the_family_runs_in_the_fused_engine(written, monkeypatch):
    AutoConfig.register("example", ExampleConfig, exist_ok=True)
    AutoModelForCausalLM.register(ExampleConfig, ExampleForCausalLM, exist_ok=True)
    in_double(monkeypatch)
    model = tiny_model("example", dtype=torch.float64)
    assert model.config.model_type == "example"
    assert_equal_engines(model, plan_of(model, "skip", "all"), batch(48))


def test_the_scorer_ranks_blocks():
    names: dict = {"__name__": __name__}  # a dataclass looks its annotations up in its module
    for code in CODE:
        if "class Latest" in code or "Latest()" in code:
            exec(compile(code, "extending.md", "exec"), names)
    assert names["kept"] == [0, 6, 7, 8, 9]


def test_the_verb_answers_and_fails_like_the_others(written, tmp_path):
    app = typer.Typer(cls=ErrorGroup)
    app.callback()(lambda: None)
    app.command("layers")(importlib.import_module("lemo.cli.layers").layers)
    save_tiny_model(tmp_path / "model", layers=3)
    assert CliRunner().invoke(app, ["layers", str(tmp_path / "model")]).output == "3 layers\n"
    assert CliRunner().invoke(app, ["layers", str(tmp_path)]).exit_code == 2
