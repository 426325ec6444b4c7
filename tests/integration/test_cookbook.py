"""Every command and script of the cookbook runs, with the recipes that are shipped, two steps on a tiny model."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lemo.cli.main import app
from lemo.cli.recipe import load_recipe
from tests.integration.pages import DOCS, blocks, commands
from tests.integration.test_guide import SMALL
from tests.train.tiny import byte_tokenizer, save_tiny_model, words

RECIPES = DOCS.parent / "recipes"
SHORT = {"data.window_tokens": 256, "sparsity.block_size": 16, "training.eval_steps": 2}
PAGES = {
    "context-extension.md": {"model.context_length": 256, "calibration.window_tokens": 128, "training.save_steps": 2},
    "long-documents.md": {},
    "code-repositories.md": {"training.save_steps": 2},
}


def fill(folder):
    """A model with a context of 128 or 512 tokens, and data of each kind."""
    save_tiny_model(folder / "model", layers=4, max_position_embeddings=512)
    byte_tokenizer().save_pretrained(folder / "model")
    for number, name in enumerate(("books", "held-out")):
        (folder / f"{name}.txt").write_text(words(900, seed=number))
    row = {"text": words(35), "qas": [{"question": "which?", "answers": ["that"]}]}
    for name in ("contracts", "held-out"):
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 6)
    for number in range(3):
        (folder / "repositories" / f"project{number}").mkdir(parents=True)
        (folder / "repositories" / f"project{number}" / "main.py").write_text(words(300, seed=number))
    shutil.copytree(RECIPES, folder / "recipes")


def test_every_page_is_tried():
    assert {path.name for path in (DOCS / "cookbook").glob("*.md")} == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_the_cookbook_work(page, tmp_path, monkeypatch):
    fill(tmp_path)
    if page == "context-extension.md":
        save_tiny_model(tmp_path / "model", layers=4, max_position_embeddings=128)
    monkeypatch.chdir(tmp_path)
    for code in blocks(f"cookbook/{page}", "python"):
        exec(compile(code, page, "exec"), {})
    small = [*SMALL, *(f"{key}={value}" for key, value in (SHORT | PAGES[page]).items())]
    trained = []
    for name, *arguments in commands(f"cookbook/{page}"):
        assert name == "lemo"
        if arguments[0] == "train":
            arguments += small
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{page}: lemo {' '.join(arguments)}\n{result.output}"
        if arguments[0] == "train":
            run = load_recipe(arguments[1], arguments[2:])
            trained.append(run.output)
            metrics = [json.loads(line) for line in (tmp_path / run.output / "metrics.jsonl").read_text().splitlines()]
            assert sum("loss" in entry for entry in metrics) == 2
            assert "dense after" in result.output
            if run.sparsity.enabled:
                assert "layers skip rows" in result.output or "forward 1.00" in result.output, result.output
    assert trained and all((tmp_path / run / "adapter").is_dir() for run in trained)
    if page == "context-extension.md":
        assert json.loads((tmp_path / "extension.json").read_text())
        assert AutoModelForCausalLM.from_pretrained("merged").config.max_position_embeddings == 256


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid_as_shipped(path):
    """Strictly read, every key known; the model stands in it, the data is the user's."""
    run = load_recipe(path)
    assert run.model.path and run.output
    assert run.sparsity.block_size == 64 and run.data.window_tokens % run.sparsity.block_size == 0
