"""Rows of other tools are the samples that lemo's own rows of the same content are, or are refused by name."""

from __future__ import annotations

import json

import pytest

from lemo.config import DataConfig
from lemo.errors import DataError
from lemo.train.data import load_windows
from lemo.train.documents import FieldNames, make_document
from lemo.train.foreign_rows import ROLES
from lemo.train.survey import survey_data
from tests.train.test_chat import PLAIN, TALK, tokenizer
from tests.train.test_chat_tokens import TOOLS, WITH_TOOLS
from tests.train.tiny import byte_tokenizer

SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
ASKED = {"instruction": "Name the largest.", "input": "Mars, Jupiter", "output": "Jupiter."}


def shared(talk):
    """Messages as ShareGPT has them."""
    return [{"from": SPEAKERS[m["role"]], "value": m["content"]} for m in talk]


def write(path, rows):
    """A file or datasets folder of rows, of the kind that its name says."""
    if path.suffix == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pytest.importorskip("datasets").Dataset.from_list(rows).save_to_disk(path)
    return str(path)


def load(path, made=None, **settings):
    config = DataConfig(train=(path,), **{"window_tokens": 512, "answer_only": True, **settings})
    return load_windows(config, made or tokenizer())


def samples(path, made=None, **settings):
    """Tokens and labels of all samples."""
    dataset, _ = load(path, made, **settings)
    return [(dataset[i]["input_ids"].tolist(), dataset[i]["labels"].tolist()) for i in range(len(dataset))]


def read(row, fields=None):
    return make_document(row, fields or FieldNames(), name="f:1", place="f, row 1")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a"])
def test_both_kinds_are_what_messages_of_the_same_words_are(tmp_path, name):
    talks = [TALK[1:], TALK]
    own = write(tmp_path / "own.jsonl", [{"messages": talk} for talk in talks])
    (tmp_path / "s").mkdir()
    theirs = write(tmp_path / "s" / name, [{"id": str(i), "conversations": shared(t)} for i, t in enumerate(talks)])
    assert samples(theirs) == samples(own)
    turns = [("Name the largest.\n\nMars, Jupiter", "Jupiter."), ("Say yes.", "Yes.")]
    talks = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in turns]
    own = write(tmp_path / "turns.jsonl", [{"messages": talk} for talk in talks])
    rows = [ASKED, {"instruction": "Say yes.", "input": "", "output": "Yes."}]
    (tmp_path / "i").mkdir()
    assert samples(write(tmp_path / "i" / name, rows)) == samples(own)


def test_every_speaker_has_a_role():
    known = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool", "observation": "tool"}
    assert known.items() <= ROLES.items() and set(ROLES.values()) == {"system", "user", "assistant", "tool"}
    for speaker, role in ROLES.items():
        (message,) = read({"conversations": [{"from": speaker, "value": "x"}]}).messages
        assert message == {"role": role, "content": "x"}


@pytest.mark.parametrize(
    ("conversation", "text"),
    [
        (
            [{"from": "human", "value": "x"}, {"from": "robot", "value": "y"}],
            "message 2 .* is from 'robot'; known are sy",
        ),
        ([{"from": 3, "value": "y"}], "message 1 .* is from 3; known"),
        ([{"from": "function_call", "value": "{}"}], "message 1 .*'function_call': it calls tools, which is not supp"),
        ([{"from": "human", "value": "x"}, {"value": "y"}], "message 2 .* has no 'from', and others have"),
        ([{"from": "human", "value": None}], r"message 1 .* \(human\) has no text in 'value'"),
        ([{"from": "gpt", "value": " "}], r"message 1 .* \(gpt\) has no text in 'value'"),
        ([{"from": "gpt", "value": "y", "weight": 0.5}], "message 1 .* has weight 0.5"),
        ([{"from": "gpt", "value": "y", "tool_calls": [{"name": "f"}]}], "message 1 .* calls tools"),
        ([], "must be a list of messages"),
    ],
)
def test_messages_that_cannot_be_used_are_named(tmp_path, conversation, text):
    rows = [{"conversations": shared(TALK)}, {"conversations": conversation}]
    with pytest.raises(DataError, match=rf"a\.jsonl, row 2: .*{text}"):
        load(write(tmp_path / "a.jsonl", rows))


def test_weights_tools_and_system_prompts_count_as_in_messages(tmp_path):
    made = tokenizer(WITH_TOOLS)
    spoken, own = shared(TALK[1:]), [dict(message) for message in TALK]
    spoken[1]["weight"] = own[2]["weight"] = 0
    theirs = {"conversations": spoken, "tools": json.dumps(TOOLS), "system": TALK[0]["content"]}
    found = samples(write(tmp_path / "a.jsonl", [theirs]), made)
    assert found == samples(write(tmp_path / "b.jsonl", [{"messages": own, "tools": TOOLS}]), made)
    assert made.decode([token for token in found[0][1] if token != -100]) == "Jupiter. Again <|user|> é<end>"
    assert read({**theirs, "conversations": shared(TALK)}).messages[0] == TALK[0], "the same prompt twice is one"
    with pytest.raises(DataError, match="row 1: has a system prompt in 'system' and another in 'conversations'"):
        read({"conversations": shared(TALK), "system": "Be long."})
    with pytest.raises(DataError, match="'system' must be text, got int"):
        read({"conversations": shared(TALK), "system": 3})


