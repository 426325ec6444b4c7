"""Holds documents out of training data for validation, where no files are named for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

from lemo.errors import DataError
from lemo.train.sources import Document


def split_documents(
    documents: Iterable[Document], share: float, split: Literal["train", "validation"]
) -> Iterator[Document]:
    """The documents of one split; both together are all of them, and no text stands in both.

    With at least n = 1/share documents, every n-th is held out. With fewer, the end of each is, unless a document is a
    sample of its own (questions, conversations), which stays whole: then the last one is.

    Args:
        documents: all of them.
        share: of validation.
        split: which part is wanted.

    Raises:
        DataError: there is a single sample, so that none can be held out.
    """
    found = list(documents)
    every = max(2, round(1 / share))
    whole = any(document.is_sample for document in found)
    if whole and len(found) < 2:
        raise DataError(f"{found[0].place}: the data has one sample, so none can be held out (data.held_out_share)")
    if len(found) < every and not whole:
        return (_part(document, share, split) for document in found)
    chosen = {len(found) - 1} if len(found) < every else set(range(every // 2, len(found), every))
    return (document for i, document in enumerate(found) if (i in chosen) == (split == "validation"))


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
