"""Rows as other tools write them: ShareGPT's conversations, and Alpaca's instructions with their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lemo.errors import DataError

CONVERSATIONS = "conversations"
INSTRUCTION, INPUT, OUTPUT = "instruction", "input", "output"
SYSTEM = "system"  # a row's own system prompt
_FROM, _VALUE = "from", "value"
# Who speaks in ShareGPT's rows, and the role that chat templates know.
ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "tool_response", "function_response"), "tool"),
}
_CALLS = ("function_call", "tool_call")
# What Alpaca's rows may have besides in other tools, and is not read.
_UNREAD = ("history",)


def has_speakers(messages: Any) -> bool:
    """Whether messages say who speaks as ShareGPT's do, with `from` instead of `role`."""
    return isinstance(messages, list) and any(
        isinstance(message, dict) and message.get(_FROM) is not None and message.get("role") is None
        for message in messages
    )


def read_speakers(messages: Sequence[Any], system: Any, field: str, place: str) -> list[dict[str, Any]]:
    """Messages with `role` and `content` from those with `from` and `value`; what else they hold stays.

    Args:
        messages: of a row.
        system: the row's own system prompt, which becomes the first message; None or empty text for none.
        field: key of the messages.
        place: file and row, for messages to the user.

    Raises:
        DataError: a message says not who speaks, or names nobody known, calls a tool, or has no text; or there are two
            system prompts.
    """
    found = []
    for number, message in enumerate(messages, start=1):
        where = f"{place}: message {number} of {field!r}"
        speaker = message.get(_FROM) if isinstance(message, dict) else None
        if speaker is None:
            raise DataError(f"{where} has no {_FROM!r}, and others have")
        if speaker in _CALLS:
            raise DataError(f"{where} is from {speaker!r}: it calls tools, which is not supported")
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise DataError(f"{where} is from {speaker!r}; known are {', '.join(ROLES)}")
        text = message.get(_VALUE)
        if not isinstance(text, str) or (ROLES[speaker] == "assistant" and not text.strip()):
            raise DataError(f"{where} ({speaker}) has no text in {_VALUE!r}")
        others = {key: value for key, value in message.items() if key not in (_FROM, _VALUE, "role", "content")}
        found.append({"role": ROLES[speaker], "content": text, **others})
    prompt = _system(system, place)
    if prompt and found[0]["role"] != "system":
        return [{"role": "system", "content": prompt}, *found]
    if prompt and found[0]["content"].strip() != prompt.strip():
        raise DataError(f"{place}: has a system prompt in {SYSTEM!r} and another in {field!r}; leave one out")
    return found


def read_instruction(values: dict[str, Any], place: str) -> tuple[str, list[dict[str, Any]]]:
    """The prompt of an Alpaca row as plain text, and the row as a conversation; its answer is `output`.

    The instruction and its input, if there is one, have a blank line between them. In the plain prompt, another ends
    them, and the row's own system prompt stands ahead.

    Raises:
        DataError: a field is no text, or the row has earlier turns.
    """
    unread = [key for key in _UNREAD if values.get(key)]
    if unread:
        raise DataError(f"{place}: field {unread[0]!r} of instructions is not read; write the row as messages")
    given = values.get(INPUT)
    if given is not None and not isinstance(given, str):
        raise DataError(f"{place}: field {INPUT!r} must be text, got {type(given).__name__}")
    asked = values[INSTRUCTION] if not (given and given.strip()) else f"{values[INSTRUCTION]}\n\n{given}"
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": values[OUTPUT]}]
    prompt = _system(values.get(SYSTEM), place)
    if not prompt:
        return f"{asked}\n\n", messages
    return f"{prompt}\n\n{asked}\n\n", [{"role": "system", "content": prompt}, *messages]


def _system(prompt: Any, place: str) -> str:
    """A row's own system prompt; empty for none."""
    if prompt is not None and not isinstance(prompt, str):
        raise DataError(f"{place}: field {SYSTEM!r} must be text, got {type(prompt).__name__}")
    return prompt if prompt and prompt.strip() else ""
