"""Cuts documents into windows of tokens, packs short pieces, builds answer-only samples, and counts what is lost."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lemo.errors import DataError
from lemo.train.chat import fit_messages, has_template, render_chat, render_completion
from lemo.train.data_report import DataReport
from lemo.train.documents import Document

_NO_END = "the chat template marks no end of turn as the assistant's, so the model does not learn when to stop"
_NO_TEMPLATE = (
    "the tokenizer has no chat template, so each instruction, with a blank line behind it, is a prompt of plain text"
)
QUESTION = "\n\nQuestion: {question}\nAnswer:"


@dataclass(frozen=True)
class Window:
    """One training sample.

    Attributes:
        sample_id: name of the sample, the same in every run and on every machine.
        tokens_T: (T,) uint32 tokens.
        learned_T: (T,) bool, tokens that carry a label; None for all.
        lengths: tokens of each document in the window, in order; more than one in a packed window.
    """

    sample_id: str
    tokens_T: np.ndarray
    learned_T: np.ndarray | None = None
    lengths: tuple[int, ...] = ()

    @property
    def supervised_rows(self) -> int:
        """Rows that predict a labelled token: the first token of a document is predicted by none."""
        starts = np.concatenate([[0], np.cumsum(self.lengths or (len(self.tokens_T),))[:-1]])
        learned_T = np.ones(len(self.tokens_T), bool) if self.learned_T is None else self.learned_T.copy()
        learned_T[starts.astype(np.int64)] = False
        return int(learned_T.sum())


@dataclass(frozen=True)
class WindowCutter:
    """Turns documents into windows.

    Plain text is cut into consecutive windows of `window_tokens`. What remains of a document is dropped and counted,
    kept as a short window, or (packing) put together with other remainders, whole pieces only. The end-of-text token
    is appended to every text document. A `qas` sample is the document followed by its questions and answers; only the
    answers and the end token behind each are learned. A conversation is written by the tokenizer's chat template; only
    the assistant's messages, and what ends each, are learned. Of a prompt with its completion, which are one text, the
    completion and the end token are. An instruction with its output is a conversation where there is a chat template,
    and else such a text.

    Attributes:
        tokenizer: Transformers tokenizer; None when every document is pre-tokenised.
        window_tokens: longest sample.
        packing: put short pieces together; documents never see each other.
        remainder: `drop` or `keep` pieces shorter than a window (ignored with packing).
        answer_only: make samples from `qas` and conversations.
        long_rows: what to do with such a sample when it is longer than the window.
        vocabulary: tokens must be below this; None checks nothing.
    """

    tokenizer: Any
    window_tokens: int
    packing: bool = False
    remainder: Literal["drop", "keep"] = "drop"
    answer_only: bool = False
    long_rows: Literal["error", "truncate", "drop"] = "error"
    vocabulary: int | None = None

    def cut(self, documents: Iterable[Document], part: str = "", advice: str = "") -> tuple[list[Window], DataReport]:
        """All windows of the documents, in order, and the account of them.

        Args:
            documents: what is cut.
            part: of the data that they are, for messages.
            advice: what else may be done where no window results, for messages.

        Raises:
            DataError: a row cannot be used, a sample is longer than the window, or no window results.
        """
        report = DataReport(self.window_tokens)
        windows: list[Window] = []
        pieces: list[Window] = []
        ignored_qas = 0
        for document in documents:
            report.documents += 1
            if self.answer_only:
                sample = self._sample(document, report)
                if sample is not None:
                    (pieces if self.packing and len(sample.tokens_T) < self.window_tokens else windows).append(sample)
                continue
            if document.messages or document.completion:
                raise DataError(f"{document.place}: is {document.form}: set data.answer_only=true")
            ignored_qas += bool(document.turns)
            self._cut_text(document, windows, pieces, report)
        if ignored_qas:
            report.notes.append(f"{ignored_qas:,} rows have qas that are not used (data.answer_only is false)")
        windows.extend(pack(pieces, self.window_tokens))
        if not windows:
            raise DataError(_no_windows(report, part, advice))
        finish(report, windows)
        return windows, report

    def _cut_text(self, document: Document, windows: list[Window], pieces: list[Window], report: DataReport) -> None:
        """Consecutive windows of a plain document; its remainder goes where the options say."""
        tokens_T = self._tokens(document)
        report.tokens += len(tokens_T)
        for number, start in enumerate(range(0, len(tokens_T), self.window_tokens)):
            part = tokens_T[start : start + self.window_tokens]
            window = Window(f"{document.name}#{number}", part, lengths=(len(part),))
            if len(part) == self.window_tokens:
                windows.append(window)
            elif len(part) < 2:
                report.lose("alone behind the last window", len(part))
            elif self.packing:
                pieces.append(window)
            elif self.remainder == "keep":
                windows.append(window)
            else:
                reason = "behind the last full window of a document" if start else "in documents shorter than a window"
                report.lose(reason, len(part))

    def _tokens(self, document: Document) -> np.ndarray:
        """Tokens of a plain document, end token included for text."""
        if document.tokens_T is not None:
            tokens_T = document.tokens_T
            if self.vocabulary is not None and int(tokens_T.max()) >= self.vocabulary:
                raise DataError(
                    f"{document.place}: token {int(tokens_T.max())} is outside the model's vocabulary of "
                    f"{self.vocabulary}; was the file made with another tokenizer?"
                )
            return tokens_T
        ids = self._encode(document.text or "", special=True)
        return np.asarray(ids + self._end_tokens(ids), dtype=np.uint32)

    def _encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text."""
        return list(self._text_tokenizer()(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _text_tokenizer(self) -> Any:
        """The tokenizer, which text needs."""
        if self.tokenizer is None:
            raise DataError("text needs a tokenizer, and the model folder has none; use pre-tokenised .npz data")
        return self.tokenizer

    def _end_tokens(self, ids: Sequence[int] = ()) -> list[int]:
        """The end-of-text token, unless the ids end with it or there is none."""
        end = getattr(self.tokenizer, "eos_token_id", None)
        return [] if end is None or (len(ids) > 0 and ids[-1] == end) else [end]

    def _sample(self, document: Document, report: DataReport) -> Window | None:
        """The answer-only sample of a row; None when it was dropped."""
        if document.messages and (has_template(self._text_tokenizer()) or not document.completion):
            return self._conversation(document, report)
        if document.completion:
            if document.messages and _NO_TEMPLATE not in report.notes:
                report.notes.append(_NO_TEMPLATE)
            return self._completion(document, report)
        if not document.turns:
            raise DataError(
                f"{document.place}: has no 'qas', messages or completion: no answer to learn (data.answer_only)"
            )
        context = self._encode(document.text or "", special=True)
        turns = [
            (
                self._encode(QUESTION.format(question=turn.question)),
                self._encode(" " + turn.answer) + self._end_tokens(),
            )
            for turn in document.turns
        ]
        total = len(context) + _size(turns)
        report.tokens += total
        if total > self.window_tokens:
            if self._leave_out(document, total, report):
                return None
            context, turns = self._shorten(document, context, turns, report)
            report.truncated += 1
            report.lose("cut from samples", total - len(context) - _size(turns))
        tokens: list[int] = list(context)
        learned: list[bool] = [False] * len(context)
        for question, answer in turns:
            tokens += question + answer
            learned += [False] * len(question) + [True] * len(answer)
        return Window(document.name, np.asarray(tokens, np.uint32), np.asarray(learned, bool), (len(tokens),))

    def _leave_out(self, document: Document, total: int, report: DataReport) -> bool:
        """Whether a sample that is too long is left out; False when it is to be shortened."""
        if self.long_rows == "error":
            raise DataError(
                f"{document.place}: the sample has {total:,} tokens, the window {self.window_tokens:,}; raise "
                "data.window_tokens, or set data.long_rows to truncate or drop"
            )
        if self.long_rows == "drop":
            report.dropped += 1
            report.lose("in dropped samples", total)
        return self.long_rows == "drop"

    def _conversation(self, document: Document, report: DataReport) -> Window | None:
        """The sample of a conversation; None when it was dropped."""
        messages, tools, place = document.messages, document.tools, document.place
        rendered = render_chat(self._text_tokenizer(), messages, place, tools)
        total = len(rendered.tokens)
        report.tokens += total
        if total > self.window_tokens:
            if self._leave_out(document, total, report):
                return None
            kept, rendered = fit_messages(self.tokenizer, messages, place, self.window_tokens, tools)
            report.truncated += 1
            report.lose("cut from samples", total - len(rendered.tokens))
            if len(kept) < len(messages):
                report.notes.append(f"{place}: {len(messages) - len(kept)} of {len(messages)} messages cut off")
        if not rendered.ends_turns and _NO_END not in report.notes:
            report.notes.append(_NO_END)
        tokens_T, learned_T = np.asarray(rendered.tokens, np.uint32), np.asarray(rendered.learned, bool)
        return Window(document.name, tokens_T, learned_T, (len(tokens_T),))

    def _completion(self, document: Document, report: DataReport) -> Window | None:
        """The sample of a prompt with its completion; None when it was dropped."""
        tokenizer, prompt = self._text_tokenizer(), document.text or ""
        ids, given = render_completion(tokenizer, prompt, document.completion, document.place)
        ids += self._end_tokens(ids)
        total = len(ids)
        report.tokens += total
        if total > self.window_tokens:
            if self._leave_out(document, total, report):
                return None
            # The prompt's beginning goes: what is asked for often stands at its end.
            first = int(ids[0] == getattr(tokenizer, "bos_token_id", None))
            excess = total - self.window_tokens
            if given - first <= excess:
                raise DataError(
                    f"{document.place}: the completion alone has {total - given:,} tokens, too many for the window of "
                    f"{self.window_tokens:,}; raise data.window_tokens"
                )
            del ids[first : first + excess]
            given -= excess
            report.truncated += 1
            report.lose("cut from samples", excess)
        learned_T = np.arange(len(ids)) >= given
        return Window(document.name, np.asarray(ids, np.uint32), learned_T, (len(ids),))

    def _shorten(self, document: Document, context: list[int], turns: list, report: DataReport) -> tuple[list, list]:
        """A sample that fits: first turns that fill at most half of the window, then the document's beginning."""
        kept: list = []
        for turn in turns:
            if _size([*kept, turn]) > self.window_tokens // 2:
                break
            kept.append(turn)
        if not kept:
            raise DataError(
                f"{document.place}: the first question and answer alone have {_size(turns[:1]):,} tokens, more than "
                f"half of the window of {self.window_tokens:,}; raise data.window_tokens"
            )
        if len(kept) < len(turns):
            report.notes.append(f"{document.place}: {len(turns) - len(kept)} of {len(turns)} questions cut off")
        return context[: self.window_tokens - _size(kept)], kept


def pack(pieces: Sequence[Window], window_tokens: int) -> list[Window]:
    """Puts pieces together, largest first, each into the fullest window that still has room.

    Every piece stays whole and is a document of its own in the packed window. Deterministic.
    """
    bins = share_windows([len(piece.tokens_T) for piece in pieces], window_tokens)
    return [_join([pieces[i] for i in members]) for members in bins]


def share_windows(lengths: Sequence[int], window_tokens: int) -> list[list[int]]:
    """Which pieces share a window as `pack` puts them together, from their lengths alone."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), ascending
    for index in order:
        size = lengths[index]
        place = bisect.bisect_left(room, (size, -1))
        if place == len(room):
            bins.append([index])
            bisect.insort(room, (window_tokens - size, len(bins) - 1))
            continue
        free, number = room.pop(place)
        bins[number].append(index)
        bisect.insort(room, (free - size, number))
    return bins


def _join(pieces: Sequence[Window]) -> Window:
    """One window of several documents."""
    if len(pieces) == 1:
        return pieces[0]
    learned_T = None
    if any(piece.learned_T is not None for piece in pieces):
        learned_T = np.concatenate(
            [np.ones(len(p.tokens_T), bool) if p.learned_T is None else p.learned_T for p in pieces]
        )
    return Window(
        "+".join(piece.sample_id for piece in pieces),
        np.concatenate([piece.tokens_T for piece in pieces]),
        learned_T,
        tuple(len(piece.tokens_T) for piece in pieces),
    )


def spread(windows: Sequence[Window], limit: int | None, report: DataReport) -> list[Window]:
    """At most `limit` windows, evenly spread over all; the others are counted as not used."""
    if limit is None or len(windows) <= limit:
        return list(windows)
    chosen = {int((i + 0.5) * len(windows) / limit) for i in range(limit)}
    kept = [window for i, window in enumerate(windows) if i in chosen]
    report.unused_windows = len(windows) - len(kept)
    report.unused_tokens = sum(len(window.tokens_T) for i, window in enumerate(windows) if i not in chosen)
    finish(report, kept)
    return kept


def finish(report: DataReport, windows: Sequence[Window]) -> None:
    """Counts the windows that remain.

    Raises:
        DataError: no row of any window carries loss.
    """
    report.windows = len(windows)
    report.kept_tokens = sum(len(window.tokens_T) for window in windows)
    report.packed_windows = sum(len(window.lengths) > 1 for window in windows)
    report.supervised_rows = sum(window.supervised_rows for window in windows)
    if report.supervised_rows == 0:
        raise DataError("no token of the data carries a label: there is nothing to learn")


def _size(turns: Sequence[tuple[list[int], list[int]]]) -> int:
    """Tokens of questions and answers."""
    return sum(len(question) + len(answer) for question, answer in turns)


def _no_windows(report: DataReport, part: str, advice: str) -> str:
    """Why nothing is left, and what to change."""
    s = "" if report.documents == 1 else "s"
    text = f"no window of {report.window_tokens:,} tokens came out of {report.documents:,} document{s}{part}"
    if report.dropped:
        return f"{text}: all samples are longer than the window and data.long_rows is drop"
    return (
        f"{text} ({report.tokens:,} tokens): {advice}shorten data.window_tokens, or set data.packing or "
        "data.remainder=keep"
    )
