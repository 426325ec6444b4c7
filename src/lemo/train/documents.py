"""Documents, and how a row becomes one: text, text with questions, a conversation, or a prompt with its answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lemo.errors import DataError
from lemo.train.foreign_rows import (
    CONVERSATIONS,
    INSTRUCTION,
    OUTPUT,
    SYSTEM,
    has_speakers,
    read_instruction,
    read_speakers,
)

PROMPT, COMPLETION, TOOLS = "prompt", "completion", "tools"


@dataclass(frozen=True)
class Turn:
    """One question with the answer that is learned (the first reference where a row has several)."""

    question: str
    answer: str


@dataclass(frozen=True)
class FieldNames:
    """Keys of rows and columns of datasets: of the text, and of a conversation."""

    text: str = "text"
    messages: str = "messages"


@dataclass(frozen=True)
class Document:
    """One document of a source, as text or as tokens.

    Attributes:
        name: file name and row, the same on every machine; part of a sample's id.
        place: path and row, for messages.
        text: the document, or None when it is pre-tokenised.
        tokens_T: uint32 tokens of a pre-tokenised document, else None.
        turns: questions and answers of a `qas` row; empty for plain text.
        messages: a conversation, each message with `role` and `content`; empty for other rows. A message of `weight` 0
            is not learned.
        tools: descriptions of the tools that a conversation may use, for the chat template.
        completion: what is learned behind `text`, which is the prompt; empty for other rows. An instruction with its
            output has `messages` besides: it is a conversation where there is a chat template.
    """

    name: str
    place: str
    text: str | None = None
    tokens_T: np.ndarray | None = None
    turns: tuple[Turn, ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    completion: str = ""

    @property
    def is_sample(self) -> bool:
        """Whether it is one sample as it stands: it has questions or a completion, or is a conversation."""
        return bool(self.turns or self.messages or self.completion)

    @property
    def form(self) -> str:
        """What a row without text of its own is, in words."""
        if self.messages:
            return "an instruction with its output" if self.completion else "a conversation"
        return "a prompt with its completion" if self.completion else "text"


def make_document(values: dict[str, Any], fields: FieldNames, *, name: str, place: str) -> Document:
    """A document from the values of a row.

    Where a row has several, a conversation comes first, that of `fields` before `conversations`; then text, `prompt`
    with `completion`, and `instruction` with `output`.

    Raises:
        DataError: the row has none of them, or one that cannot be used.
    """
    chat = _conversation_field(values, fields)
    if chat is not None:
        messages = _messages(values[chat], chat, place, system=values.get(SYSTEM))
        document = Document(name, place, messages=messages, tools=_tools(values.get(TOOLS), place))
    elif fields.text in values:
        text = _text(values, fields.text, place)
        document = Document(name, place, text=text, turns=_turns(values.get("qas"), place))
    elif PROMPT in values and COMPLETION in values:
        document = _completed(values, name, place)
    elif INSTRUCTION in values and OUTPUT in values:
        document = _instructed(values, name, place)
    else:
        known = ", ".join(sorted(map(str, values))) or "none"
        raise DataError(f"{place}: has no field {fields.text!r} (fields: {known}); data.text_field names it")
    turns = [(turn.question, turn.answer) for turn in document.turns]
    _check_characters((document.text, document.completion, turns, document.messages, document.tools), place)
    return document


def drop_nulls(value: Any) -> Any:
    """A value without keys that have none: Arrow tables give every description of a tool the keys of all others."""
    if isinstance(value, dict):
        return {key: drop_nulls(inner) for key, inner in value.items() if inner is not None}
    return [drop_nulls(inner) for inner in value] if isinstance(value, list) else value


def _text(values: dict[str, Any], field: str, place: str) -> str:
    """The text of a field."""
    text = values[field]
    if not isinstance(text, str):
        raise DataError(f"{place}: field {field!r} must be text, got {type(text).__name__}")
    if not text.strip():
        raise DataError(f"{place}: field {field!r} is empty")
    return text


def _completed(values: dict[str, Any], name: str, place: str) -> Document:
    """A prompt with its completion: two texts, or two parts of one conversation, of which the second is learned."""
    prompt, completion = values[PROMPT], values[COMPLETION]
    if isinstance(prompt, str) and isinstance(completion, str):
        if values.get(TOOLS):
            raise DataError(f"{place}: field {TOOLS!r} needs a conversation, and {PROMPT!r} is text")
        return Document(name, place, text=_text(values, PROMPT, place), completion=_text(values, COMPLETION, place))
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise DataError(
            f"{place}: fields {PROMPT!r} and {COMPLETION!r} must both be text or both lists of messages, got {kinds}"
        )
    given = tuple({**message, "weight": 0} for message in _messages(prompt, PROMPT, place))
    messages = given + _messages(completion, COMPLETION, place)
    return Document(name, place, messages=messages, tools=_tools(values.get(TOOLS), place))


def _conversation_field(values: dict[str, Any], fields: FieldNames) -> str | None:
    """The key that holds a row's conversation; None where there is none."""
    if values.get(fields.messages) is not None:
        return fields.messages
    return CONVERSATIONS if isinstance(values.get(CONVERSATIONS), list) else None


