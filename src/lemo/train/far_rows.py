"""Which drawn loss rows are far: those that repeat what only far rows hold.

A row whose last tokens occurred before, but not within the window that local loss rows see, is one whose prediction may
need the far occurrence. On code, books and instruction data the far third of drawn rows takes away half to two thirds
of what a local view loses when it is chosen so, a third when it is left to the draw (SmolLM2-135M;
docs/decisions/0018-far-rows-by-repeats.md). It reads tokens alone, never what they predict.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lemo.core.layout import Layout

GRAM = 3  # tokens that have to occur again
PLACE_WEIGHT = 2.0  # of a block's place in [0, 1), against 1 for being far at all
_TOKEN_BITS = 21  # three tokens make one int64


def repeats_beyond(ids_N: Tensor, layout: Layout, window: int) -> Tensor:
    """(N,) bool: rows whose last three tokens occurred earlier in their document, but not in their local view.

    The local view of a row is its chunk of `window` rows of the document and the chunk before, as under
    `Plan.context_window`; the document's first block, which it shows as well, counts as far. Host only; sorts N keys.

    Args:
        ids_N: (N,) token ids of the flattened batch, below 2^21.
        layout: documents and positions of these rows; padding belongs to none.
        window: rows of a chunk.
    """
    ids, document = ids_N.cpu().numpy().astype(np.int64), layout.document_of_row_N.cpu().numpy()
    position = layout.position_of_row_N.cpu().numpy()
    rows = np.flatnonzero((document >= 0) & (position >= GRAM - 1))
    # Rows of a document lie side by side, so the two tokens before a row's own are those of the rows before it.
    key = ids[rows] | ids[rows - 1] << _TOKEN_BITS | ids[rows - 2] << 2 * _TOKEN_BITS
    order = np.lexsort((position[rows], key, document[rows]))
    rows, key = rows[order], key[order]
    same = np.zeros(len(rows), dtype=bool)
    same[1:] = (key[1:] == key[:-1]) & (document[rows[1:]] == document[rows[:-1]])
    before = np.concatenate([position[rows[:1]], position[rows[:-1]]])
    found = np.zeros(len(ids), dtype=bool)
    found[rows] = same & (before < (position[rows] // window - 1) * window)
    return torch.from_numpy(found)


def block_scores(ids_N: Tensor, layout: Layout, window: int) -> Tensor:
    """(K,) fp64: rows of each block that `repeats_beyond` finds, over 1 + 2 · its place in a document of T rows.

    A far row reads as many keys as lie before it, so late blocks cost more. Without the divisor the mean far row lies
    at 0.73 of its window; with it at 0.63 of 16,384 tokens and at 0.51 of 65,536, where drawn ones lie at 0.50, and
    takes away nearly as much of what a local view loses.
    """
    repeats_N = repeats_beyond(ids_N, layout, window)
    count_K = torch.bincount(layout.block_of_row_N.cpu()[repeats_N], minlength=len(layout.block_start_K))
    place_K = layout.block_start_K - layout.document_start_D[layout.block_document_K]
    return count_K / (1 + PLACE_WEIGHT * place_K.double() / layout.tokens)


def choose_far(blocks: Tensor, score_K: Tensor, count: int, span: int, generator: np.random.Generator) -> Tensor:
    """Ascending indices into `blocks` of the `count` blocks that are far, in runs of up to `span` blocks.

    Neighbouring blocks are parted into runs; those of the highest mean score are taken, equal ones in a drawn order,
    and of the last one the stretch that scores most.

    Args:
        blocks: (n,) ascending numbers of the drawn blocks.
        score_K: (K,) score of every block.
        count: blocks to take.
        span: blocks of a run.
        generator: of the order of equal runs.
    """
    score = score_K[blocks].double().numpy()
    breaks = np.flatnonzero(np.diff(blocks.numpy()) != 1) + 1
    edges = np.concatenate([[0], breaks, [len(blocks)]])
    runs = [(s, min(s + span, b)) for a, b in pairwise(edges) for s in range(a, b, span)]
    means = np.array([score[a:b].mean() for a, b in runs])
    taken: list[np.ndarray] = []
    for index in np.lexsort((generator.permutation(len(runs)), -means)):
        first, last = runs[index]
        missing = count - sum(map(len, taken))
        if missing <= 0:
            break
        if last - first > missing:
            sums = np.convolve(score[first:last], np.ones(missing), "valid")
            first += int(sums.argmax())
            last = first + missing
        taken.append(np.arange(first, last))
    return torch.from_numpy(np.sort(np.concatenate(taken))) if taken else blocks[:0]
