"""`lemo eval` measures a run on the data that it had, or says that it is another."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from lemo.cli.main import app
from tests.train.test_chat import PLAIN, TALK
from tests.train.tiny import byte_tokenizer, save_tiny_model, words

RECIPE = """
output: {0}/run
model: {{path: {0}/model, dtype: float32}}
data: {{train: [{0}/texts], held_out_share: 0.1, window_tokens: 32, validation_windows: 4}}
sparsity: {{enabled: false}}
lora: {{rank: 2}}
training: {{max_steps: 1}}
"""


def lemo(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def texts(tmp_path):
    """The data folder of a recipe that holds a share out."""
    save_tiny_model(tmp_path / "model", layers=2)
    (tmp_path / "texts").mkdir()
    for number in range(12):
        (tmp_path / "texts" / f"{number:02}.txt").write_text(words(40, seed=number))
    (tmp_path / "r.yaml").write_text(RECIPE.format(tmp_path))
    return tmp_path / "texts"


def test_a_run_is_evaluated_on_the_documents_that_it_held_out(texts):
    base, run = texts.parent, texts.parent / "run"
    made = lemo("train", base / "r.yaml")
    assert made.exit_code == 0, made.output
    assert lemo("eval", run).exit_code == 0
    (texts / "00.txt").rename(base / "other.txt")  # now other documents, trained on, would be held out
    refused = lemo("eval", run)
    assert refused.exit_code == 2 and refused.stderr.count("error: ") == 1
    stored = json.loads((run / "run.json").read_text())["data"]["validation"]
    for part in (f"hash {stored['hash'][:8]}", str(run), "has changed since it began", "data.validation=[FILE]"):
        assert part in refused.stderr
    asked = lemo("eval", run, "data.held_out_share=0.2")
    assert asked.exit_code == 0, "other data was asked for: " + asked.output


def test_chats_of_a_run_have_the_date_of_its_first_day(texts):
    base = texts.parent
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + PLAIN
    tokenizer.save_pretrained(base / "model")
    rows = [{"messages": [{**TALK[1], "content": f"Say {i}."}, TALK[2]]} for i in range(12)]
    (base / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"data.train=[{base}/c.jsonl]", "data.answer_only=true", "data.window_tokens=128"
    assert lemo("train", base / "r.yaml", *data).exit_code == 0
    stored = json.loads((base / "run" / "run.json").read_text())
    assert lemo("eval", base / "run").exit_code == 0
    (base / "run" / "run.json").write_text(json.dumps({**stored, "date": "2020-02-02"}))
    assert "has changed" in lemo("eval", base / "run").stderr, "the stored samples have another date"
