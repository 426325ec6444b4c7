"""Which far keys a backward pass reads: stripes of a document, drawn anew for every stripe of its queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lemo.ops.attend_rows.reference import Rows, documents
from lemo.ops.attend_rows.stripes import ordered
from lemo.ops.backend import HostCopy, send

FAR_STRIPE = 1024
"""Positions of a stripe. Its own and the one before are near a query, those before these are far."""


def far_counts(stripes: int, share: float) -> Tensor:
    """(S,) int64 far stripes that are drawn for the queries of each stripe: a share of them, at least one of any."""
    far_S = (torch.arange(stripes) - 1).clamp_(min=0)
    return torch.minimum(torch.round(share * far_S.double()).long().clamp_(min=1), far_S)


def draw_far(numbers_SS: Tensor, share: float) -> Tensor:
    """(S, S) bool: whether queries of stripe a read stripe b < a - 1, uniform without replacement.

    Args:
        numbers_SS: (S, S) int64 on the CPU, independent and uniform; those of a row that are least are drawn.
        share: of the far stripes, in (0, 1].
    """
    far_SS = torch.ones_like(numbers_SS, dtype=torch.bool).tril_(-2)
    ranked_SS = numbers_SS.masked_fill(~far_SS, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    rank_SS = torch.empty_like(ranked_SS).scatter_(1, ranked_SS, torch.arange(len(far_SS)).expand_as(ranked_SS))
    return far_SS & (rank_SS < far_counts(len(far_SS), share)[:, None])


@dataclass(frozen=True)
class FarKeys:
    """The far keys that some queries read in the backward pass; see `plan_far`.

    Attributes:
        drawn: per document (S, S) bool on the CPU: queries of stripe a read the far stripe b.
        stripe: positions of a stripe.
        first_S: (stripes of all documents + 1,) int64 first query of each; None where kernels cannot run: keys are
            missing, or rows lie between documents.
    """

    drawn: tuple[Tensor, ...]
    stripe: int
    first_S: Tensor | None = None
    _copy: HostCopy | None = field(default=None, repr=False)

    def read(self) -> list[int]:
        """`first_S` on the host; waits until the device has come past `plan_far`."""
        assert self._copy is not None
        return self._copy.read().tolist()

    def table(self, document: int) -> Tensor:
        """(S, S) fp64 on the CPU: what counts how often: 1 near keys, far stripes / drawn ones far keys, 0 others."""
        drawn_SS = self.drawn[document]
        far_S = torch.arange(len(drawn_SS), dtype=torch.float64) - 1
        weight_S = far_S / drawn_SS.sum(1).clamp(min=1)
        near_SS = torch.ones_like(drawn_SS).tril_(-2).logical_not_()
        return near_SS.double() + drawn_SS * weight_S[:, None]

    def weight_of(self, queries: Rows, keys: Rows, rows: slice, columns: slice) -> Tensor:
        """(Q, K) fp64 how often each pair counts, of rows and columns of one document."""
        sides = zip(queries.starts, queries.lengths, strict=True)
        document = next(d for d, (start, length) in enumerate(sides) if start <= rows.start < start + length)
        table_SS = self.table(document).to(queries.position_N.device)
        stripe_Q, stripe_K = queries.position_N[rows] // self.stripe, keys.position_N[columns] // self.stripe
        return table_SS[stripe_Q[:, None], stripe_K]


def plan_far(
    queries: Rows, keys: Rows, drawn: Sequence[Tensor], lengths: Sequence[int], *, stripe: int | None = None
) -> FarKeys | None:
    """What `attend_backward` needs to read a sample of the far keys; None where no document has any.

    Call it before the forward pass: where queries of a stripe begin travels to the host meanwhile.

    Args:
        queries: documents and positions of the query rows.
        keys: documents and positions of the key rows.
        drawn: of each document, see `draw_far`.
        lengths: rows of each document, whether they are keys or not.
        stripe: positions of a stripe; `FAR_STRIPE` when None.

    Raises:
        ValueError: documents that do not fit each other, or draws that are not made of their stripes.

    *Cost*: a bisection per stripe and a copy of one number each. No waiting.
    """
    stripe = FAR_STRIPE if stripe is None else stripe
    if not len(queries.lengths) == len(keys.lengths) == len(drawn) == len(lengths):
        raise ValueError("queries, keys, draws and lengths must be of the same documents")
    if any(table.shape != (-(-n // stripe),) * 2 for table, n in zip(drawn, lengths, strict=True)):
        raise ValueError(f"draws must have a row and a column for each stripe of {stripe} positions")
    if all(len(table) < 3 for table in drawn):
        return None
    whole = tuple(keys.lengths) == tuple(lengths) and keys.valid_N is None
    covered = sum(queries.lengths) == len(queries.position_N)
    if not (whole and covered):
        return FarKeys(tuple(drawn), stripe)
    first_S = _first(queries, keys, drawn, stripe)
    return FarKeys(tuple(drawn), stripe, first_S, HostCopy(first_S))


def _first(queries: Rows, keys: Rows, drawn: Sequence[Tensor], stripe: int) -> Tensor:
    """(stripes + 1,) first query of each stripe of each document; rows that are not valid count to the last stripe."""
    rising = ordered(queries)
    ends, base, last, stripes = [], [], [], 0
    for (start, length, _, _), table in zip(documents(queries, keys), drawn, strict=True):
        ends.append(start + length)
        base.append(stripes)
        last.append(len(table) - 1)
        stripes += len(table)
    device = rising.position_N.device
    ends_D, base_D, last_D = upload(ends + base + last, device).view(3, -1)
    place_N = torch.arange(len(rising.position_N), device=device)
    document_N = torch.searchsorted(ends_D, place_N, right=True)
    stripe_N = base_D[document_N] + torch.minimum(rising.position_N // stripe, last_D[document_N])
    return torch.searchsorted(stripe_N, torch.arange(stripes + 1, device=device))


def upload(numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers of the host on the device, without waiting."""
    return send(torch.tensor(numbers, dtype=dtype), device)
