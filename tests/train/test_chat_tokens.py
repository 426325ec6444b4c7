"""Conversations have the tokens of the chat template itself, with tools, weights and tokenizers that add a space."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from lemo.config import DataConfig
from lemo.errors import DataError
from lemo.train.chat import fit_messages, render_chat
from lemo.train.data import load_windows
from tests.train.test_chat import PLAIN, TAGGED, TALK, learned_texts, tokenizer

BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"city": "string"}}}]
WITH_TOOLS = "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}" + PLAIN


def prepending_tokenizer(template=BRACKETS):
    """A tokenizer that puts a space before every text, as that of Llama 2 does."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    merges = []
    for character in string.printable + "▁":
        vocabulary.setdefault(character, len(vocabulary))
    for word in ("▁It", "▁is", "▁fine.", "▁hi", "▁there", "▁▁"):
        for cut in range(1, len(word)):
            if (word[:cut], word[cut]) not in merges:
                merges.append((word[:cut], word[cut]))
            vocabulary.setdefault(word[: cut + 1], len(vocabulary))
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = template
    return fast


def talk_of(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def template_tokens(made, talk, **options):
    return list(made.apply_chat_template(talk, tokenize=True, return_dict=True, **options)["input_ids"])


def test_a_tokenizer_that_prepends_a_space_adds_none_before_answers():
    made = prepending_tokenizer()
    talk = talk_of("hi there", "It is fine.", "is it", "It is fine.")
    rendered = render_chat(made, talk, "p")
    assert rendered.tokens == template_tokens(made, talk)
    learned = [t for t, flag in zip(rendered.tokens, rendered.learned, strict=True) if flag]
    assert made.convert_ids_to_tokens(learned) == ["▁It", "▁is", "▁fine.", "▁", "</s>"] * 2
    assert rendered.ends_turns


word = st.text(st.sampled_from("It is fine.hi\n-"), min_size=1, max_size=12).filter(str.strip)


@given(st.lists(st.tuples(word, word), min_size=1, max_size=3), st.booleans())
def test_tokens_are_those_of_the_template(turns, prepends):
    made = prepending_tokenizer() if prepends else tokenizer()
    talk = talk_of(*(text for turn in turns for text in turn))
    rendered = render_chat(made, talk, "p")
    assert rendered.tokens == template_tokens(made, talk)
    for text, (_, answer) in zip(learned_texts(made, rendered), turns, strict=True):
        assert text.strip().startswith(answer.strip())


def test_without_offsets_tokens_are_compared_with_the_templates(monkeypatch):
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    rendered = render_chat(tokenizer(), TALK, "p")
    assert rendered.tokens == template_tokens(tokenizer(), TALK)
    assert learned_texts(tokenizer(), rendered) == ["Jupiter.<end>", "Jupiter. Again <|user|> é<end>"]
    with pytest.raises(DataError, match=r"row 3: the tokenizer, which is no fast one, .* other tokens"):
        render_chat(prepending_tokenizer(), talk_of("hi", "It is fine."), "f, row 3")


def load(tmp_path, rows, made, **settings):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_windows(
        DataConfig(train=(str(path),), **{"window_tokens": 512, "answer_only": True, **settings}), made
    )[0]


@pytest.mark.parametrize("written", [TOOLS, json.dumps(TOOLS)], ids=["list", "JSON"])
def test_tools_reach_the_template(tmp_path, written):
    made = tokenizer(WITH_TOOLS)
    dataset = load(tmp_path, [{"messages": TALK, "tools": written}, {"messages": TALK, "tools": []}], made)
    assert dataset[0]["input_ids"].tolist() == template_tokens(made, TALK, tools=TOOLS)
    assert "get_weather" in made.decode(dataset[0]["input_ids"])
    assert dataset[1]["input_ids"].tolist() == template_tokens(made, TALK)


def test_tools_stay_when_a_conversation_is_shortened():
    made = tokenizer(WITH_TOOLS)
    whole = len(render_chat(made, TALK, "p", TOOLS).tokens)
    kept, rendered = fit_messages(made, TALK, "p", whole - 1, TOOLS)
    assert list(kept) == TALK[:3] and rendered.tokens == template_tokens(made, TALK[:3], tools=TOOLS)


def test_tools_that_nobody_would_see_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"chat\.jsonl, row 1: has tools, and the model's chat template does not"):
        load(tmp_path, [{"messages": TALK, "tools": TOOLS}], tokenizer())
    for wrong, text in (("{", "is no valid JSON"), (["get_weather"], "must be a list of descriptions")):
        with pytest.raises(DataError, match=rf"row 1: field 'tools' {text}"):
            load(tmp_path, [{"messages": TALK, "tools": wrong}], tokenizer(WITH_TOOLS))


@pytest.mark.parametrize("template", [PLAIN, TAGGED], ids=["prefixes", "tags"])
def test_an_answer_of_weight_0_is_read_and_not_learned(template):
    made = tokenizer(template)
    talk = [dict(message) for message in TALK]
    talk[2]["weight"], talk[4]["weight"] = 0, 1.0
    rendered = render_chat(made, talk, "p")
    assert rendered.tokens == render_chat(made, TALK, "p").tokens
    assert learned_texts(made, rendered) == ["Jupiter. Again <|user|> é<end>"]
    with pytest.raises(DataError, match="the first exchange does not fit"):  # never cut to an answer of no weight
        fit_messages(made, talk, "p", 60)
    talk[4]["weight"] = 0
    with pytest.raises(DataError, match="no assistant message whose weight is not 0"):
        render_chat(made, talk, "p")


def test_other_weights_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"row 1: message 2 of 'messages' has weight 0\.5"):
        load(tmp_path, [{"messages": [TALK[1], {**TALK[2], "weight": 0.5}]}], tokenizer())
