"""attend_forward and attend_backward: values and gradients against autograd through the specification."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lemo.errors import BackendError
from lemo.ops import attend_backward, attend_forward
from lemo.ops.attend_rows.cases import Shape, segments_of
from lemo.ops.attend_rows.reference import Segments, attend_rows_reference, own_among_keys

SHAPES = {
    "one document": Shape(documents=(70,), heads=4, groups=2),
    "packed": Shape(documents=(37, 5, 1, 64), share=0.6, heads=6, groups=2),
    "gaps between documents": Shape(documents=(30, 41), gap=7),
    "window": Shape(documents=(90, 30), window=20, heads=2, groups=1),
    "model layout": Shape(documents=(61,), order="NHD", heads=4, groups=1),
}


def _drawn(shape: Shape, compact: bool) -> tuple[tuple[torch.Tensor, ...], Segments, Segments, dict]:
    """Query, key and value, and the rows; `compact` leaves the keys of the queries only, and one Rows object."""
    inputs = shape.inputs(torch.Generator().manual_seed(0))
    queries, keys = segments_of(inputs)
    tensors = tuple(inputs[name] for name in ("query_HND", "key_GKD", "value_GKD"))
    if compact:
        count = tensors[0].shape[1]
        tensors, keys = (tensors[0], *(t[:, -count:] for t in tensors[1:])), queries
    return tensors, queries, keys, {"scaling": inputs["scaling"], "window": inputs["window"]}


def _heads_inside(tensor: torch.Tensor) -> bool:
    heads, rows, head_dim = tensor.shape
    return tensor.transpose(0, 1).reshape(rows, heads * head_dim).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("compact", [False, True], ids=["all keys", "compact"])
@pytest.mark.parametrize("name", SHAPES)
def test_passes_are_those_of_autograd(name, compact):
    tensors, queries, keys, options = _drawn(SHAPES[name], compact)
    leaves = [t.detach().requires_grad_() for t in tensors]
    output, lse = attend_rows_reference(*leaves, queries, keys, **options)
    grad = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(output, leaves, grad)
    found = attend_forward(*tensors, queries, keys, **options)
    torch.testing.assert_close(found, (output.detach(), lse.detach()))
    gradients = attend_backward(grad, *tensors, *found, queries, keys, **options)
    torch.testing.assert_close(gradients, expected)
    assert all(_heads_inside(t) for t in (found[0], *gradients))
    others = tuple(torch.randn(t.shape, dtype=torch.float64) for t in tensors[1:])
    start = tuple(t.clone() for t in others)
    ongoing = attend_backward(grad, *tensors, *found, queries, keys, **options, start=start)
    assert ongoing[1] is start[0] and ongoing[2] is start[1]
    for actual, other, wanted in zip(ongoing[1:], others, expected[1:], strict=True):
        torch.testing.assert_close(actual, other + wanted)
    with pytest.raises(ValueError, match="start"):
        attend_backward(grad, *tensors, *found, queries, keys, **options, start=(start[0][:, 1:], start[1]))


def test_only_own_rows_of_constant_keys_have_gradients():
    shape = Shape(documents=(60, 21), heads=4, groups=2, constant=True)
    inputs = shape.inputs(torch.Generator().manual_seed(0))
    queries, keys = segments_of(inputs)
    query, own = inputs["query_HND"].requires_grad_(), tuple(inputs[f"own_{n}_GND"] for n in ("key", "value"))
    own = tuple(t.requires_grad_() for t in own)
    constant = (inputs["key_GKD"], inputs["value_GKD"])
    merged = own_among_keys(own, constant, queries, keys)
    output, lse = attend_rows_reference(query, *merged, queries, keys, scaling=0.25)
    grad = torch.randn_like(output)
    expected = torch.autograd.grad(output, (query, *own), grad)
    found = attend_backward(grad, query, *constant, output.detach(), lse.detach(), queries, keys, scaling=0.25, own=own)
    torch.testing.assert_close(found, expected)


def test_output_of_a_wider_pass_makes_other_keys_constant():
    """Compact backward with dense output and log-sum-exp: as autograd, with scores of the other keys detached."""
    tensors, queries, keys, options = _drawn(Shape(documents=(50,), heads=4, groups=2), False)
    query, *pair = (t.requires_grad_() for t in tensors)
    output, lse = (t.detach() for t in attend_rows_reference(query, *pair, queries, keys, **options))
    chosen = torch.searchsorted(keys.position_N, queries.position_N)
    own = [t[:, chosen] for t in pair]
    # Weights of all keys with a fixed normaliser; a constant score has the same weight, without gradient.
    groups = len(own[0])
    score = query.unflatten(0, (groups, -1)) @ pair[0][:, None].mT * options["scaling"]
    mine = torch.isin(torch.arange(50), chosen)
    score = torch.where(mine, score, score.detach())
    seen = queries.position_N[:, None] >= keys.position_N
    exponent = score.masked_fill(~seen, -torch.inf)
    value = torch.where(mine[None, :, None], pair[1], pair[1].detach())[:, None]
    result = (torch.softmax(exponent, -1) @ value).flatten(0, 1)
    torch.testing.assert_close(result, output)
    grad = torch.randn_like(output)
    expected = torch.autograd.grad(result, (query, *pair), grad)
    found = attend_backward(grad, query, *own, output, lse, queries, queries, **options)
    wanted = (expected[0], *(t[:, chosen] for t in expected[1:]))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("compact", [False, True], ids=["all keys", "compact"])
def test_rows_that_are_not_valid_do_not_count(compact):
    """They lie at the end of their document and their gradient is 0: the valid rows get what they get alone."""
    tensors, queries, keys, options = _drawn(replace(SHAPES["one document"], share=1.0), compact)
    count, alive = 70, 41
    rows = torch.arange(count) < alive
    order = torch.cat([torch.arange(alive), torch.randperm(count - alive) + alive])
    mixed = Segments((0,), (count,), queries.position_N[order], rows)
    few = Segments((0,), (alive,), queries.position_N[:alive])
    grad = torch.randn_like(tensors[0]) * rows[:, None]
    others = mixed if compact else keys
    output, lse = attend_forward(*tensors, mixed, others, **options)
    found = attend_backward(grad, *tensors, output, lse, mixed, others, **options)
    alone = [tensors[0][:, :alive], *(t[:, :alive] if compact else t for t in tensors[1:])]
    others = few if compact else keys
    expected = attend_forward(*alone, few, others, **options)
    torch.testing.assert_close((output[:, :alive], lse[:, :alive]), expected)
    assert output.isfinite().all() and lse.isfinite().all()
    gradients = attend_backward(grad[:, :alive], *alone, *expected, few, others, **options)
    for actual, wanted in zip(found, gradients, strict=True):
        torch.testing.assert_close(actual[:, : wanted.shape[1]], wanted)
        assert not actual[:, wanted.shape[1] :].any()


def test_what_does_not_fit_is_refused():
    tensors, queries, keys, options = _drawn(SHAPES["one document"], False)
    output, lse = attend_forward(*tensors, queries, keys, **options)
    with pytest.raises(ValueError, match="shape"):
        attend_backward(output[:, :-1], *tensors, output, lse, queries, keys, **options)
    with pytest.raises(ValueError, match="log-sum-exp"):
        attend_backward(output, *tensors, output, lse[:-1], queries, keys, **options)
    with pytest.raises(BackendError, match="attend_rows"):
        attend_forward(*tensors, queries, keys, **options, backend="triton")
    with pytest.raises(BackendError, match="CUDA"):
        attend_forward(*tensors, queries, keys, **options, backend="vendor")
