"""Conversations as samples: the tokenizer's chat template, loss on the assistant's words only, verified per sample."""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lemo.errors import DataError

Messages = Sequence[dict[str, Any]]
Span = tuple[int, int]
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\b")
_DIRECTIVE = re.compile(r"%[-_0^#]?[A-Za-z]")
_date: datetime.date | None = None  # set by `dated`


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


def chat_date() -> datetime.date:
    """The date that chat templates see: that of `dated`, outside of it today's."""
    return _date or datetime.date.today()


@contextmanager
def dated(date: datetime.date) -> Iterator[None]:
    """Within, chat templates that write the date write this one, so that samples are the same on another day.

    It holds for the whole process, threads included. Afterwards the date is what it was before.
    """
    global _date
    before, _date = _date, date
    try:
        yield
    finally:
        _date = before


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    return getattr(tokenizer, "chat_template", None) is not None


def render_chat(tokenizer: Any, messages: Messages, place: str, tools: Sequence[dict[str, Any]] = ()) -> Conversation:
    """Tokens of a conversation; learned are the assistant's messages with what ends each turn.

    The tokens are those of `apply_chat_template` on the day `chat_date()`, at midnight. Where the template marks the
    assistant's words itself (`{% generation %}`), its marks count. Otherwise the template is applied to growing
    beginnings of the conversation, and what a message adds behind the generation prompt is the assistant's. An empty
    thought that the template writes before an answer is part of the prompt, if it ends the prompt for a model that is
    not to think (`enable_thinking=False`).

    Args:
        tokenizer: Transformers tokenizer with a chat template.
        messages: with `role` and `content`; an answer of `weight` 0 is not learned.
        place: file and row, for messages to the user.
        tools: descriptions of tools, for the template.

    Raises:
        DataError: no template or assistant message, a template that refuses the conversation, leaves tools out or
            rewrites earlier messages, or learned tokens that do not decode to exactly the assistant's text.
    """
    if not has_template(tokenizer):
        raise DataError(f"{place}: is a conversation, and the model's tokenizer has no chat template")
    if not any(map(_is_learned, messages)):
        zero = any(message["role"] == "assistant" for message in messages)
        which = "no assistant message whose weight is not 0" if zero else "no assistant message"
        raise DataError(f"{place}: the conversation has {which}, so there is nothing to learn")
    template = _Template(tokenizer, place, list(tools) or None)
    if tools:
        template.check_tools(messages)
    tagged = _GENERATION_TAG.search(template.source) is not None
    tokens, learned = _by_tags(template, messages) if tagged else _by_prefixes(template, messages)
    return _verify(template, tokens, learned, messages)


def fit_messages(
    tokenizer: Any, messages: Messages, place: str, most_tokens: int, tools: Sequence[dict[str, Any]] = ()
) -> tuple[Messages, Conversation]:
    """A conversation of at most `most_tokens`, shortened.

    Later exchanges are left out first. If the first one alone is too long, its longest message loses its end, those
    of the assistant excepted, of whatever weight.

    Raises:
        DataError: the first answer does not fit.
    """
    ends = [i + 1 for i, message in enumerate(messages) if _is_learned(message)]
    learned = render_chat(tokenizer, messages, place, tools).learned
    # Where each answer ends: answers that end behind the limit need no try.
    last = [i + 1 for i, flag in enumerate(learned) if flag and not (i + 1 < len(learned) and learned[i + 1])]
    for end, tokens in zip(reversed(ends), reversed(last), strict=True):
        if tokens <= most_tokens:
            rendered = render_chat(tokenizer, messages[:end], place, tools)
            if len(rendered.tokens) <= most_tokens:
                return messages[:end], rendered
    rendered = render_chat(tokenizer, messages[: ends[0]], place, tools)
    kept = [dict(message) for message in messages[: ends[0]]]
    others = [i for i, message in enumerate(kept) if message["role"] != "assistant"]
    longest = max(others, key=lambda i: len(kept[i]["content"]), default=None)
    excess = len(rendered.tokens) - most_tokens
    while longest is not None and excess > 0:
        ids = tokenizer(kept[longest]["content"], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) <= excess:
            break
        kept[longest]["content"] = tokenizer.decode(ids[: len(ids) - excess], clean_up_tokenization_spaces=False)
        rendered = render_chat(tokenizer, kept, place, tools)
        excess = len(rendered.tokens) - most_tokens
    if excess > 0:
        raise DataError(
            f"{place}: the first exchange does not fit {most_tokens:,} tokens even without its longest message that is "
            "no answer; raise data.window_tokens"
        )
    return kept, rendered


