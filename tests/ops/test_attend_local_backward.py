"""attend_local_backward: gradients against autograd through the specification."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from lemo.errors import BackendError
from lemo.ops import attend_local_backward, plan_local
from lemo.ops.attend_local import pieces, vendor
from lemo.ops.attend_local.cases import SPEC, backward_case, local_of
from lemo.ops.attend_local.reference import attend_local_reference, local_mask
from lemo.ops.attend_rows.reference import Segments, attend_backward_reference, chunks, mask_of

NAMES = ("query_HND", "key_GKD", "value_GKD")


def drawn(case):
    """Gradient, query, key, value, output and log-sum-exp; rows; scaling; and gradients by autograd."""
    inputs = case.inputs(0, torch.float64)
    local, scaling = local_of(inputs), inputs["scaling"]
    leaves = [inputs[name].detach().requires_grad_() for name in NAMES]
    output, lse = attend_local_reference(*leaves, local, scaling=scaling)
    grad = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(output, leaves, grad)
    tensors = (grad, *(t.detach() for t in leaves), output.detach(), lse.detach())
    return tensors, local, scaling, expected


def heads_inside(tensor):
    heads, rows, head_dim = tensor.shape
    return tensor.transpose(0, 1).reshape(rows, heads * head_dim).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("case", SPEC.cases, ids=lambda case: case.name)
def test_gradients_are_those_of_autograd(case):
    tensors, local, scaling, expected = drawn(case)
    found = attend_local_backward(*tensors, local, scaling=scaling)
    torch.testing.assert_close(found, expected)
    assert all(heads_inside(t) for t in found)


@pytest.mark.parametrize("window", [None, 1, 7, 9, 10, 15, 16, 40])
@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_near_and_sinks_are_the_rule(chunk, window):
    """A window of places and the sinks' copies: every pair that is seen once, and no other."""
    queries = Segments((0, 25), (25, 9), torch.cat([torch.arange(3, 78, 3), torch.arange(9)]))
    keys = Segments((2, 90), (80, 9), torch.cat([torch.arange(-2, 88), torch.arange(9)]))
    local = plan_local(queries, keys, chunk=chunk, sink=min(chunk, 4), window=window)
    seen = torch.zeros(34, 99, dtype=torch.int64)
    add_pairs(seen, local.near(2).work, local.near(2).window, torch.arange(99))
    if local.sinks is not None:
        add_pairs(seen, local.sinks.work, window, local.sinks.index_K)
    own = torch.zeros_like(seen)
    add_pairs(own, local.near(1).work, local.near(1).window, torch.arange(99))
    for rows, columns in ((slice(0, 25), slice(2, 82)), (slice(25, 34), slice(90, 99))):
        mask = local_mask(local, rows, columns)
        assert torch.equal(seen[rows, columns], mask.long())
        chunks = (side.position_N[part] // chunk for side, part in ((queries, rows), (keys, columns)))
        mask &= next(chunks)[:, None] == next(chunks)
        assert torch.equal(own[rows, columns], mask.long())
        seen[rows, columns] = own[rows, columns] = 0
    assert not seen.any() and not own.any()


def add_pairs(seen, work, window, index):
    """Counts the pairs that kernels see of such work."""
    for q_start, q_length, k_start, k_length in zip(*work.segments, strict=True):
        rows, columns = slice(q_start, q_start + q_length), slice(k_start, k_start + k_length)
        places = work.rows[rows], work.others[columns]
        assert all((place.diff() >= 0).all() for place in places)
        distance = places[0][:, None] - places[1]
        among = (distance >= 0) & (distance < (window or distance.max() + 1))
        seen[rows] += torch.zeros_like(seen[rows]).index_add_(1, index[columns], among.long())


def test_a_document_may_be_without_queries():
    """It changes nothing for the others, and its keys get no gradient."""
    rows = Segments((0, 40), (40, 30), torch.cat([torch.arange(40), torch.arange(30)]))
    few = Segments((0, 12), (12, 0), torch.arange(0, 36, 3))
    local = plan_local(few, rows, chunk=8, sink=4)
    tensors = [torch.randn(2, n, 8, dtype=torch.float64) for n in (12, 12, 70, 70)]
    saved = attend_local_reference(*tensors[1:], local, scaling=0.3)
    found = attend_local_backward(*tensors, *saved, local, scaling=0.3)
    alone = plan_local(few, Segments((0, 0), (40, 0), rows.position_N[:40]), chunk=8, sink=4)
    cut = [tensors[0], tensors[1], *(t[:, :40] for t in tensors[2:])]
    expected = attend_local_backward(*cut, *saved, alone, scaling=0.3)
    torch.testing.assert_close(found[0], expected[0])
    for got, wanted in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(got[:, :40], wanted)
        assert not got[:, 40:].any()


@pytest.mark.parametrize("case", [c for c in SPEC.cases if "gap" not in c.name], ids=lambda case: case.name)
def test_queries_may_have_seen_more_keys(case):
    """Output and log-sum-exp of all keys: the gradient of a softmax over all, through near keys alone."""
    inputs = case.inputs(0, torch.float64)
    local, scaling = local_of(inputs), inputs["scaling"]
    leaves = [inputs[name].detach().requires_grad_() for name in NAMES]
    groups, output = len(leaves[1]), torch.zeros_like(leaves[0])
    lse = leaves[0].new_zeros(leaves[0].shape[:2])
    for rows, columns in chunks(local.queries, local.keys):
        key, value = (t[:, columns].repeat_interleave(len(leaves[0]) // groups, 0) for t in leaves[1:])
        near = local_mask(local, rows, columns)
        seen = near | mask_of(local.queries, local.keys, rows, columns, None)
        score = leaves[0][:, rows] @ key.mT * scaling
        score = torch.where(near, score, score.detach()).masked_fill(~seen, -torch.inf)
        weight = score.softmax(-1)
        found = (weight * near) @ value + (weight * ~near) @ value.detach()
        output = torch.cat([output[:, : rows.start], found, output[:, rows.stop :]], 1)
        lse[:, rows] = score.logsumexp(-1).detach()
    grad = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(output, leaves, grad)
    tensors = (grad, *(t.detach() for t in leaves), output.detach(), lse)
    torch.testing.assert_close(attend_local_backward(*tensors, local, scaling=scaling), expected)


def test_no_queries_at_all():
    keys = Segments((0,), (9,), torch.arange(9))
    local = plan_local(Segments((0,), (0,), torch.arange(0)), keys, chunk=2, sink=1)
    tensors = [torch.randn(2, n, 8) for n in (0, 0, 9, 9)]
    found = attend_local_backward(*tensors, tensors[0], torch.zeros(2, 0), local, scaling=0.3)
    assert [t.shape for t in found] == [(2, 0, 8), (2, 9, 8), (2, 9, 8)]
    assert not any(t.any() for t in found)


def test_what_does_not_fit_is_refused():
    (grad, *rest), local, scaling, _ = drawn(SPEC.cases[0])
    with pytest.raises(ValueError, match="shape"):
        attend_local_backward(grad[:, 1:], *rest, local, scaling=scaling)
    with pytest.raises(ValueError, match="log-sum-exp"):
        attend_local_backward(grad, *rest[:-1], rest[-1][:, 1:], local, scaling=scaling)
    with pytest.raises(BackendError, match="attend_local"):
        attend_local_backward(grad, *rest, local, scaling=scaling, backend="triton")


def varlen_stand_in(tensors, spans, scaling):
    """What a vendor's kernel for sequences of varied length computes."""
    sums = tuple(torch.zeros_like(t) for t in tensors[1:4])
    ends = zip(itertools.pairwise(spans.query_S.tolist()), itertools.pairwise(spans.key_S.tolist()), strict=True)
    for (begin, end), (first, last) in ends:
        assert 0 < end - begin <= spans.most[0] and 0 < last - first <= spans.most[1]
        rows, columns = (Segments((0,), (n,), torch.zeros(n).long()) for n in (end - begin, last - first))
        if spans.causal:  # the corner is the last pair
            rows = replace(rows, position_N=torch.arange(end - begin) + last - first - (end - begin))
            columns = replace(columns, position_N=torch.arange(last - first))
        grad, query, key, value, output, lse = tensors
        cut = [t[:, begin:end] for t in (grad, query)] + [t[:, first:last] for t in (key, value)]
        cut += [t[:, begin:end] for t in (output, lse)]
        columns = replace(columns, valid_N=torch.ones(last - first).bool())
        found = attend_backward_reference(tuple(cut), rows, columns, scaling=scaling)
        for target, part, span in zip(sums, found, (slice(begin, end), *[slice(first, last)] * 2), strict=True):
            target[:, span] += part
    return sums


@pytest.mark.parametrize("gathered", [1, 40, 65536])
@pytest.mark.parametrize("documents", [(90,), (50, 7, 1, 64), (16, 33, 32)], ids=str)
def test_rectangles_and_own_chunks_make_the_whole(documents, gathered, monkeypatch):
    """With stand-ins for the kernels: keys are gathered, and their gradients added where they came from."""
    monkeypatch.setattr(vendor, "varlen_backward", varlen_stand_in)
    monkeypatch.setattr(pieces, "GATHERED_KEYS", gathered)
    tensors, local, scaling, expected = drawn(backward_case("", 16, 4, documents=documents, heads=4, groups=2, gap=3))
    local = replace(local, position_on_host_N=local.queries.position_N)
    assert sum(part.rows.stop - part.rows.start for part in local.rectangles) == sum(
        int((local.queries.position_N[s : s + n] >= 16).sum())
        for s, n in zip(local.queries.starts, local.queries.lengths, strict=True)
    )
    assert local.reaches_back == bool(local.rectangles)
    before = vendor.backward_before(tuple(t.double() for t in tensors), local, scaling)
    own = local.near(1)
    sides = (own.work.rows, *own.work.segments[:2]), (own.work.others, *own.work.segments[2:])
    queries, keys = (Segments(starts, lengths, places) for places, starts, lengths in sides)
    among_own = attend_backward_reference(tensors, queries, keys, scaling=scaling, window=own.window)
    for first, second, wanted in zip(before, among_own, expected, strict=True):
        torch.testing.assert_close(first + second, wanted, rtol=1e-5, atol=1e-5)


def _sum_copies(table_CO, order_C, first_K):
    """What our kernel computes."""
    key_C = torch.repeat_interleave(torch.arange(len(first_K) - 1), first_K.diff())
    return table_CO.new_zeros(len(first_K) - 1, table_CO.shape[1]).index_add_(0, key_C, table_CO[order_C])


@pytest.mark.parametrize("gathered", [1, 60, 65536])
@pytest.mark.parametrize("documents", [(90,), (50, 7, 1, 64), (16, 33, 32)], ids=str)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_runs_make_the_whole(documents, share, gathered, monkeypatch):
    """With stand-ins for the kernels: queries side by side in a chunk, every key's gradient from all its copies."""
    kernel = pytest.importorskip("lemo.ops.attend_local.kernel")
    monkeypatch.setattr(kernel, "sum_copies", _sum_copies)
    monkeypatch.setattr(vendor, "varlen_backward", varlen_stand_in)
    monkeypatch.setattr(pieces, "GATHERED_KEYS", gathered)
    monkeypatch.setattr(pieces, "MOST_COPIES", 100)
    options = {"documents": documents, "heads": 4, "groups": 2, "gap": 3, "share": share, "block": 4}
    tensors, local, scaling, expected = drawn(backward_case("", 16, 4, **options))
    local = replace(local, position_on_host_N=local.queries.position_N)
    runs = local.runs
    assert len(runs.order_C) == sum(len(call.index_K) for call in runs.calls)
    assert all(call.rows.stop - call.rows.start <= 16 or call.spans.query_S.numel() > 2 for call in runs.calls)
    found = vendor.backward_runs(tuple(t.double() for t in tensors), runs, scaling)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_scattered_queries_are_no_runs():
    """Every third row of a chunk would gather its keys once more: chunks are gathered instead."""
    keys = Segments((0,), (64,), torch.arange(64))
    for step, none in ((1, False), (3, True)):
        position = torch.arange(0, 64, step)
        queries = Segments((0,), (len(position),), position)
        local = plan_local(queries, keys, chunk=16, sink=4, position_on_host_N=position)
        assert (local.runs is None) == none and local.rectangles


def test_no_queries_make_no_runs():
    keys, none = Segments((0,), (9,), torch.arange(9)), torch.arange(0)
    local = plan_local(Segments((0,), (0,), none), keys, chunk=2, sink=1, position_on_host_N=none)
    tensors = (*(torch.randn(2, n, 8) for n in (0, 0, 9, 9, 0)), torch.zeros(2, 0))
    assert local.runs.calls == () and not any(t.any() for t in vendor.backward_runs(tensors, local.runs, 0.3))


def test_vendor_kernels_say_what_they_cannot_do():
    tensors, local, scaling, _ = drawn(SPEC.cases[0])
    with pytest.raises(BackendError, match="CUDA"):
        attend_local_backward(*tensors, local, scaling=scaling, backend="vendor")


def test_positions_on_the_host_must_fit():
    rows = Segments((0,), (9,), torch.arange(9))
    with pytest.raises(ValueError, match="on the host"):
        plan_local(rows, rows, chunk=2, sink=1, position_on_host_N=torch.arange(8))
