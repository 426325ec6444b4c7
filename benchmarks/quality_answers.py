"""Instruction data for the quality benchmark: documents, questions about them, and answers that carry the loss.

    python -m benchmarks.quality_answers CORPUS TOKENIZER OUT

CORPUS holds `instruct-train.jsonl.gz` and `instruct-validation.jsonl.gz`: rows of several numbered stories or meetings
with questions about each. OUT receives `answers-<split>.npz`, and `answers-alone-<split>.npz` with the same questions
and answers without any document. A sample is as many consecutive documents as fit the window, then questions about them
until answers make up `ANSWER_SHARE` of it; further questions make further samples of the same documents.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lemo.errors import DataError
from lemo.train.collate import WindowDataset
from lemo.train.windows import QUESTION, Window

ANSWER_SHARE = 0.06
_BORDER = re.compile(r"^\[(?:Story|Meeting) (\d+): ", re.MULTILINE)


def split_documents(text: str) -> dict[int, str]:
    """Numbered documents of a row's text.

    Raises:
        DataError: no numbered document.
    """
    borders = list(_BORDER.finditer(text))
    if not borders:
        raise DataError("no '[Story n: ...' or '[Meeting n: ...' in the text")
    ends = [*(b.start() for b in borders[1:]), len(text)]
    return {int(b[1]): text[b.start() : end].strip() for b, end in zip(borders, ends, strict=True)}


def samples_of(row: dict[str, Any], tokenizer: Any, window: int) -> Iterator[tuple[list[int], list[tuple]]]:
    """(document tokens, [(question tokens, answer tokens), ...]) of one row, each at most `window` tokens in all."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    documents = {n: encode(text) for n, text in split_documents(row["text"]).items()}
    turns: dict[int, list[tuple[list[int], list[int]]]] = {n: [] for n in documents}
    for qa in row["qas"]:
        answer = [*encode(" " + qa["answers"][0].strip()), tokenizer.eos_token_id]
        turns[qa["document"]].append((encode(QUESTION.format(question=qa["question"].strip())), answer))
    most_asked = int(0.15 * window)
    group: list[int] = []
    for number in [*documents, None]:
        size = sum(len(documents[n]) for n in group)
        full = number is None or size + len(documents[number]) + most_asked > window
        if group and full:
            context = [token for n in group for token in documents[n]][: window - most_asked]
            yield from _asked(context, [t for n in group for t in turns[n]], most_asked)
            group = []
        if number is not None:
            group.append(number)


def _asked(context: list[int], turns: Sequence[tuple], most: int) -> Iterator[tuple[list[int], list[tuple]]]:
    """The context once for as many questions as the share of answers allows."""
    chosen: list[tuple] = []
    for turn in turns:
        answers = sum(len(a) for _, a in [*chosen, turn])
        size = sum(len(q) + len(a) for q, a in [*chosen, turn])
        if chosen and (answers > ANSWER_SHARE * len(context) or size > most):
            yield context, chosen
            chosen = []
        if len(turn[0]) + len(turn[1]) <= most:
            chosen.append(turn)
    if chosen:
        yield context, chosen


def write_answers(corpus: Path, tokenizer: Any, out: Path, window: int) -> None:
    """Writes the four files."""
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        with gzip.open(corpus / f"instruct-{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
            samples = [s for line in lines for s in samples_of(json.loads(line), tokenizer, window)]
        for name, documents in (("answers", True), ("answers-alone", False)):
            path = out / f"{name}-{split}.npz"
            _write(path, samples, documents)
            windows = read_answers(path).windows
            sizes = [len(w.tokens_T) for w in windows]
            share = sum(w.supervised_rows for w in windows) / sum(sizes)
            print(
                f"{path.name}: {len(windows)} samples, {sum(sizes):,} tokens, longest {max(sizes)}, answers {share:.1%}"
            )


def _write(path: Path, samples: Sequence[tuple[list[int], list[tuple]]], documents: bool) -> None:
    tokens: list[int] = []
    learned: list[bool] = []
    bounds = [0]
    for context, turns in samples:
        parts = [(context, False)] if documents else []
        parts += [part for question, answer in turns for part in ((question, False), (answer, True))]
        for ids, answered in parts:
            tokens += ids
            learned += [answered] * len(ids)
        bounds.append(len(tokens))
    dtype = np.uint16 if max(tokens) < 2**16 else np.uint32
    arrays = {"tokens": np.asarray(tokens, dtype), "learned": np.asarray(learned), "bounds": np.asarray(bounds)}
    np.savez_compressed(path, **arrays)


def read_answers(path: Path) -> WindowDataset:
    """Samples of a file that `write_answers` wrote; the names of samples with and without documents agree."""
    with np.load(path, allow_pickle=False) as arrays:
        tokens, learned, bounds = arrays["tokens"].astype(np.uint32), arrays["learned"], arrays["bounds"]
    windows = []
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        windows.append(Window(f"answers#{number}", tokens[start:end], learned[start:end], (int(end - start),)))
    return WindowDataset(windows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("corpus", "tokenizer", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--window", type=int, default=16384)
    options = parser.parse_args(arguments)
    from transformers import AutoTokenizer

    write_answers(options.corpus, AutoTokenizer.from_pretrained(options.tokenizer), options.out, options.window)
    return 0


if __name__ == "__main__":
    sys.exit(main())