def render_completion(tokenizer: Any, prompt: str, completion: str, place: str) -> tuple[list[int], int]:
    """Tokens of a prompt with its completion as one text, special tokens included, and how many are the prompt's.

    Raises:
        DataError: a token holds the end of the prompt and the beginning of the completion.
    """
    text = prompt + completion
    if not getattr(tokenizer, "is_fast", False):
        before, whole = (list(tokenizer(part, verbose=False)["input_ids"]) for part in (prompt, text))
        learned = [False] * len(before) + [True] * (len(whole) - len(before))
        shared = whole[: len(before)] != before
    else:
        whole, spans = token_spans(tokenizer, text, special=True)
        learned = mark_answers(text, spans, [(len(prompt), len(text))])
        shared = any(
            flag and start < len(prompt) and prompt[start:].strip()
            for flag, (start, _) in zip(learned, spans, strict=True)
        )
    if shared or not any(learned):
        raise DataError(
            f"{place}: the prompt's end {_shortened(prompt[-20:])} and the completion's beginning "
            f"{_shortened(completion[:20])} share a token; begin the completion with a space or a line break"
        )
    return whole, learned.index(True)


def token_spans(tokenizer: Any, text: str, *, special: bool = False) -> tuple[list[int], list[Span]]:
    """Token ids of a text, and the characters that each stands for; fast tokenizers only."""
    made = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    return list(made["input_ids"]), [(int(start), int(end)) for start, end in made["offset_mapping"]]


def mark_answers(text: str, spans: Sequence[Span], answers: Sequence[Span]) -> list[bool]:
    """Whether each token is an answer's.

    A token that begins before an answer is the answer's if it holds more of it than space: " It" is, where the space
    belongs to the template, but an end of turn that swallows the space behind it is not.
    """
    start_T, stop_T = np.asarray(spans, dtype=np.int64).reshape(-1, 2).T
    learned_T = np.zeros(len(spans), bool)
    for begin, end in answers:
        word = end - len(text[begin:end].lstrip())
        learned_T |= (start_T < end) & (stop_T > np.where(start_T >= begin, begin, word))
    return learned_T.tolist()


@dataclass(frozen=True)
class _Template:
    """The chat template of a tokenizer, for one conversation.

    Attributes:
        tokenizer: whose it is.
        place: of the conversation, for messages to the user.
        tools: given to the template.
        date: given to templates that ask for it.
    """

    tokenizer: Any
    place: str
    tools: list[dict[str, Any]] | None = None
    date: datetime.date = field(default_factory=chat_date)

    @property
    def source(self) -> str:
        """The template's own text."""
        return self.tokenizer.get_chat_template(tools=self.tools)

    @property
    def is_fast(self) -> bool:
        """Whether tokens know the characters that they stand for."""
        return bool(getattr(self.tokenizer, "is_fast", False))

    def apply(self, messages: Messages, **options: Any) -> Any:
        """The template's output.

        Raises:
            DataError: the template refuses the conversation.
        """
        if "strftime_now" in self.source:
            options["chat_template"] = _date_macro(self.source, self.date) + self.source
        try:
            return self.tokenizer.apply_chat_template(list(messages), tools=self.tools, **options)
        except Exception as error:  # templates raise jinja2 errors of many kinds
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(f"{self.place}: the chat template refuses the conversation ({reason[0]})") from error

    def ends_turn(self, text: str) -> bool:
        """Whether a text, if any, ends turns: a special token, or what the template writes literally."""
        return text in self.source or text in (*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab())

    def check_tools(self, messages: Messages) -> None:
        """Raises DataError when the template does not write the tools into the conversation."""
        if self.apply(messages, tokenize=False) == replace(self, tools=None).apply(messages, tokenize=False):
            raise DataError(
                f"{self.place}: has tools, and the model's chat template does not write them; take the field out, or "
                "describe the tools in a system message"
            )


