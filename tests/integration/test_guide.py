"""Every command of the guide runs, in order, in one folder with a tiny model."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lemo.cli.main import app
from tests.integration.pages import DOCS, commands
from tests.report.test_run_page import check_alone
from tests.train.test_chat import PLAIN, TALK
from tests.train.tiny import byte_tokenizer, save_tiny_model, words

# Order matters: later pages look at the runs of earlier ones.
PAGES = ("recipes.md", "estimate.md", "data.md", "looking.md", "merge.md")
SMALL = ["training.max_steps=2", "calibration.windows=2", "calibration.predictor_steps=3", "data.validation_windows=2"]


def fill(folder):
    """What the guide takes for granted: a model and data."""
    save_tiny_model(folder / "model", layers=3, max_position_embeddings=256)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(folder / "model")
    (folder / "book.txt").write_text(words(1000))
    (folder / "chat.jsonl").write_text(
        "".join(
            json.dumps({"messages": [*TALK, {"role": "user", "content": f"Thanks, {n}."}]}) + "\n" for n in range(12)
        )
    )
    for number, name in enumerate(("first.txt", "second.txt")):
        (folder / name).write_text(words(30, seed=number))


def test_every_page_is_tried():
    # trainers.md has Python instead of commands, which test_site runs.
    assert {path.name for path in (DOCS / "guide").glob("*.md")} == {*PAGES, "trainers.md"}


def test_the_commands_of_the_guide_work(tmp_path, monkeypatch):
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = 0
    for page in PAGES:
        for name, *arguments in commands(f"guide/{page}"):
            assert name == "lemo", f"{page}: {name}"
            if arguments[0] == "train":
                arguments += SMALL
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, f"{page}: lemo {' '.join(arguments)}\n{result.output}"
            done += 1
    assert done == sum(len(commands(f"guide/{page}")) for page in PAGES) == 19
    for page in ("samples.html", "kept.html", "report.html"):
        check_alone((tmp_path / page).read_text())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.model_type == "llama"
    assert json.loads((tmp_path / "lemo.schema.json").read_text())["properties"]["training"]


def test_mistakes_in_the_folder_are_found_by_the_test(tmp_path, monkeypatch):
    """The test above can fail: without the data, the first command of the guide is refused."""
    monkeypatch.chdir(tmp_path)
    _, *arguments = commands("guide/recipes.md")[0]
    assert CliRunner().invoke(app, arguments).exit_code == 2
    with pytest.raises(FileNotFoundError):
        commands("guide/absent.md")
