"""Templates that write a date or an empty thought, and conversations that begin with the assistant."""

from __future__ import annotations

import datetime
import threading

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lemo.errors import DataError
from lemo.train.chat import chat_date, dated, fit_messages, render_chat
from tests.train.test_chat import FORGETFUL, PLAIN, TAGGED, TALK, content, learned_texts, tokenizer
from tests.train.test_chat_tokens import talk_of, template_tokens

DATED = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}\n  {% if true %}Today: {{ date_string }}{% endif %}\n{{ '\n' }}"
)
# As in Qwen3: an answer behind the last question gets an empty thought, earlier ones lose theirs.
THINKING = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{{- '<|' + m.role + '|>\n' }}{%- set said = m.content %}{%- set thought = '' %}"
    "{%- if m.role == 'assistant' %}{%- if '</think>' in said %}"
    "{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}{%- endif %}"
    "{{- said + '<end>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}OPEN{%- endif %}"
    "{%- endif %}"
)
QWEN = THINKING.replace("OPEN", "")
# Its prompt opens the thought, unless there is to be none.
OPENING = THINKING.replace("OPEN", "{%- else %}{{- '<think>\n' }}")
EMPTY = "<think>\n\n</think>\n\n"


def test_the_date_is_fixed_and_comes_back():
    made = tokenizer(DATED + PLAIN)
    now = render_chat(made, TALK, "p")
    assert now.tokens == template_tokens(made, TALK)
    seen = []
    with dated(datetime.date(2024, 7, 5)):
        assert made.decode(render_chat(made, TALK, "p").tokens).startswith("Today: 05 Jul 2024\n<|system|>")
        with dated(datetime.date(2020, 1, 1)):
            assert chat_date() == datetime.date(2020, 1, 1)
        thread = threading.Thread(target=lambda: seen.append(chat_date()))
        thread.start()
        thread.join()
        assert seen == [datetime.date(2024, 7, 5)] and template_tokens(made, TALK) == now.tokens
        kept, short = fit_messages(made, TALK, "p", 100)
        assert "05 Jul" in made.decode(short.tokens) and list(kept) == TALK[:3]
    assert chat_date() == datetime.date.today() and render_chat(made, TALK, "p") == now
    with pytest.raises(KeyError), dated(datetime.date(2020, 1, 1)):
        raise KeyError
    assert chat_date() == datetime.date.today()


@pytest.mark.parametrize("start", ["", " ", "\n", "\n\n", "x\n", "\n  {% if true %}a{% endif %}\n"])
@pytest.mark.parametrize("template", [PLAIN, TAGGED], ids=["prefixes", "tags"])
def test_a_date_changes_nothing_else(start, template):
    made = tokenizer(start + template + "{% if false %}{{ strftime_now('') }}{% endif %}")
    rendered = render_chat(made, TALK, "p")
    assert rendered.tokens == template_tokens(made, TALK)
    assert learned_texts(made, rendered) == ["Jupiter.<end>", "Jupiter. Again <|user|> é<end>"]


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%-d. %B %y", "%A, %j", "%d/%m/%Y %H:%M"])
def test_a_date_in_any_form(form):
    made = tokenizer("{% macro head(f) %}{{ strftime_now(f) }}{% endmacro %}{{ head('" + form + "') }}" + PLAIN)
    with dated(datetime.date(2023, 2, 3)):
        text = made.decode(render_chat(made, TALK, "p").tokens)
    assert text.startswith(datetime.datetime(2023, 2, 3).strftime(form) + "<|system|>")


def test_a_conversation_may_begin_with_the_assistant():
    made = tokenizer()
    rendered = render_chat(made, TALK[2:], "p")
    assert learned_texts(made, rendered) == ["Jupiter.<end>", "Jupiter. Again <|user|> é<end>"]
    assert rendered.tokens == template_tokens(made, TALK[2:])
    twice = [{"role": "assistant", "content": "assistant"}, *TALK[3:]]
    with pytest.raises(DataError, match=r"row 3: the conversation begins with the assistant, .* 2 times"):
        render_chat(made, twice, "f, row 3")
    with pytest.raises(DataError, match=r"writes message 1 differently when others follow"):
        render_chat(tokenizer(FORGETFUL), TALK[2:], "p")


def test_an_answer_of_weight_0_is_never_cut():
    made = tokenizer()
    talk = talk_of("Q" * 40, "x" * 100, "Q two", "answer")
    talk[1]["weight"] = 0
    whole = len(render_chat(made, talk, "p").tokens)
    kept, rendered = fit_messages(made, talk, "p", whole - 10)
    assert [len(message["content"]) for message in kept] == [30, 100, 5, 6] and len(rendered.tokens) == whole - 10
    with pytest.raises(DataError, match="the first exchange does not fit"):
        fit_messages(made, talk, "p", whole - 60)


@pytest.mark.parametrize("template", [QWEN, OPENING], ids=["empty prompt", "prompt opens a thought"])
@example(turns=[("0", "<"), ("0", "</th")], same=False)  # they begin as the end of a thought does
@given(turns=st.lists(st.tuples(content, content), min_size=1, max_size=3), same=st.booleans())
def test_an_empty_thought_belongs_to_the_prompt(template, turns, same):
    made = tokenizer(template)
    turns = [(answer if same else question, answer) for question, answer in turns]
    talk = talk_of(*(text for turn in turns for text in turn))
    rendered = render_chat(made, talk, "p")
    assert rendered.tokens == template_tokens(made, talk)
    assert learned_texts(made, rendered) == [f"{answer}<end>" for _, answer in turns]
    first = rendered.learned.index(True)
    ahead = made.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert made.decode(rendered.tokens[:first]) == (ahead if len(turns) == 1 else ahead.removesuffix(EMPTY))
    assert made.decode(rendered.tokens).count(EMPTY) == 1  # before the last answer


def test_an_answers_own_thought_is_learned():
    made = tokenizer(QWEN)
    for thought in ("<think>\nhm\n</think>\n\n", EMPTY):
        rendered = render_chat(made, talk_of("hi", thought + "yes"), "p")
        assert learned_texts(made, rendered) == [f"{thought}yes<end>"]
    with pytest.raises(DataError, match=r"row 2: the chat template writes message 2 differently"):
        render_chat(made, talk_of("hi", "<think>\nhm\n</think>\n\nyes", "and?", "no"), "f, row 2")


def test_other_insertions_are_refused():
    talk = talk_of("hi", "yes")
    always = "<think>\nhm\n</think>\n\n"
    wrong = QWEN.replace("'<think>\n' + thought + '\n</think>\n\n'", repr(always))
    with pytest.raises(DataError, match=r"answer 1 read '<think>.*, not 'yes'"):
        render_chat(tokenizer(wrong), talk, "p")
    odd = PLAIN.replace("prompt %}<|assistant|>", "prompt %}<|assistant|><think>")
    with pytest.raises(
        DataError, match=r"row 1: the chat template's prompt for an answer ends in '.*<think>.n', which"
    ):
        render_chat(tokenizer(odd), talk, "f, row 1")
    # The question's text must not be taken for an answer that the template rewrites.
    loud = QWEN.replace("{{- said + ", "{{- (said if loop.last or m.role == 'user' else said | upper) + ")
    with pytest.raises(DataError, match="writes message 2 differently"):
        render_chat(tokenizer(loud), talk_of("yes", "yes", "and?", "no"), "p")