def _is_learned(message: dict[str, Any]) -> bool:
    """Whether a message is an answer that is learned."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _by_tags(template: _Template, messages: Messages) -> tuple[list[int], list[bool]]:
    """Tokens and mask where the template marks the assistant's words."""
    if not template.is_fast:
        raise DataError(f"{template.place}: the chat template has generation tags, which need a fast tokenizer")
    made = template.apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, verbose=False)
    return list(made["input_ids"]), [bool(flag) for flag in made["assistant_masks"]]


def _by_prefixes(template: _Template, messages: Messages) -> tuple[list[int], list[bool]]:
    """Tokens and mask from what each assistant message adds to the text before it."""
    whole = template.apply(messages, tokenize=False)
    answers: list[Span] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            least = answers[-1][1] if answers else 0
            first = index == 0
            answers.append(
                _first_span(template, messages, whole) if first else _span(template, messages, index, whole, least)
            )
    if not template.is_fast:
        return _by_pieces(template, whole, answers)
    tokens, spans = token_spans(template.tokenizer, whole)
    return tokens, mark_answers(whole, spans, answers)


def _first_span(template: _Template, messages: Messages, whole: str) -> Span:
    """Where in `whole` the answer is that begins the conversation: nothing stands ahead of it to apply a template to.

    Raises:
        DataError: its text is not there exactly once when it is alone, or it is written differently when others follow.
    """
    alone = template.apply(messages[:1], tokenize=False).rstrip()
    content = messages[0]["content"]
    said = content if content in alone else content.strip()
    if alone.count(said) != 1:
        raise DataError(
            f"{template.place}: the conversation begins with the assistant, and the chat template writes the text of "
            f"that message {alone.count(said)} times, so it cannot be found; begin with a user's or system message"
        )
    if not whole.startswith(alone):
        raise _rewritten(template, 0)
    return alone.index(said), len(alone)


def _span(template: _Template, messages: Messages, index: int, whole: str, least: int) -> Span:
    """Where in `whole` the answer of message `index` is, with what ends its turn; it begins at `least` or later.

    Raises:
        DataError: the template writes the message differently when others follow, or not behind its own prompt.
    """
    said = messages[index]["content"].strip()
    before = template.apply(messages[:index], tokenize=False, add_generation_prompt=True)
    after = template.apply(messages[: index + 1], tokenize=False).rstrip()
    rest = after.removeprefix(before).lstrip()
    if not rest.startswith(said) or not template.ends_turn(rest.removeprefix(said).strip()):
        # A reasoning model's template writes an empty thought here, as it prompts a model that is not to think.
        quiet = template.apply(messages[:index], tokenize=False, add_generation_prompt=True, enable_thinking=False)
        if after.startswith(quiet) and after.removeprefix(quiet).lstrip().startswith(said):
            start = template.apply(messages[:index], tokenize=False)
            least = max(least, len(start.rstrip()) if quiet.startswith(start.rstrip()) else len(quiet))
            found = _find_answer(whole, quiet, after[len(quiet) :], least)
            if found is None:
                raise _rewritten(template, index)
            return found
    if not after.startswith(before):
        raise DataError(
            f"{template.place}: the chat template's prompt for an answer ends in {_shortened(before[-40:])}, which it "
            f"does not write ahead of message {index + 1}; data with this template is supported only with generation "
            "tags"
        )
    if not (len(before) >= least and whole.startswith(after)):
        raise _rewritten(template, index)
    return len(before), len(after)