def test_of_several_ways_to_read_a_row_the_first_is_taken():
    talk, chat = TALK[1:3], shared(TALK[3:])
    words = [[m["content"] for m in part] for part in (talk, TALK[3:])]
    pair = {"prompt": "p", "completion": "c"}

    def said(row, **names):
        return [message["content"] for message in read(row, FieldNames(**names)).messages]

    assert said({"messages": talk, "conversations": chat, "text": "t"}) == words[0]
    assert said({"messages": None, "conversations": chat, "text": "t", **pair, **ASKED}) == words[1]
    assert said({"messages": talk, "conversations": chat}, messages="conversations") == words[1]
    assert said({"chat": chat, "text": "t"}, messages="chat") == words[1]
    assert said({"conversations": talk}) == words[0], "role and content are read there, too"
    assert read({"conversations": "no list", "text": "t"}).text == "t"
    document = read({"text": "t", **pair, **ASKED})
    assert (document.text, document.messages, document.completion) == ("t", (), "")
    document = read({**pair, **ASKED})
    assert (document.text, document.messages, document.completion) == ("p", (), "c")
    assert read(ASKED, FieldNames(text="output")).text == "Jupiter."


def test_without_a_chat_template_an_instruction_is_a_prompt(tmp_path):
    made = byte_tokenizer()
    rows = [ASKED, {"instruction": "Say yes.", "input": None, "output": "Yes.", "system": "Be brief."}]
    prompts = ["Name the largest.\n\nMars, Jupiter\n\n", "Be brief.\n\nSay yes.\n\n"]
    own = [{"prompt": p, "completion": row["output"]} for p, row in zip(prompts, rows, strict=True)]
    path = write(tmp_path / "a.jsonl", rows)
    assert samples(path, made) == samples(write(tmp_path / "b.jsonl", own), made)
    _, report = load(path, made)
    assert [note for note in report.notes if "no chat template, so each instruction" in note] == report.notes[:1]
    assert not load(path)[1].notes
    kinds = [survey_data([path], each).kind for each in (made, tokenizer())]
    assert kinds == ["completion", "messages"]
    ((ids, labels),) = samples(write(tmp_path / "c.jsonl", rows[1:]), tokenizer())
    template = "<|system|>\nBe brief.<end>\n<|user|>\nSay yes.<end>\n<|assistant|>\nYes.<end>\n"
    assert made.decode(ids) == template and made.decode([x for x in labels if x != -100]) == "Yes.<end>"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"output": " "}, "field 'output' is empty"),
        ({"instruction": 3}, "field 'instruction' must be text, got int"),
        ({"input": ["a"]}, "field 'input' must be text, got list"),
        ({"history": [["a", "b"]]}, "field 'history' of instructions is not read"),
        ({"tools": TOOLS}, "field 'tools' needs a conversation, and 'instruction' is text"),
        ({"output": "half \ud83d"}, "half of a surrogate pair"),
    ],
)
def test_instructions_that_cannot_be_used_are_named(change, text):
    with pytest.raises(DataError, match=f"f, row 1: .*{text}"):
        read({**ASKED, **change})
    assert read({**ASKED, "history": [], "tools": "", "system": None}) == read(ASKED)


def test_rows_with_answers_ask_for_answer_only(tmp_path):
    rows = {"an instruction with its output": ASKED, "a conversation": {"conversations": shared(TALK)}}
    for name, row in rows.items():
        with pytest.raises(DataError, match=rf"row 1: is {name}: set data\.answer_only=true"):
            load(write(tmp_path / "a.jsonl", [row]), answer_only=False)


@pytest.mark.parametrize("field", ["messages", "conversations"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_templates_do_not_see_calls_that_are_none(tmp_path, field, name):
    """Those that only ask whether there is a list of calls would write them."""
    asking = PLAIN.replace("{{ m.content }}", "{% if 'tool_calls' in m %}CALLS{% endif %}{{ m.content }}")
    talk = [dict(message) for message in (TALK if field == "messages" else shared(TALK))]
    wanted = samples(write(tmp_path / "b.jsonl", [{field: talk}]), tokenizer(asking))
    talk[1].update(tool_calls=None)
    talk[2].update(tool_calls=[])
    assert samples(write(tmp_path / name, [{field: talk}]), tokenizer(asking)) == wanted


def test_a_survey_finds_conversations_under_any_key(tmp_path):
    made = tokenizer()
    row = {"id": "7", "tools": "", "system": "Be brief.", "chat": shared(TALK[1:])}
    found = survey_data([write(tmp_path / "a.jsonl", [row])], made)
    assert (found.kind, found.field, found.unused) == ("messages", "chat", ("id",))
    row = {**row, "conversations": row.pop("chat")}
    mixed = write(tmp_path / "b.jsonl", [row, {"messages": TALK}])
    found = survey_data([mixed], made)
    assert (found.kind, found.field) == ("messages", "conversations") and len(samples(mixed)) == 2
    found = survey_data([write(tmp_path / "c.jsonl", [{**ASKED, "source": "a book"}])], made)
    assert (found.kind, found.field, found.unused) == ("messages", None, ("source",))
    found = survey_data([write(tmp_path / "d.jsonl", [{**ASKED, "text": "a text"}])], made)
    assert (found.kind, found.field, found.unused) == ("text", "text", ("instruction", "input", "output"))


def test_lengths_are_those_of_samples_with_what_templates_add(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": f"Say {i}.", "output": f"{i}."} for i in range(10, 90)])
    found, sizes = survey_data([path], tokenizer()), [len(ids) for ids, _ in samples(path)]
    assert found.tokens == pytest.approx(sum(sizes), rel=0.02) and found.longest_tokens == max(sizes)
