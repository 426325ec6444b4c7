"""Holds documents out of training data for validation where no files are named for it, and compares those that are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

from lemo.errors import DataError
from lemo.train.documents import Document


def split_documents(
    documents: Iterable[Document],
    share: float,
    split: Literal["train", "validation"],
    *,
    notes: list[str] | None = None,
) -> Iterator[Document]:
    """The documents of one split; both together are all of them, and no text stands in both.

    With at least 1/share documents, that share of them is held out, evenly spread: of 0.1 every tenth. With fewer, the
    end of each is, unless a document is a sample of its own (questions, conversations), which stays whole: then the
    last one is. Documents of the same text count as one and stay together. Where all rows are about one text, the rows
    are held out instead, and a note says so.

    Args:
        documents: all of them.
        share: of validation.
        split: which part is wanted.
        notes: receives how many documents repeat another's text.

    Raises:
        DataError: there is a single sample, so that none can be held out.
    """
    found = list(documents)
    every = max(2, round(1 / share))
    whole = any(document.is_sample for document in found)
    groups = _number(found, _text)
    count = max(groups, default=-1) + 1
    copies = "copies stand in the same split"
    if whole and count < 2 <= len(found):
        groups = _number(found, _content)
        count, copies = max(groups) + 1, "all rows are about one text, so validation has that text as well"
    if whole and count < 2:
        what = "the data has one sample" if len(found) < 2 else f"all {len(found):,} samples of the data are the same"
        raise DataError(
            f"{found[0].place}: {what}, so none can be held out (data.held_out_share); name other data in "
            "data.validation, or set data.held_out_share=0"
        )
    repeated = len(found) - len({_text(document) for document in found})
    if repeated and notes is not None:
        notes.append(f"{repeated:,} of {len(found):,} documents repeat the text of another: {copies}")
    if count < every and not whole:
        return (_part(document, share, split) for document in found)
    chosen = {count - 1} if count < every else _choose(count, share)
    return (d for d, group in zip(found, groups, strict=True) if (group in chosen) == (split == "validation"))


def note_shared(documents: Iterable[Document], validation: Iterable[Document], notes: list[str]) -> Iterator[Document]:
    """The training documents as they are; behind the last, a note says how many of validation have a text of theirs.

    Args:
        documents: of training.
        validation: of the files that are named for it.
        notes: receives the note.
    """
    held = [_text(document) for document in validation]
    wanted, shared = set(held), set()
    for document in documents:
        shared |= wanted & {_text(document)}
        yield document
    if count := sum(text in shared for text in held):
        notes.append(
            f"data.validation has text of data.train, in {count:,} of {len(held):,} documents: their loss does not "
            "show what is learned beyond the training data"
        )


def _choose(count: int, share: float) -> set[int]:
    """The groups held out of `count`, at least two: evenly spread, at least one, and never all."""
    exact = Fraction(share).limit_denominator(1_000_000)  # 29 of 100 for 0.29, which is a little less
    ahead = (round(1 / share) - 1) // 2  # the first stands in the middle of its stretch
    chosen = {i for i in range(count) if int((i + 1 + ahead) * exact) > int((i + ahead) * exact)}
    chosen = chosen or {count - 1}
    return chosen if len(chosen) < count else chosen - {0}


def _number(documents: Sequence[Document], key: Callable[[Document], bytes]) -> list[int]:
    """The number of each document's group, in order of their first members; those with one key are a group."""
    numbers: dict[bytes, int] = {}
    return [numbers.setdefault(key(document), len(numbers)) for document in documents]


def _text(document: Document) -> bytes:
    """A hash of a document's text or tokens, or of what a conversation says."""
    if document.tokens_T is not None:
        return hashlib.blake2b(document.tokens_T.tobytes()).digest()
    if document.messages:
        return _hash([(message["role"], message["content"].strip()) for message in document.messages])
    return _hash((document.text or "").strip())


def _content(document: Document) -> bytes:
    """A hash of all that a sample consists of."""
    return _text(document) + _hash((document.turns, document.completion))


def _hash(value: Any) -> bytes:
    return hashlib.blake2b(repr(value).encode()).digest()


def _part(document: Document, share: float, split: str) -> Document:
    """A document without its end, or the end."""
    held = split == "validation"
    if document.tokens_T is not None:
        cut = _checked(document, len(document.tokens_T), round(len(document.tokens_T) * (1 - share)))
        return replace(document, tokens_T=document.tokens_T[cut:] if held else document.tokens_T[:cut])
    text = document.text or ""
    cut = round(len(text) * (1 - share))
    # At the end of a line or, failing that, of a word: half a word would be a token that neither part has.
    edges = [text.rfind(edge, len(text) // 4, cut) + 1 for edge in ("\n", " ")]
    cut = _checked(document, len(text), edges[0] if edges[0] > cut - len(text) // 20 else edges[1] or cut)
    return replace(document, text=text[cut:] if held else text[:cut])


def _checked(document: Document, length: int, cut: int) -> int:
    if not 0 < cut < length:
        raise DataError(f"{document.place}: too short to hold out a part of it (data.held_out_share)")
    return cut