def _find_answer(whole: str, prompt: str, answer: str, least: int) -> Span | None:
    """Where `answer` is in `whole` behind `prompt`, or behind a beginning of it of at least `least` characters.

    Templates leave the empty thought at the prompt's end out of earlier turns. None when it is in neither place.
    """
    for start in range(len(prompt), least - 1, -1):
        if whole.startswith(answer, start) and whole.startswith(prompt[:start]):
            return start, start + len(answer)
    return None


def _rewritten(template: _Template, index: int) -> DataError:
    """The error for a message that cannot be found again."""
    return DataError(
        f"{template.place}: the chat template writes message {index + 1} differently when others follow, so the "
        "assistant's words cannot be told apart; use a template with generation tags"
    )


def _date_macro(source: str, date: datetime.date) -> str:
    """A first line for a template that defines `strftime_now` with this date, and writes nothing.

    Transformers' own function, which it hides, tells today's time. The template's rest stays as it is: the line break
    belongs to the tag ahead of it.
    """
    day = datetime.datetime.combine(date, datetime.time())
    parts = sorted(set(_DIRECTIVE.findall(source)))
    replaced = "".join(f" | replace({part!r}, {day.strftime(part)!r})" for part in parts)
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n"


def _by_pieces(template: _Template, whole: str, answers: Sequence[Span]) -> tuple[list[int], list[bool]]:
    """Tokens and mask where tokens do not know their characters: answers and what is between them, each by itself.

    Raises:
        DataError: this gives other tokens than the whole.
    """
    tokens: list[int] = []
    learned: list[bool] = []
    edges = [0, *(edge for span in answers for edge in span), len(whole)]
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        if start < end:
            ids = template.tokenizer(whole[start:end], add_special_tokens=False, verbose=False)["input_ids"]
            tokens.extend(ids)
            learned.extend([number % 2 == 1] * len(ids))
    if tokens != list(template.tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]):
        raise DataError(
            f"{template.place}: the tokenizer, which is no fast one, writes answers by themselves in other tokens than "
            "in the conversation; use the model's fast tokenizer (tokenizer.json)"
        )
    return tokens, learned


def _verify(template: _Template, tokens: list[int], learned: list[bool], messages: Messages) -> Conversation:
    """The conversation, answers of weight 0 no longer learned.

    Raises:
        DataError: learned tokens are not exactly the assistant's text and, behind each message, what ends the turn.
    """
    tokenizer, place = template.tokenizer, template.place
    answers = [message for message in messages if message["role"] == "assistant"]
    runs = [list(run) for flag, run in itertools.groupby(range(len(tokens)), key=learned.__getitem__) if flag]
    if len(runs) != len(answers):
        raise DataError(f"{place}: the chat template marks {len(runs)} answers of {len(answers)}")
    kept, ends = list(learned), True
    for number, (run, answer) in enumerate(zip(runs, answers, strict=True), start=1):
        text = tokenizer.decode([tokens[i] for i in run], clean_up_tokenization_spaces=False).lstrip()
        said = answer["content"].strip()
        marker = text.removeprefix(said).strip()
        if not text.startswith(said) or not template.ends_turn(marker):
            raise DataError(
                f"{place}: the tokens that would be learned as answer {number} read {_shortened(text)}, not "
                f"{_shortened(said)}"
            )
        if _is_learned(answer):
            ends = ends and marker != ""
        else:
            kept[run[0] : run[-1] + 1] = [False] * len(run)
    return Conversation(tokens, kept, ends)


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:40]} ... {text[-15:]}")
