"""What scatter_rows promises beyond equality with its reference."""

from __future__ import annotations

import pytest
import torch

from lemo.ops import gather_rows, scatter_rows
from lemo.ops.scatter_rows.cases import SPEC
from lemo.ops.scatter_rows.op import BYPASS_CHUNK_ROWS
from lemo.ops.scatter_rows.reference import bypass_reference, inverse_rms_reference, scatter_rows_reference

CASES = [pytest.param(case, id=case.name) for case in SPEC.cases]


def _run(inputs, inplace):
    """Output and gradients with a stream that is no leaf, as between two layers."""
    leaf, values = inputs.pop("stream_NM"), inputs["values_NM"]
    stream = leaf * 1
    y = scatter_rows(stream, **inputs, inplace=inplace)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    return y, stream, torch.autograd.grad(y, [leaf, values], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_in_place_equals_out_of_place_bit_for_bit(case, dtype):
    inside, stream, grads = _run(case.inputs(0, dtype), inplace=True)
    outside, untouched, expected = _run(case.inputs(0, dtype), inplace=False)
    assert inside is stream or not stream.is_contiguous()
    assert outside is not untouched and torch.equal(untouched, case.inputs(0, dtype)["stream_NM"])
    assert torch.equal(inside, outside)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def _views():
    """(name, stream, whether autograd lets us write into it)."""
    leaf = torch.randn(6, 4, requires_grad=True)
    with torch.no_grad():
        frozen_view = (leaf * 1).view(6, 4).requires_grad_()
    middle = leaf * 1
    with torch.no_grad():
        view_without_grad = middle.view(6, 4)
    with torch.inference_mode():
        inference = torch.randn(6, 4)
    return [
        ("leaf", leaf, False),
        ("view of a leaf", leaf.view(6, 4), False),
        ("leaf made of a view", frozen_view, False),
        ("no leaf", leaf * 1, True),
        ("view of no leaf", (leaf * 1).view(2, 12).view(6, 4), True),
        ("one of several views", torch.stack([leaf, leaf]).unbind(0)[0], False),
        ("view made without grad", view_without_grad, False),
        ("without grad", torch.randn(6, 4), True),
        ("expanded", torch.randn(1, 4).expand(6, 4), False),
        ("inference tensor", inference, False),
    ]


@pytest.mark.parametrize(("name", "stream", "writable"), _views(), ids=[v[0] for v in _views()])
def test_copies_once_where_autograd_refuses(name, stream, writable):
    before, values = stream.detach().clone(), torch.ones(2, 4, requires_grad=True)
    y = scatter_rows(stream, torch.tensor([1, 4]), values)
    assert (y is stream) == writable
    assert writable or torch.equal(stream, before)
    assert torch.equal(y[[1, 4]], values) and torch.equal(y[[0, 2, 3, 5]], before[[0, 2, 3, 5]])
    y.square().sum().backward()
    assert torch.equal(values.grad, 2 * torch.ones(2, 4))


def test_writes_into_a_leaf_without_graph():
    stream = torch.zeros(3, 2, requires_grad=True)
    with torch.no_grad():
        y = scatter_rows(stream, torch.tensor([1]), torch.ones(1, 2))
    assert y.data_ptr() == stream.data_ptr() and torch.equal(stream[1], torch.ones(2))


def test_gather_may_be_overwritten_before_backward():
    leaf = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([0, 3])

    def layers(x):
        for _ in range(3):
            x = scatter_rows(x * 1 if x is leaf else x, rows, gather_rows(x, rows).sin())
        return x

    torch.autograd.gradcheck(layers, (leaf,))


def test_gradient_of_each_kind_of_row():
    x, values = torch.randn(5, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    constants = torch.randn(2, 3, requires_grad=True)
    y = scatter_rows(
        x,
        torch.tensor([0, 1]),
        values,
        constant_rows=torch.tensor([2, 3]),
        constant_values=constants,
        valid_N=torch.tensor([True, False]),
    )
    weight = torch.randn(5, 3)
    y.backward(weight)
    assert torch.equal(y[2:4], constants) and torch.equal(y[1], x[1]) and torch.equal(y[4], x[4])
    assert torch.equal(x.grad, torch.cat([torch.zeros(1, 3), weight[1:]]))
    assert torch.equal(values.grad, torch.stack([weight[0], torch.zeros(3)]))
    assert constants.grad is None


def test_rows_that_were_not_chosen_may_hold_anything():
    x, values = torch.randn(4, 3, requires_grad=True), torch.full((2, 3), torch.nan, requires_grad=True)
    y = scatter_rows(x, torch.tensor([0, 2]), values, valid_N=torch.tensor([False, False]))
    y.sum().backward()
    assert torch.equal(y, x) and torch.equal(x.grad, torch.ones(4, 3)) and torch.equal(values.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("name", ["bypass", "everything"])
def test_gradient_is_that_of_the_value_with_stopped_parts_pinned(name):
    """The reference's stopped parts, frozen at the point of evaluation, give a function whose derivative it is."""
    case = next(c for c in SPEC.cases if c.name == name)
    inputs = case.inputs(0, torch.float64)
    x0 = inputs["stream_NM"].detach()
    scale = inverse_rms_reference(x0, 1e-6)
    through = inputs["down_MR"] @ inputs["up_RM"]
    offset = torch.zeros_like(x0)
    constant = torch.zeros(len(x0), dtype=torch.bool)
    if "constant_rows" in inputs:
        constant[inputs["constant_rows"]] = True
        offset[inputs["constant_rows"]] = inputs["constant_values"] - x0[inputs["constant_rows"]]
    bypassed = torch.zeros(len(x0), dtype=torch.bool)
    bypassed[inputs["skipped_rows"]] = True
    chosen = inputs["rows_N"]
    valid = inputs.get("valid_N", torch.ones(len(chosen), dtype=torch.bool))
    bypassed[chosen[~valid]] = True
    bypassed &= ~constant

    def pinned(x, values):
        y = x + offset + torch.where(bypassed[:, None], (x * scale) @ through, 0)
        return y.index_copy(0, chosen[valid], values[valid])

    stream, values = inputs["stream_NM"], inputs["values_NM"]
    assert torch.autograd.gradcheck(pinned, (stream, values))
    weight = torch.randn_like(x0)
    expected = torch.autograd.grad(pinned(stream, values), [stream, values], weight)
    y = scatter_rows_reference(**inputs)
    torch.testing.assert_close(y, pinned(stream, values), rtol=1e-12, atol=1e-12)
    for found, wanted in zip(torch.autograd.grad(y, [stream, values], weight), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_distance_of_the_bypass_gradient_from_the_exact_one():
    """Dropped: the part of the gradient along x. Relative distance |cos(x, A·B·g)|, about 1/sqrt(M) for random maps."""
    width, rank, rows = 256, 16, 64
    x = torch.randn(rows, width, dtype=torch.float64, requires_grad=True)
    down, up = (torch.randn(s, dtype=torch.float64) / width**0.5 for s in ((width, rank), (rank, width)))
    g = torch.randn(rows, width, dtype=torch.float64)

    def exact_bypass(x):
        return (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()) @ down @ up

    (exact,) = torch.autograd.grad(exact_bypass(x), x, g)
    (approximate,) = torch.autograd.grad(bypass_reference(x, down, up, 1e-6) - x, x, g)
    distance = (approximate - exact).norm(dim=-1) / approximate.norm(dim=-1)
    cosine = torch.nn.functional.cosine_similarity(x.detach(), g @ up.T @ down.T, dim=-1).abs()
    torch.testing.assert_close(distance, cosine, rtol=1e-5, atol=1e-8)
    assert 0 < distance.mean() < 1.5 / width**0.5


def test_more_skipped_rows_than_one_chunk():
    rows = BYPASS_CHUNK_ROWS + 3
    x = torch.randn(rows, 2, requires_grad=True)
    down, up = torch.randn(2, 1), torch.randn(1, 2)
    none, skipped = torch.empty(0, dtype=torch.int64), torch.arange(rows)
    arguments = {"skipped_rows": skipped, "down_MR": down, "up_RM": up}
    y = scatter_rows(x, none, torch.empty(0, 2), **arguments)
    expected = scatter_rows_reference(x, none, torch.empty(0, 2), **arguments)
    torch.testing.assert_close(y, expected)
    weight = torch.randn(rows, 2)
    torch.testing.assert_close(*(torch.autograd.grad(t, x, weight)[0] for t in (y, expected)))


def test_backward_saves_no_rows_of_the_stream():
    x = torch.randn(40, 16, requires_grad=True) * 1
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        scatter_rows(
            x,
            torch.arange(8),
            torch.randn(8, 16, requires_grad=True),
            skipped_rows=torch.arange(20, 40),
            down_MR=torch.randn(16, 2),
            up_RM=torch.randn(2, 16),
        )
    per_row = [t for t in saved if t.is_floating_point() and len(t) == 20]
    assert [tuple(t.shape) for t in per_row] == [(20, 1)]
    assert not any(t.shape[-1] == 16 and len(t) > 2 for t in saved)


ROWS, VALUES = torch.tensor([1, 2]), torch.ones(2, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows_N": ROWS.int()}, "rows_N"),
        ({"values_NM": VALUES[:1]}, "values_NM"),
        ({"values_NM": VALUES.double()}, "values_NM"),
        ({"constant_rows": ROWS}, "together"),
        ({"down_MR": torch.ones(4, 1)}, "together"),
        ({"down_MR": torch.ones(4, 1), "up_RM": torch.ones(2, 4)}, "up_RM"),
        ({"down_MR": torch.ones(4, 1, requires_grad=True), "up_RM": torch.ones(1, 4)}, "constants"),
        ({"valid_N": torch.ones(2)}, "valid_N"),
        ({"stream_NM": torch.ones(4, 4, dtype=torch.int64)}, "stream_NM"),
    ],
)
def test_refuses_what_does_not_fit(changes, message):
    arguments = {"stream_NM": torch.zeros(4, 4), "rows_N": ROWS, "values_NM": VALUES, **changes}
    with pytest.raises(ValueError, match=message):
        scatter_rows(**arguments)
