"""attend_local_backward: gradients against autograd through the specification."""

from __future__ import annotations

import pytest
import torch

from lemo.errors import BackendError
from lemo.ops import attend_local_backward, plan_local
from lemo.ops.attend_local.cases import SPEC, local_of
from lemo.ops.attend_local.reference import attend_local_reference, local_mask
from lemo.ops.attend_rows.reference import Segments

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
    add_pairs(seen, local.near.work, local.near.window, torch.arange(99))
    if local.sinks is not None:
        add_pairs(seen, local.sinks.work, window, local.sinks.index_K)
    for rows, columns in ((slice(0, 25), slice(2, 82)), (slice(25, 34), slice(90, 99))):
        assert torch.equal(seen[rows, columns], local_mask(local, rows, columns).long())
        seen[rows, columns] = 0
    assert not seen.any()


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
