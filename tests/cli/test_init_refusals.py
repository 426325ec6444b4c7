"""What `lemo init` leaves out of the data it says, and data that would train otherwise than meant it refuses."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from lemo.cli.draft import draft_recipe
from lemo.cli.main import app
from lemo.cli.recipe import load_recipe
from lemo.cli.shape import Wish, missing_windows
from lemo.train.survey import DataFacts, MachineFacts, survey_model
from tests.train.test_chat import PLAIN, TALK
from tests.train.tiny import byte_tokenizer, save_tiny_model, words

ASKED, ANSWERED = "What is it?", "A thing that is known to all of us."


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("m") / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def init(model, tmp_path):
    """Runs the verb; each list of rows among the arguments becomes a file."""

    def run(*arguments):
        given = []
        for number, argument in enumerate(arguments):
            if isinstance(argument, list):
                path = tmp_path / f"{number}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in argument))
                argument = path
            given.append(str(argument))
        return CliRunner().invoke(app, ["init", str(model), *given, "--out", str(tmp_path / "r.yaml")])

    return run


def refused(result, *parts):
    assert result.exit_code == 2, result.output
    assert result.stderr.count("error: ") == 1 and all(part in result.stderr for part in parts)


@pytest.mark.parametrize("pair", [("instruction", "response"), ("question", "answer"), ("prompt", "response")])
def test_a_question_and_its_answer_are_not_taken_apart(init, pair):
    asked, answered = pair
    rows = [{asked: ASKED, "input": "", answered: ANSWERED}] * 30
    refused(init(rows), repr(asked), repr(answered), '"messages": [{"role": "user"', "data.text_field=KEY")


def test_one_of_a_pair_can_be_asked_for(init, tmp_path):
    made = init([{"instruction": ASKED, "output": ANSWERED * 20}] * 30, "data.text_field=output")
    assert made.exit_code == 0, made.output
    assert "not used: instruction" in made.stdout
    text = (tmp_path / "r.yaml").read_text()
    assert "key of the text in each row; not used: instruction" in text
    assert load_recipe(tmp_path / "r.yaml").data.text_field == "output"


def test_a_prompt_with_its_completion_is_one_sample(init, tmp_path):
    made = init([{"prompt": ASKED, "completion": ANSWERED}] * 30)
    assert made.exit_code == 0 and "not used" not in made.output, made.output
    assert load_recipe(tmp_path / "r.yaml").data.answer_only


@pytest.mark.parametrize("field", ["text", "body"])
def test_text_that_is_not_used_is_named(init, tmp_path, field):
    made = init([{"title": "of it", field: words(200), "n": 3}] * 30)
    assert made.exit_code == 0, made.output
    assert "note: the first row has text that is not used: title\n" in made.stdout
    assert f"text_field: {field} " in (tmp_path / "r.yaml").read_text()


def test_conversations_of_both_kinds_stand_beside_each_other(init, tmp_path):
    spoken = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]
    made = init([{"conversations": spoken}] * 30, "--validation", [{"messages": TALK}] * 3)
    assert made.exit_code == 0, made.output
    assert "messages_field" not in (tmp_path / "r.yaml").read_text()
    named = [{"chat": spoken}] * 3
    (tmp_path / "r.yaml").unlink()
    refused(init([{"messages": TALK}] * 30, "--validation", named), "'chat'", "'messages'")


def test_a_field_for_text_beside_conversations_is_refused(init):
    refused(init([{"messages": TALK}] * 30, "data.text_field=text"), "is a conversation")


@pytest.mark.parametrize(
    ("held", "parts"),
    [
        ([{"messages": TALK}] * 3, ("conversations", "the training data text")),
        ([{"body": words(300)}] * 3, ("'body'", "'text'")),
    ],
)
def test_validation_of_another_kind_is_refused(init, held, parts):
    refused(init([{"text": words(300)}] * 30, "--validation", held), "--validation", *parts)


def test_a_window_that_no_document_fills_is_refused(init, tmp_path):
    made = init([{"text": words(40)}] * 12, "--window", 500)
    refused(made, "--window: no window of 500 tokens comes out: the longest document has about", "a smaller --window")
    assert not (tmp_path / "r.yaml").exists()


@pytest.mark.parametrize(
    ("lengths", "window", "part"),
    [
        ((1100,) * 30, 2000, None),  # several share one
        ((1100,) * 12, 2000, "longest document has about 1,100; name a smaller --window"),
        ((1000,), 950, "no window of 950 tokens"),  # a tenth of the document is held out
        ((1000,), 200, "no window for validation of 200 tokens"),
        ((1000,), 100, None),
        ((1000,) * 30, 1000, None),
    ],
)
def test_windows_that_are_missing(lengths, window, part):
    found = missing_windows(Wish(("d",), window_tokens=window), DataFacts("text", None, lengths, max(lengths)))
    assert found is None if part is None else part in found


def test_documents_shorter_than_the_window_asked_for_share_it(init, tmp_path):
    for length, shared in ((40, True), (4000, False)):
        made = init([{"text": words(length)}] * 300, "--window", 500)
        assert made.exit_code == 0 and "warning" not in made.stderr
        run = load_recipe(tmp_path / "r.yaml")
        assert run.data.packing == shared and run.data.window_tokens == 500
        (tmp_path / "r.yaml").unlink()


def test_a_short_run_has_no_warmup_and_says_no_other_thing(model):
    settings, gpu = survey_model(str(model)), MachineFacts("card", True, 80 * 2**30, True)
    for length, comment in ((5000, "none: the run is short"), (500_000, "the first of them runs at rate 0")):
        text = draft_recipe(Wish(("d.txt",)), settings, DataFacts("text", None, (length,), length), gpu)
        line = next(line for line in text.splitlines() if "warmup_steps" in line)
        assert comment in line and ("warmup_steps: 0 " in line) == (length == 5000)