def _instructed(values: dict[str, Any], name: str, place: str) -> Document:
    """An instruction with its output: a conversation, or for models without a chat template a prompt."""
    if values.get(TOOLS):
        raise DataError(f"{place}: field {TOOLS!r} needs a conversation, and {INSTRUCTION!r} is text")
    for field in (INSTRUCTION, OUTPUT):
        _text(values, field, place)
    prompt, messages = read_instruction(values, place)
    return Document(name, place, text=prompt, completion=values[OUTPUT], messages=tuple(messages))


def _messages(messages: Any, field: str, place: str, system: Any = None) -> tuple[dict[str, Any], ...]:
    """The messages of a conversation, checked; `system` is a prompt beside those that have `from` and `value`.

    A list of calls that holds none is left out: templates ask whether there is one.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: field {field!r} must be a list of messages")
    if has_speakers(messages):
        messages = read_speakers(messages, system, field, place)
    found = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{place}: message {number} of {field!r} has no role")
        if message.get("tool_calls"):
            raise DataError(f"{place}: message {number} of {field!r} calls tools, which is not supported")
        where = f"{place}: message {number} of {field!r} ({message['role']})"
        content = _join_parts(message.get("content"), where)
        if not isinstance(content, str) or (message["role"] == "assistant" and not content.strip()):
            raise DataError(f"{where} has no text in 'content'")
        if message.get("weight") not in (None, 0, 1):
            raise DataError(
                f"{place}: message {number} of {field!r} has weight {message['weight']!r}; an answer is learned (1, or "
                "no weight) or not (0)"
            )
        found.append({k: v for k, v in message.items() if v or k != "tool_calls"} | {"content": content})
    return tuple(found)


def _join_parts(content: Any, where: str) -> Any:
    """What a message says, line by line where it is in parts, `{"type": "text", "text": ...}`."""
    if not isinstance(content, list):
        return content
    kinds = [part.get("type") if isinstance(part, dict) else type(part).__name__ for part in content]
    if other := [kind for kind in kinds if kind != "text"]:
        raise DataError(f"{where} has a part of type {other[0]!r} in 'content'; only parts of type 'text' are read")
    texts = [part.get("text") for part in content]
    return "\n".join(texts) if texts and all(isinstance(text, str) for text in texts) else None


def _tools(tools: Any, place: str) -> tuple[dict[str, Any], ...]:
    """Descriptions of tools: a list of JSON objects, or the same written as JSON."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: field {TOOLS!r} is no valid JSON ({error.msg})") from error
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{place}: field {TOOLS!r} must be a list of descriptions of tools (JSON objects)")
    return tuple(tools)


def _turns(qas: Any, place: str) -> tuple[Turn, ...]:
    """Questions and answers of a row."""
    if qas is None:
        return ()
    if not isinstance(qas, list):
        raise DataError(f"{place}: field 'qas' must be a list, got {type(qas).__name__}")
    turns = []
    for number, qa in enumerate(qas, start=1):
        question = qa.get("question") if isinstance(qa, dict) else None
        answers = qa.get("answers") if isinstance(qa, dict) else None
        answers = [answers] if isinstance(answers, str) else answers
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{place}: item {number} of 'qas' has no question")
        if not isinstance(answers, list) or not answers or not isinstance(answers[0], str) or not answers[0].strip():
            raise DataError(f"{place}: item {number} of 'qas' has no answer")
        turns.append(Turn(question.strip(), answers[0].strip()))
    return tuple(turns)


def _check_characters(values: Any, place: str) -> None:
    """Raises DataError for half of a surrogate pair, which JSON can hold and no tokenizer can read."""
    for text in _strings(values):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = f"\\u{ord(text[error.start]):04x}"
            near = text[max(0, error.start - 20) : error.start + 20].encode("ascii", "backslashreplace").decode()
            raise DataError(
                f"{place}: {code} (in {near!r}) is half of a surrogate pair, which is no character; leave it out"
            ) from error


def _strings(values: Any) -> Iterator[str]:
    """All text inside lists and objects, keys included."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict):
        for key, value in values.items():
            yield from _strings(key)
            yield from _strings(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _strings(value)
