"""Ids that never collide, marks and half characters, prompts with completions, .json and .parquet."""

from __future__ import annotations

import builtins
import gzip
import json
from pathlib import Path

import pytest

from lemo.config import DataConfig
from lemo.errors import DataError
from lemo.train.data import load_windows
from lemo.train.sources import describe_unread, list_sources, name_sources, read_documents
from lemo.train.survey import survey_data
from tests.train.test_chat import TALK, tokenizer
from tests.train.test_chat_tokens import TOOLS, WITH_TOOLS, prepending_tokenizer, template_tokens
from tests.train.tiny import byte_tokenizer


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def names(*paths):
    return name_sources([Path(path) for path in paths])


def test_files_of_one_name_are_told_apart_and_others_keep_theirs():
    assert names("d/x/data.jsonl", "d/y/data.jsonl", "d/y/more.txt") == ["x/data.jsonl", "y/data.jsonl", "more.txt"]
    assert names("a/x/data.jsonl", "b/x/data.jsonl") == ["a/x/data.jsonl", "b/x/data.jsonl"]
    assert names("data.jsonl", "/d/data.jsonl") == ["data.jsonl", "d/data.jsonl"]
    assert names("d/data.jsonl", "/d/data.jsonl") == ["d/data.jsonl", "/d/data.jsonl"]
    assert names("d/data.jsonl", "d/data.jsonl", "d/data.jsonl") == ["data.jsonl", "data.jsonl~2", "data.jsonl~3"]


def test_every_sample_has_an_id_of_its_own(tmp_path):
    for folder in ("x", "y"):
        write(tmp_path / folder / "data.jsonl", [{"text": "a" * 40}, {"text": "b" * 40}])
        (tmp_path / folder / "book.txt").write_text("c" * 40)
    config = DataConfig(
        train=(str(tmp_path / "x"), str(tmp_path / "y"), str(tmp_path / "x")), window_tokens=16, remainder="keep"
    )
    dataset, _ = load_windows(config, byte_tokenizer())
    ids = [window.sample_id for window in dataset.windows]
    assert len(set(ids)) == len(ids) == 3 * 9
    assert {"x/data.jsonl:2#0", "y/book.txt#1", "x/data.jsonl~2:1#2"} <= set(ids)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone".encode())
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "two"}\n'.encode())
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress('\ufeff{"text": "three"}\n'.encode()))
    assert [document.text for document in read_documents([tmp_path])] == ["one", "two", "three"]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "so \ud83d far"},
        {"text": "so", "qas": [{"question": "\udc00?", "answers": ["a"]}]},
        {"messages": [*TALK[:2], {"role": "assistant", "content": "Jup\ud800"}]},
        {"prompt": "p", "completion": " \ud800"},
    ],
)
def test_half_a_character_is_named_with_its_row(tmp_path, row):
    path = write(tmp_path / "d.jsonl", [{"text": "good \U0001f600"}, row])
    with pytest.raises(DataError, match=r"d\.jsonl, row 2: \\ud[0-9a-f]{3} .*half of a surrogate pair"):
        list(read_documents([path]))


def test_files_of_a_folder_that_are_not_read_are_said(tmp_path):
    write(tmp_path / "d" / "a.jsonl", [{"text": "a" * 40}])
    for name in ("b.parquet", "c.csv", "readme.md"):
        (tmp_path / "d" / name).write_bytes(b"x")
    config = DataConfig(train=(str(tmp_path / "d"),), window_tokens=16)
    _, report = load_windows(config, byte_tokenizer())
    said = report.lines()[-1]
    assert said.startswith("not read beside") and "b.parquet, " in said and "c.csv (" in said and "readme" not in said
    assert describe_unread([tmp_path / "d" / "a.jsonl"]) is None
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "f.csv").write_bytes(b"x")
    with pytest.raises(DataError, match=r"is no datasets folder; it holds f\.csv"):
        list_sources([tmp_path / "e"])


def test_json_lists(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=1))
    assert [(d.text, d.name) for d in read_documents([path])] == [("one", "rows.json:1"), ("two", "rows.json:2")]
    for content, text in (
        ('{"text": "one"}', "must hold a list of JSON objects, got dict; .* named .jsonl"),
        ('[{"text":\n 1,]', r"not valid JSON \(.* at line 2, column"),
        ("[3]", "row 1: must be a JSON object, got int"),
        ("[]", "holds no documents"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=rf"rows\.json.*{text}"):
            list(read_documents([path]))


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    rows = [
        {"messages": TALK[1:3], "tools": [{"name": "a", "parameters": {"x": "int"}}]},
        {"messages": TALK[3:], "tools": [{"name": "b", "parameters": {"y": "int"}}]},
    ]
    folder = tmp_path / "d"
    folder.mkdir()
    parquet.write_table(arrow.Table.from_pylist(rows), folder / "train.parquet")
    for source in (folder, folder / "train.parquet"):
        documents = list(read_documents([source]))
        assert [document.name for document in documents] == ["train.parquet:1", "train.parquet:2"]
        assert [list(document.tools) for document in documents] == [row["tools"] for row in rows]  # no key of the other
        assert [[m["content"] for m in d.messages] for d in documents] == [
            [m["content"] for m in row["messages"]] for row in rows
        ]
    assert survey_data([str(folder)], tokenizer(WITH_TOOLS)).kind == "messages"
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read as \.parquet"):
        list(read_documents([tmp_path / "bad.parquet"]))


def test_parquet_without_its_package_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"x")
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"a\.parquet: .*needs the package `pyarrow`: pip install 'lemo\[datasets\]'"):
        list(read_documents([tmp_path / "a.parquet"]))


