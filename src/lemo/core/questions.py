"""What the questions of a sample ask for, by its words alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from lemo.core.layout import Layout

RARE = 0.2  # a word that occurs five times or less in a document, but for its questions and answers


@dataclass(frozen=True)
class Questions:
    """Finds questions before rows that carry loss, and weighs the rows of a document by the rare words they share.

    Asked is what stands within `asked_rows` rows before a run of rows that carry loss and attend to all keys. What
    these predict is not looked at: rows that are kept because an answer names them teach that whatever is kept is the
    answer. A row of the question and one with loss weighs 1; another one weighs one over how often its token occurs
    among such rows of its document, if the token is asked, else nothing. A block scores the sum, and half of what lies
    within `beside_rows` of it: what is said of a word may stand across its border.

    Attributes:
        asked_rows: rows before a run of rows with loss in which a question is looked for.
        beside_rows: rows before and after a block that it answers for.
        answered: for study: answers count as asked.
        rounds: for study: of more than one, what stands within `beside_rows` of a rare word that was found is asked in
            the next, at half the weight, so that chains are followed.
    """

    asked_rows: int = 64
    beside_rows: int = 16
    answered: bool = False
    rounds: int = 1

    def block_scores(self, ids_N: Tensor, layout: Layout) -> Tensor:
        """(K,) fp32 scores of a batch's blocks, on the host; `ids_N` are its token ids there."""
        host = layout.on_host or layout
        block_N, document_N = host.block_of_row_N.cpu(), host.document_of_row_N.cpu()
        learned_S = layout.supervised_row_S
        if layout.local_K is not None:
            learned_S = learned_S[~layout.local_K[block_N[learned_S]]]
        weight_N = torch.zeros(len(ids_N))
        for document in document_N[learned_S].unique().tolist():
            start, length = (int(x[document]) for x in (layout.document_start_D, layout.document_length_D))
            inside = slice(start, start + length)
            weight_N[inside] = self._weights(ids_N[inside], learned_S[document_N[learned_S] == document] - start)
        found_K = torch.zeros(len(layout.block_start_K))
        rows_N = torch.arange(len(ids_N))
        for beside in {0, -self.beside_rows, self.beside_rows}:
            here_N = (rows_N + beside >= 0) & (rows_N + beside < len(rows_N))
            row_n, near_n = rows_N[here_N], (rows_N + beside)[here_N]
            counts_n = (block_N[near_n] >= 0) & (document_N[near_n] == document_N[row_n])
            counts_n &= (block_N[near_n] != block_N[row_n]) | (beside == 0)
            found_K.index_add_(0, block_N[near_n][counts_n], weight_N[row_n][counts_n] * (0.5 if beside else 1.0))
        return found_K

    def _weights(self, ids_T: Tensor, learned_S: Tensor) -> Tensor:
        """(T,) fp32 weights of a document's rows; `learned_S` are those that carry loss."""
        asked_T, answered_T = self._asked(learned_S, len(ids_T))
        own_T, weight_T = asked_T | answered_T, torch.zeros(len(ids_T))
        _, word_T = ids_T.unique(return_inverse=True)
        often = torch.bincount(word_T[~own_T], minlength=int(word_T.max()) + 1)
        sought_T = own_T if self.answered else asked_T
        for turn in range(self.rounds):
            wanted = torch.zeros_like(often, dtype=torch.bool)
            wanted[word_T[sought_T]] = True
            found_T = (wanted[word_T] / often[word_T].clamp_min(1)).masked_fill(own_T, 0.0)
            weight_T = torch.maximum(weight_T, found_T / 2**turn)
            rare_11T = (found_T >= RARE)[None, None].float()
            sought_T = max_pool1d(rare_11T, 2 * self.beside_rows + 1, 1, self.beside_rows)[0, 0].bool() & ~own_T
        return torch.where(own_T, 1.0, weight_T)

    def _asked(self, learned_S: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """(T,) bool each, of a document: rows of questions; tokens of answers, which rows with loss predict."""
        asked_T, answered_T = (torch.zeros(length, dtype=torch.bool) for _ in range(2))
        answered_T[(learned_S + 1).clamp_max(length - 1)] = True
        begins = torch.ones_like(learned_S, dtype=torch.bool)
        begins[1:] = learned_S[1:] > learned_S[:-1] + 1
        for first in learned_S[begins].tolist():
            asked_T[max(0, first + 1 - self.asked_rows) : first + 1] = True
        return asked_T & ~answered_T, answered_T
