"""Conversations as samples: the tokenizer's chat template, loss on the assistant's words only, verified per sample."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lemo.errors import DataError

Messages = Sequence[dict[str, Any]]
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation.

    Attributes:
        tokens: token ids.
        learned: whether each token is the assistant's.
        ends_turns: every answer is followed by a learned token that ends the turn.
    """

    tokens: list[int]
    learned: list[bool]
    ends_turns: bool


def render_chat(tokenizer: Any, messages: Messages, place: str) -> Conversation:
    """Tokens of a conversation; learned are the assistant's messages with what ends each turn.

    Where the template marks the assistant's words itself (`{% generation %}`), its marks count. Otherwise the template
    is applied to growing beginnings of the conversation, and what a message adds behind the generation prompt is the
    assistant's. Each such piece is tokenised by itself, as when the model generates it.

    Args:
        tokenizer: Transformers tokenizer with a chat template.
        messages: with `role` and `content`.
        place: file and row, for messages to the user.

    Raises:
        DataError: no template or assistant message, a template that refuses the conversation or rewrites earlier
            messages, or learned tokens that do not decode to exactly the assistant's text.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(f"{place}: is a conversation, and the model's tokenizer has no chat template")
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise DataError(f"{place}: the conversation has no assistant message, so there is nothing to learn")
    tagged = _GENERATION_TAG.search(tokenizer.get_chat_template()) is not None
    tokens, learned = _by_tags(tokenizer, messages, place) if tagged else _by_prefixes(tokenizer, messages, place)
    ends = _verify(tokenizer, tokens, learned, answers, place)
    return Conversation(tokens, learned, ends)


def fit_messages(tokenizer: Any, messages: Messages, place: str, most_tokens: int) -> tuple[Messages, Conversation]:
    """A conversation of at most `most_tokens`, shortened.

    Later exchanges are left out first. If the first one alone is too long, its longest message loses its end, the
    assistant's excepted.

    Raises:
        DataError: the first answer does not fit.
    """
    ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]
    learned = render_chat(tokenizer, messages, place).learned
    # Where each answer ends: answers that end behind the limit need no try.
    last = [i + 1 for i, flag in enumerate(learned) if flag and not (i + 1 < len(learned) and learned[i + 1])]
    for end, tokens in zip(reversed(ends), reversed(last), strict=True):
        if tokens <= most_tokens:
            rendered = render_chat(tokenizer, messages[:end], place)
            if len(rendered.tokens) <= most_tokens:
                return messages[:end], rendered
    rendered = render_chat(tokenizer, messages[: ends[0]], place)
    kept = [dict(message) for message in messages[: ends[0]]]
    longest = max(range(len(kept) - 1), key=lambda i: len(kept[i]["content"]), default=None)
    excess = len(rendered.tokens) - most_tokens
    while longest is not None and excess > 0:
        ids = tokenizer(kept[longest]["content"], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) <= excess:
            break
        kept[longest]["content"] = tokenizer.decode(ids[: len(ids) - excess], clean_up_tokenization_spaces=False)
        rendered = render_chat(tokenizer, kept, place)
        excess = len(rendered.tokens) - most_tokens
    if excess > 0:
        raise DataError(
            f"{place}: the first exchange does not fit {most_tokens:,} tokens even without its longest message; raise "
            "data.window_tokens"
        )
    return kept, rendered


def _by_tags(tokenizer: Any, messages: Messages, place: str) -> tuple[list[int], list[bool]]:
    """Tokens and mask where the template marks the assistant's words."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{place}: the chat template has generation tags, which need a fast tokenizer")
    made = _apply(
        tokenizer, messages, place, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, verbose=False
    )
    return list(made["input_ids"]), [bool(flag) for flag in made["assistant_masks"]]


def _by_prefixes(tokenizer: Any, messages: Messages, place: str) -> tuple[list[int], list[bool]]:
    """Tokens and mask from what each assistant message adds to the text before it."""
    whole = _apply(tokenizer, messages, place, tokenize=False)
    tokens: list[int] = []
    learned: list[bool] = []

    def add(text: str, flag: bool) -> None:
        if text:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            tokens.extend(ids)
            learned.extend([flag] * len(ids))

    at = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _apply(tokenizer, messages[:index], place, tokenize=False, add_generation_prompt=True)
        after = _apply(tokenizer, messages[: index + 1], place, tokenize=False)
        if not (len(before) >= at and after.startswith(before) and whole.startswith(after.rstrip())):
            raise DataError(
                f"{place}: the chat template writes message {index + 1} differently when others follow, so the "
                "assistant's words cannot be told apart; use a template with generation tags"
            )
        end = len(after.rstrip())
        add(whole[at : len(before)], False)
        add(whole[len(before) : end], True)
        at = end
    add(whole[at:], False)
    return tokens, learned


def _apply(tokenizer: Any, messages: Messages, place: str, **options: Any) -> Any:
    """The template's output.

    Raises:
        DataError: the template refuses the conversation.
    """
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except Exception as error:  # templates raise jinja2 errors of many kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{place}: the chat template refuses the conversation ({reason[0]})") from error


def _verify(tokenizer: Any, tokens: list[int], learned: list[bool], answers: list[str], place: str) -> bool:
    """Whether every answer has a learned end of turn.

    Raises:
        DataError: learned tokens are not exactly the assistant's text and, behind each message, what ends the turn.
    """
    runs: list[list[int]] = []
    for index, (token, flag) in enumerate(zip(tokens, learned, strict=True)):
        if flag and (index == 0 or not learned[index - 1]):
            runs.append([])
        if flag:
            runs[-1].append(token)
    if len(runs) != len(answers):
        raise DataError(f"{place}: the chat template marks {len(runs)} answers of {len(answers)}")
    ends = True
    for number, (run, answer) in enumerate(zip(runs, answers, strict=True), start=1):
        text = tokenizer.decode(run, clean_up_tokenization_spaces=False).lstrip()
        said = answer.strip()
        rest = text.removeprefix(said)
        marker = rest.strip()
        known = {token for token in (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()) if token}
        if not text.startswith(said) or not (marker == "" or marker in known or _is_template_text(tokenizer, marker)):
            raise DataError(
                f"{place}: the tokens that would be learned as answer {number} read {_shortened(text)}, not "
                f"{_shortened(said)}"
            )
        ends = ends and marker != ""
    return ends


def _is_template_text(tokenizer: Any, marker: str) -> bool:
    """Whether the chat template writes this text literally: an end of turn that is no special token."""
    return marker in tokenizer.get_chat_template()


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:40]} ... {text[-15:]}")