def completed(tmp_path, rows, made=None, **settings):
    path = write(tmp_path / "p.jsonl", rows)
    config = DataConfig(train=(path,), **{"window_tokens": 64, "answer_only": True, **settings})
    return load_windows(config, made or byte_tokenizer())


def parts(dataset, made, index=0):
    """Text of a sample, and what of it is learned."""
    sample = dataset[index]
    return made.decode(sample["input_ids"]), made.decode(sample["input_ids"][sample["labels"] != -100])


def test_completions_are_learned_and_prompts_are_not(tmp_path):
    dataset, _ = completed(tmp_path, [{"prompt": "Largest?\nAnswer:", "completion": " Jupiter."}])
    assert parts(dataset, byte_tokenizer()) == ("Largest?\nAnswer: Jupiter.<end>", " Jupiter.<end>")
    assert dataset[0]["sample_id"] == "p.jsonl:1"
    with pytest.raises(DataError, match=r"row 1: is a prompt with its completion: set data\.answer_only=true"):
        completed(tmp_path, [{"prompt": "a", "completion": "b"}], answer_only=False)


def test_completions_are_tokenised_with_their_prompts(tmp_path):
    made = prepending_tokenizer()
    dataset, _ = completed(tmp_path, [{"prompt": "hi there:", "completion": " It is fine."}], made)
    whole = made("hi there: It is fine.")["input_ids"]
    assert dataset[0]["input_ids"].tolist() == [*whole, made.eos_token_id]
    learned = dataset[0]["input_ids"][dataset[0]["labels"] != -100]
    assert made.convert_ids_to_tokens(learned) == ["▁It", "▁is", "▁fine.", "</s>"]
    with pytest.raises(DataError, match="share a token; begin the completion with a space"):
        completed(tmp_path, [{"prompt": "hi the", "completion": "re It is"}], made)


def test_long_prompts_lose_their_beginning(tmp_path):
    rows = [{"prompt": "x" * 80 + "Answer:", "completion": " Jupiter."}]
    with pytest.raises(DataError, match="row 1: the sample has 97 tokens, the window 64"):
        completed(tmp_path, rows)
    dataset, report = completed(tmp_path, rows, long_rows="truncate")
    assert parts(dataset, byte_tokenizer()) == ("x" * 47 + "Answer: Jupiter.<end>", " Jupiter.<end>")
    assert report.truncated == 1 and report.tokens == report.kept_tokens + sum(report.lost_tokens.values())
    with pytest.raises(DataError, match="the completion alone has 81 tokens"):
        completed(tmp_path, [{"prompt": "x", "completion": "y" * 80}], long_rows="truncate")


def test_a_prompt_of_messages_gives_no_answer_to_learn(tmp_path):
    made = tokenizer(WITH_TOOLS)
    row = {"prompt": TALK[:4], "completion": TALK[4:], "tools": TOOLS}
    dataset, _ = completed(tmp_path, [row], made, window_tokens=512)
    assert dataset[0]["input_ids"].tolist() == template_tokens(made, TALK, tools=TOOLS)
    assert parts(dataset, made)[1] == "Jupiter. Again <|user|> é<end>"
    found = survey_data([write(tmp_path / "q.jsonl", [row])], made)
    assert (found.kind, found.field) == ("messages", None)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "a", "completion": TALK}, "must both be text or both lists of messages, got str and list"),
        ({"prompt": "a", "completion": " "}, "field 'completion' is empty"),
        ({"prompt": "a", "completion": "b", "tools": TOOLS}, "field 'tools' needs a conversation"),
        ({"prompt": TALK[1:2], "completion": TALK[3:4]}, "the conversation has no assistant message"),
    ],
)
def test_bad_completions_are_named(tmp_path, row, text):
    with pytest.raises(DataError, match=rf"p\.jsonl, row 1: .*{text}"):
        completed(tmp_path, [row], tokenizer())


def test_a_survey_knows_completions_and_text_comes_first(tmp_path):
    row = {"prompt": "Largest?", "completion": " Jupiter.", "id": "a" * 99}
    found = survey_data([write(tmp_path / "a.jsonl", [row, row])], byte_tokenizer())
    assert (found.kind, found.field, found.answers, found.longest_tokens) == ("completion", None, True, 18)
    found = survey_data([write(tmp_path / "b.jsonl", [{**row, "text": "plain"}])], byte_tokenizer())
    assert (found.kind, found.field) == ("text", "text")


def test_the_longest_sample_is_the_one_of_most_tokens(tmp_path):
    """Here umlauts are two tokens each, so that fewer characters make the longer sample."""
    rows = [{"prompt": "Say: ", "completion": "a" * 300}, {"prompt": "Say: ", "completion": "ä" * 200}]
    found = survey_data([write(tmp_path / "a.jsonl", rows)], byte_tokenizer())
    assert 400 < found.longest_tokens < 420


@pytest.mark.parametrize("bad", [1, 2, 7, 150])
def test_all_rows_that_cannot_be_used_are_told_together(tmp_path, bad):
    """Nobody wants to repair hundreds of rows one run at a time."""
    faults = ['{"text": ""}', '{"texts": "a"}', "{", "[1]"]
    lines = ['{"text": "a good one"}', *(faults[i % 4] for i in range(bad)), '{"text": "another"}']
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        list(read_documents([path]))
    said = str(caught.value)
    if bad == 1:
        assert said == f"{path}, row 2: field 'text' is empty"
        return
    counted = {2: "2", 7: "7", 150: "at least 100"}[bad]
    assert said.startswith(
        f"{path}: {counted} rows cannot be used\n  row 2: field 'text' is empty\n  row 3: has no field"
    )
    assert said.count("\n") == min(bad, 6)
    assert said.endswith({2: "data.text_field names it", 7: "and 2 more", 150: "and 95 more"}[bad])
