"""attend_local: the rule, its bounds, and the parts that vendor kernels and our own make of it."""

from __future__ import annotations

import pytest
import torch

from lemo.errors import BackendError
from lemo.ops import attend_local, plan_local
from lemo.ops.attend_local import vendor
from lemo.ops.attend_local.cases import SPEC, local_of
from lemo.ops.attend_local.op import _behind_whole_chunks
from lemo.ops.attend_local.reference import attend_local_reference, local_mask
from lemo.ops.attend_rows.reference import Segments, attend_rows_reference, chunks

NAMES = ("query_HND", "key_GKD", "value_GKD")


def _drawn(case):
    inputs = case.inputs(0, torch.float64)
    local = local_of(inputs)
    return [inputs[name] for name in NAMES], local, inputs["scaling"]


def _whole(*lengths):
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    rows = Segments(tuple(starts), lengths, torch.cat([torch.arange(n) for n in lengths]))
    return rows


def test_the_rule_in_words():
    rows = _whole(12)
    mask = local_mask(plan_local(rows, rows, chunk=3, sink=2), slice(0, 12), slice(0, 12))
    assert mask[2].nonzero().flatten().tolist() == [0, 1, 2]
    assert mask[5].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert mask[6].nonzero().flatten().tolist() == [0, 1, 3, 4, 5, 6]
    assert mask[11].nonzero().flatten().tolist() == [0, 1, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("case", SPEC.cases, ids=lambda case: case.name)
def test_bounds_are_the_mask(case):
    """Two ranges of keys a row, which do not meet, are what the specification's mask says."""
    _, local, _ = _drawn(case)
    columns = torch.arange(len(local.keys.position_N))
    first, end, sink, sink_end = (x[:, None] for x in local.seen_4N)
    near = (columns >= first) & (columns < end)
    far = (columns >= sink) & (columns < sink_end)
    assert not (near & far).any()
    for rows, keys in chunks(local.queries, local.keys):
        assert torch.equal((near | far)[rows, keys], local_mask(local, rows, keys))
    assert local.reaches_far or not far.any()


def test_rows_that_are_not_valid_see_something():
    """Kernels would divide by nothing; the others see what they see without them."""
    keys = _whole(40, 9)
    position = torch.tensor([3, 30, 31, 39, 12, 5, 6, 1])
    valid = torch.tensor([1, 1, 1, 1, 0, 1, 1, 0]).bool()
    mixed = Segments((0, 5), (5, 3), position, valid)
    seen = plan_local(mixed, keys, chunk=8, sink=4).seen_4N
    assert (seen[1] > seen[0]).all()
    few = Segments((0, 4), (4, 2), position[valid])
    assert torch.equal(seen[:, valid], plan_local(few, keys, chunk=8, sink=4).seen_4N)


@pytest.mark.parametrize("lengths", [(70,), (64, 17, 1, 33), (16, 5)])
def test_a_window_of_all_keys_is_causal_attention(lengths):
    rows = _whole(*lengths)
    tensors = [torch.randn(2, sum(lengths), 8, dtype=torch.float64) for _ in NAMES]
    found = attend_local(*tensors, plan_local(rows, rows, chunk=35, sink=4, whole=True), scaling=0.3)
    torch.testing.assert_close(found, attend_rows_reference(*tensors, rows, rows, scaling=0.3))


def _batched(query, key, value, causal, scaling):
    repeat = query.shape[1] // key.shape[1]
    score = query @ key.repeat_interleave(repeat, 1).mT * scaling
    if causal:
        score = score.masked_fill(torch.ones(score.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.softmax(score, -1) @ value.repeat_interleave(repeat, 1), torch.logsumexp(score, -1)


def _put_merged(first, second, into):
    lse = torch.logaddexp(first[1], second[1])
    into[0].copy_(sum(o * torch.exp(part - lse)[..., None] for o, part in (first, second)))
    into[1].copy_(lse)


def _vendors_could(case):
    inputs = case.inputs(0, torch.float64)
    return inputs["whole"] and inputs["window"] is None


@pytest.mark.parametrize("case", [c for c in SPEC.cases if _vendors_could(c)], ids=lambda case: case.name)
def test_whole_chunks_what_is_behind_them_and_sink_make_the_whole(case, monkeypatch):
    """With stand-ins for the vendor's kernel and for ours that merges."""
    kernel = pytest.importorskip("lemo.ops.attend_local.kernel")
    monkeypatch.setattr(kernel, "put_merged", _put_merged)
    monkeypatch.setattr(vendor, "MOST_ROWS", 32)
    (query, *pair), local, scaling = _drawn(case)
    exact = attend_local_reference(query, *pair, local, scaling=scaling)
    output, lse = vendor.forward_near(query, tuple(pair), local, scaling, _batched)
    parts = [(output, lse.double())]
    columns = torch.arange(pair[0].shape[1])
    sides = local.queries.starts, local.queries.lengths, local.keys.starts, local.keys.lengths
    rests = torch.zeros(query.shape[1], dtype=torch.bool)
    inside = rests.clone()
    for start, length, *_ in zip(*_behind_whole_chunks(sides, local.chunk), strict=True):
        rests[start : start + length] = True
    for start, length in zip(*sides[:2], strict=True):
        inside[start : start + length] = True
    for (first, end), rows in ((local.seen_4N[:2], rests), (local.seen_4N[2:], inside)):
        seen = (columns >= first[:, None]) & (columns < end[:, None]) & rows[:, None]
        keys, values = (t.repeat_interleave(len(query) // len(t), 0) for t in pair)
        score = (query @ keys.mT * scaling).masked_fill(~seen, -torch.inf)
        parts.append((torch.softmax(score, -1).nan_to_num(0.0) @ values, torch.logsumexp(score, -1)))
    merged = torch.stack([lse for _, lse in parts]).logsumexp(0)
    total = sum(o * torch.exp(lse - merged)[..., None] for o, lse in parts)
    torch.testing.assert_close(total[:, inside], exact[0][:, inside], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged[:, inside], exact[1][:, inside], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lengths", [(64,), (50,), (15, 16, 31, 32, 33, 1, 79)])
def test_vendor_kernels_meet_one_size_whatever_documents_are(lengths, monkeypatch):
    """They are built for every size: here that of a chunk alone, a bounded number of them at a time."""
    kernel = pytest.importorskip("lemo.ops.attend_local.kernel")
    monkeypatch.setattr(kernel, "put_merged", _put_merged)
    monkeypatch.setattr(vendor, "MOST_ROWS", 32)
    rows, sizes = _whole(*lengths), set()

    def vendors(query, key, value, causal, scaling):
        sizes.add((query.shape[0], query.shape[2], key.shape[2]))
        return _batched(query, key, value, causal, scaling)

    tensors = [torch.randn(2, sum(lengths), 8) for _ in NAMES]
    local = plan_local(rows, rows, chunk=16, sink=4, whole=True)
    vendor.forward_near(tensors[0], tuple(tensors[1:]), local, 0.3, vendors)
    assert sizes and sizes <= {(1, 16, 16), (2, 16, 16)}


def test_vendor_kernels_say_what_they_cannot_do():
    rows = _whole(8)
    tensors = [torch.zeros(1, 8, 8) for _ in NAMES]
    with pytest.raises(BackendError, match="CUDA"):
        attend_local(*tensors, plan_local(rows, rows, chunk=2, sink=1), scaling=1.0, backend="vendor")


@pytest.mark.parametrize("sizes", [{"chunk": 0, "sink": 0}, {"chunk": 4, "sink": 5}, {"chunk": 4, "sink": -1}])
def test_sizes_that_make_no_sense_are_refused(sizes):
    rows = _whole(8)
    with pytest.raises(ValueError, match="chunk"):
        plan_local(rows, rows, **sizes)


def test_documents_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="same documents"):
        plan_local(_whole(8), _whole(4, 4), chunk=2, sink=1)
    with pytest.raises(ValueError, match="as many queries"):
        plan_local(_whole(7), _whole(8), chunk=2, sink=1, whole=True)
