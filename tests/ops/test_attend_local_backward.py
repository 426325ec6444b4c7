"""attend_local_backward: gradients against autograd through the specification."""

from __future__ import annotations

import pytest
import torch

from lemo.ops import attend_local_backward
from lemo.ops.attend_local.cases import SPEC, local_of
from lemo.ops.attend_local.reference import attend_local_reference

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
