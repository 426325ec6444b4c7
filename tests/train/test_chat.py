"""Conversations: what is learned is the assistant's text and nothing else, whatever the template looks like."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemo.config import DataConfig
from lemo.errors import DataError
from lemo.train.chat import fit_messages, render_chat
from lemo.train.data import load_windows, read_documents
from tests.train.tiny import byte_tokenizer

PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TAGGED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>"
    "{% endgeneration %}{% else %}{{ m.content }}<end>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Forgets what the assistant thought in earlier turns, as some reasoning models' templates do.
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' and not loop.last %}{{ m.content[:2] }}"
    "{% else %}{{ m.content }}{% endif %}<end>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Which is the largest?"},
    {"role": "assistant", "content": "Jupiter."},
    {"role": "user", "content": "Repeat: Jupiter."},
    {"role": "assistant", "content": "Jupiter. Again <|user|> é"},
]
content = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=20).filter(
    lambda text: text.strip() == text and "<end>" not in text
)


def tokenizer(template=PLAIN):
    made = byte_tokenizer()
    made.chat_template = template
    return made


def learned_texts(made, conversation):
    """Decoded runs of learned tokens."""
    runs, before = [], False
    for token, flag in zip(conversation.tokens, conversation.learned, strict=True):
        if flag and not before:
            runs.append([])
        if flag:
            runs[-1].append(token)
        before = flag
    return [made.decode(run) for run in runs]


@pytest.mark.parametrize("template", [PLAIN, TAGGED], ids=["prefixes", "tags"])
def test_exactly_the_assistants_words_are_learned(template):
    made = tokenizer(template)
    rendered = render_chat(made, TALK, "f, row 1")
    assert learned_texts(made, rendered) == ["Jupiter.<end>", "Jupiter. Again <|user|> é<end>"]
    assert made.decode(rendered.tokens) == made.apply_chat_template(TALK, tokenize=False)
    assert rendered.ends_turns


@given(st.lists(st.tuples(content, content), min_size=1, max_size=3))
def test_both_ways_agree_on_any_text(turns):
    talk = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    plain, tagged = tokenizer(PLAIN), tokenizer(TAGGED)
    first, second = render_chat(plain, talk, "p"), render_chat(tagged, talk, "p")
    assert (first.tokens, first.learned) == (second.tokens, second.learned)
    assert learned_texts(plain, first) == [answer + "<end>" for _, answer in turns]


def test_what_cannot_be_told_apart_is_refused():
    talk = TALK[1:]
    with pytest.raises(DataError, match=r"row 7: the chat template writes message 2 differently"):
        render_chat(tokenizer(FORGETFUL), talk, "f, row 7")
    wrong = TAGGED.replace("{% generation %}{{ m.content }}", "{{ m.content }}{% generation %}")
    with pytest.raises(DataError, match=r"row 7: the tokens that would be learned as answer 1 read '<end>'"):
        render_chat(tokenizer(wrong), talk, "f, row 7")
    shouting = PLAIN.replace("{{ m.content }}", "{{ m.content | upper }}")
    with pytest.raises(DataError, match=r"answer 1 read 'JUPITER.<end>', not 'Jupiter.'"):
        render_chat(tokenizer(shouting), talk, "p")
    with pytest.raises(DataError, match="no chat template"):
        render_chat(byte_tokenizer(), talk, "p")
    with pytest.raises(DataError, match="no assistant message"):
        render_chat(tokenizer(), talk[:1], "p")
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"refuses the conversation .*roles must alternate"):
        render_chat(tokenizer(strict), talk, "p")


def test_a_template_without_an_end_of_turn_is_said():
    made = tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                     "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    rendered = render_chat(made, TALK[1:], "p")
    assert learned_texts(made, rendered) == ["Jupiter.", "Jupiter. Again <|user|> é"] and not rendered.ends_turns


def test_truncation_leaves_out_later_exchanges_first():
    made = tokenizer()
    whole = render_chat(made, TALK, "p")
    kept, rendered = fit_messages(made, TALK, "p", len(whole.tokens) - 1)
    assert list(kept) == TALK[:3] and learned_texts(made, rendered) == ["Jupiter.<end>"]
    least = len(rendered.tokens) - 5
    kept, rendered = fit_messages(made, TALK, "p", least)
    assert len(rendered.tokens) <= least and kept[1]["content"] == "Which is the lar"
    assert learned_texts(made, rendered) == ["Jupiter.<end>"]
    with pytest.raises(DataError, match="the first exchange does not fit 40 tokens"):
        fit_messages(made, TALK, "p", 40)


def load(tmp_path, rows, **settings):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=(str(path),), **{"window_tokens": 256, "answer_only": True, **settings})
    return load_windows(config, tokenizer())


def test_rows_become_windows_with_labels(tmp_path):
    dataset, report = load(tmp_path, [{"messages": TALK}, {"messages": TALK[1:3]}], packing=True)
    assert len(dataset) == 1 and report.packed_windows == 1
    sample = dataset[0]
    learned = sample["input_ids"][sample["labels"] != -100]
    assert tokenizer().decode(learned) == "Jupiter.<end>Jupiter. Again <|user|> é<end>Jupiter.<end>"


def test_long_conversations_go_by_the_rule_that_was_asked_for(tmp_path):
    rows = [{"messages": TALK}, {"messages": TALK[1:3]}]
    size = len(render_chat(tokenizer(), TALK, "p").tokens)
    with pytest.raises(DataError, match=rf"chat\.jsonl, row 1: the sample has {size} tokens, the window 80"):
        load(tmp_path, rows, window_tokens=80)
    dataset, report = load(tmp_path, rows, window_tokens=80, long_rows="drop")
    assert len(dataset) == report.dropped == 1 and report.lost_tokens == {"in dropped samples": size}
    dataset, report = load(tmp_path, rows, window_tokens=80, long_rows="truncate")
    assert len(dataset) == 2 and report.truncated == 1
    assert report.tokens == report.kept_tokens + sum(report.lost_tokens.values())


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"messages": []}, "must be a list of messages"),
        ({"messages": [{"content": "x"}]}, "message 1 of 'messages' has no role"),
        ({"messages": [{"role": "user", "content": None}]}, r"message 1 of 'messages' \(user\) has no text"),
        ({"messages": [*TALK[1:2], {"role": "assistant", "content": " "}]}, r"message 2 .* \(assistant\) has no text"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "calls tools"),
        ({"talk": TALK}, "has no field 'text'"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, text):
    with pytest.raises(DataError, match=rf"chat\.jsonl, row 2: .*{text}"):
        load(tmp_path, [{"messages": TALK}, row])


def test_another_field_and_a_forgotten_option(tmp_path):
    dataset, _ = load(tmp_path, [{"talk": TALK}], messages_field="talk")
    assert len(dataset) == 1
    with pytest.raises(DataError, match=r"row 1: is a conversation: set data\.answer_only=true"):
        load(tmp_path, [{"messages": TALK}], answer_only=False)


def test_content_may_be_in_parts_of_text(tmp_path):
    def read(content):
        row = {"messages": [TALK[1], {"role": "assistant", "content": content}]}
        (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
        return next(iter(read_documents([tmp_path / "p.jsonl"]))).messages[1]["content"]

    part = {"type": "text", "text": "Jupiter."}
    assert read([part]) == "Jupiter." == read("Jupiter.")
    assert read([part, {**part, "text": "It is."}]) == "Jupiter.\nIt is."
    for wrong, said in (
        ([part, {"type": "image_url", "image_url": {"url": "x"}}], r"\(assistant\) has a part of type 'image_url' in"),
        (["Jupiter."], "part of type 'str'"),
        ([], "has no text in 'content'"),
        ([{"type": "text"}], "has no text in 'content'"),
        ([{**part, "text": " "}], "has no text in 'content'"),
    ):
        with pytest.raises(DataError, match=said):
            read(wrong)
