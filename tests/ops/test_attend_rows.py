"""What attend_rows refuses, and which gradients it leaves out."""

from __future__ import annotations

import pytest
import torch

from lemo.errors import BackendError
from lemo.ops import attend_rows, attend_rows_constant, attend_rows_with_lse
from lemo.ops.attend_rows import reference, tiling
from lemo.ops.attend_rows.reference import Segments, chunks


def _rows(*positions: list[int]) -> Segments:
    lengths = tuple(len(p) for p in positions)
    starts = tuple(sum(lengths[:d]) for d in range(len(lengths)))
    return Segments(starts, lengths, torch.tensor([p for document in positions for p in document]))


def _draw(heads: int, rows: Segments, **options) -> torch.Tensor:
    return torch.randn(heads, len(rows.position_N), 8, dtype=torch.float64, **options)


QUERIES, KEYS = _rows([1, 4], [0]), _rows([0, 1, 2, 3, 4, 5], [0, 1])


def test_later_keys_and_other_documents_change_nothing():
    query, key, value = _draw(2, QUERIES), _draw(1, KEYS), _draw(1, KEYS)
    before = attend_rows(query, key, value, QUERIES, KEYS, scaling=0.3)
    key[:, 2:6], value[:, 2:6] = -50.0, 1e9  # behind the first query; the second query sees them
    key[:, 7], value[:, 7] = 100.0, 100.0  # behind the query of the second document
    after = attend_rows(query, key, value, QUERIES, KEYS, scaling=0.3)
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert torch.equal(after[:, 2], value[:, 6].expand(2, -1))


@pytest.mark.parametrize("what", ["scaling", "window", "documents", "reach", "heads", "dtype", "positions"])
def test_what_does_not_fit_is_refused(what):
    query, key, value = _draw(2, QUERIES), _draw(1, KEYS), _draw(1, KEYS)
    queries, options = (
        QUERIES,
        {"scaling": 0.0 if what == "scaling" else 1.0, "window": 0 if what == "window" else None},
    )
    if what == "documents":
        queries = Segments((0,), (3,), QUERIES.position_N)
    if what == "reach":
        queries = Segments((0, 2), (2, 2), QUERIES.position_N)
    if what == "heads":
        query, key, value = (t.expand(heads, -1, -1) for t, heads in ((query[:1], 3), (key, 2), (value, 2)))
    if what == "dtype":
        value = value.float()
    if what == "positions":
        queries = Segments(QUERIES.starts, QUERIES.lengths, QUERIES.position_N.int())
    with pytest.raises(ValueError, match=r"must|fit|multiple|beyond|query is"):
        attend_rows(query, key, value, queries, KEYS, **options)


def test_kernel_that_cannot_run_is_not_replaced():
    query, key, value = _draw(2, QUERIES), _draw(1, KEYS), _draw(1, KEYS)
    with pytest.raises(BackendError, match="attend_rows"):
        attend_rows(query, key, value, QUERIES, KEYS, scaling=1.0, backend="triton")


def test_constant_keys_get_no_gradient():
    query, key, value = (_draw(h, r, requires_grad=True) for h, r in ((2, QUERIES), (1, KEYS), (1, KEYS)))
    own = tuple(t[:, [1, 4, 6]].detach().requires_grad_() for t in (key, value))
    attend_rows_constant(query, own, (key, value), QUERIES, KEYS, scaling=1.0).sum().backward()
    assert key.grad is None and value.grad is None
    assert all(t.grad.abs().sum() > 0 for t in own)


def test_log_sum_exp_has_no_gradient():
    query, key, value = (_draw(h, r, requires_grad=True) for h, r in ((2, QUERIES), (1, KEYS), (1, KEYS)))
    output, lse = attend_rows_with_lse(query, key, value, QUERIES, KEYS, scaling=1.0)
    assert output.requires_grad and not lse.requires_grad


def test_chunks_leave_out_only_keys_that_no_query_sees(monkeypatch):
    monkeypatch.setattr(reference, "QUERY_CHUNK", 1)
    queries, keys = _rows([2, 3, 7]), _rows(list(range(9)))
    for rows, columns in chunks(queries, keys):
        assert keys.position_N[columns].max() >= queries.position_N[rows].max()


def test_tiles_hold_every_row_once_and_heavy_ones_come_first():
    segments = ((0, 40, 40), (40, 0, 7), (0, 100, 110), (100, 10, 20))
    for rising in (True, False):
        table, tiles, rounds = tiling.tile_table(segments, 16, torch.device("cpu"), rising)
        rows = sorted(row for first, end, _, _ in table.tolist() for row in range(first, min(first + 16, end)))
        assert rows == list(range(47)) and tiles == 4 and 2**rounds > 100
        assert table[0].tolist() == ([32, 40, 0, 100] if rising else [0, 40, 0, 100])
