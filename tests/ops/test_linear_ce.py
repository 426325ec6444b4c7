"""What linear_ce promises beyond equality with its reference."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lemo.ops import linear_ce, linear_ce_module
from lemo.ops.linear_ce.cases import SPEC
from lemo.ops.linear_ce.reference import linear_ce_reference
from lemo.testing import check_error_budget, outputs_and_gradients

CASES = [pytest.param(case, id=case.name) for case in SPEC.cases]


def _by_module(hidden_NM, weight_VM, labels_N, bias_V=None, **options):
    head = lambda x: nn.functional.linear(x, weight_VM, bias_V)  # noqa: E731
    return linear_ce_module(head, hidden_NM, labels_N, segment_rows=4, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_module_head_meets_the_reference(case, dtype):
    exact = outputs_and_gradients(linear_ce_reference, case.inputs(0, torch.float64), case.gradients)
    working = outputs_and_gradients(linear_ce_reference, case.inputs(0, dtype), case.gradients)
    actual = outputs_and_gradients(_by_module, case.inputs(0, dtype), case.gradients)
    for name in exact:
        check_error_budget(actual[name], working[name], exact[name], what=name)


def _inputs(rows=9, width=4, vocabulary=7, **options):
    hidden, weight = torch.randn(rows, width, **options), torch.randn(vocabulary, width, **options)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(vocabulary, (rows,))


@pytest.mark.parametrize("segment_rows", [1, 4, 9, 100])
def test_segments_change_nothing(segment_rows):
    hidden, weight, labels = _inputs(dtype=torch.float64)
    loss = linear_ce(hidden, weight, labels, segment_rows=segment_rows)
    expected = linear_ce(hidden, weight, labels)
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(*(torch.autograd.grad(t, [hidden, weight]) for t in (loss, expected)), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("run", [linear_ce, lambda h, w, y: _by_module(h, w, y)], ids=["plain", "module"])
def test_no_labels_give_zero_loss_and_zero_gradients(run):
    hidden, weight, labels = _inputs()
    loss = run(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0 and torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_num_items_of_zero_is_no_division_by_zero():
    hidden, weight, labels = _inputs()
    assert linear_ce(hidden, weight, torch.full_like(labels, -100), num_items=0) == 0
    assert linear_ce(hidden, weight, torch.full_like(labels, -100), num_items=torch.tensor(0)) == 0


def test_ignored_rows_never_reach_the_head():
    hidden, weight, labels = _inputs()
    with torch.no_grad():
        hidden[3:6] = torch.nan
    labels[3:6] = -100
    loss = linear_ce(hidden, weight, labels)
    loss.backward()
    assert loss.isfinite() and hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    assert torch.equal(hidden.grad[3:6], torch.zeros(3, 4))


class _Operators(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("run", [linear_ce, _by_module], ids=["plain", "module"])
def test_a_promise_of_labels_changes_nothing_and_counts_no_rows(run):
    hidden, weight, labels = _inputs()
    expected = run(hidden, weight, labels)
    with _Operators() as operators:
        loss = run(hidden, weight, labels, ignore_index=None)
    assert "nonzero" not in operators.names and torch.equal(loss, expected)
    for found, wanted in zip(*(torch.autograd.grad(t, [hidden, weight]) for t in (loss, expected)), strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(
        linear_ce_reference(hidden, weight, labels, ignore_index=None), linear_ce_reference(hidden, weight, labels)
    )


@pytest.mark.parametrize("run", [linear_ce, _by_module], ids=["plain", "module"])
def test_a_broken_promise_of_labels_is_refused_on_the_cpu(run):
    hidden, weight, labels = _inputs()
    labels[2] = -100
    with pytest.raises(ValueError, match="promises that every row carries a token"):
        run(hidden, weight, labels, ignore_index=None)


def test_two_forwards_before_two_backwards():
    hidden, weight, labels = _inputs(dtype=torch.float64)
    other = torch.randn_like(hidden).requires_grad_()
    expected = [torch.autograd.grad(linear_ce(h, weight, labels), [h, weight]) for h in (hidden, other)]
    first, second = linear_ce(hidden, weight, labels), linear_ce(other, weight, labels)
    assert all(map(torch.equal, torch.autograd.grad(second, [other, weight]), expected[1]))
    assert all(map(torch.equal, torch.autograd.grad(first, [hidden, weight], retain_graph=True), expected[0]))
    assert all(map(torch.equal, torch.autograd.grad(first, [hidden, weight]), expected[0]))


def test_incoming_gradient_scales():
    hidden, weight, labels = _inputs(dtype=torch.float64)
    plain = torch.autograd.grad(linear_ce(hidden, weight, labels), [hidden, weight])
    scaled = torch.autograd.grad(linear_ce(hidden, weight, labels) * 7, [hidden, weight])
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(7 * a, b)


def test_scale_is_not_rounded_to_the_working_dtype():
    """1/num_items is no bf16 number; rounding it would shrink or grow every gradient alike."""
    hidden, weight, labels = _inputs(rows=64, width=32, dtype=torch.bfloat16)
    (found,) = torch.autograd.grad(linear_ce(hidden, weight, labels, num_items=1021), hidden)
    (unscaled,) = torch.autograd.grad(linear_ce(hidden, weight, labels, num_items=1), hidden)
    ratio = (found.double().norm() * 1021 / unscaled.double().norm()).item()
    assert abs(ratio - 1) < 2e-4


def test_under_no_grad_nothing_is_kept():
    hidden, weight, labels = _inputs()
    with torch.no_grad():
        loss = linear_ce(hidden, weight, labels)
        module = _by_module(hidden, weight, labels)
    assert not loss.requires_grad and not module.requires_grad
    torch.testing.assert_close(loss, linear_ce_reference(hidden, weight, labels).detach())


def test_frozen_head_gets_no_gradient_and_none_is_stored():
    hidden, weight, labels = _inputs()
    weight.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = linear_ce(hidden, weight, labels)
    loss.backward()
    assert weight.grad is None and weight.shape not in [t.shape for t in saved]


def test_logits_exist_for_one_segment_at_a_time(monkeypatch):
    hidden, weight, labels = _inputs(rows=40)
    seen = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, *a: seen.append(len(x)) or linear(x, *a))
    linear_ce(hidden, weight, labels, segment_rows=16).backward()
    assert seen == [16, 16, 8]


def test_tied_head():
    weight, ids, labels = torch.randn(7, 4, dtype=torch.float64), torch.randint(7, (9,)), torch.randint(7, (9,))
    grads = []
    for run in (linear_ce, linear_ce_reference):
        tied = weight.clone().requires_grad_()
        run(nn.functional.embedding(ids, tied).sin(), tied, labels).backward()
        grads.append(tied.grad)
    torch.testing.assert_close(*grads)


def test_autocast_uses_its_dtype():
    hidden, weight, labels = _inputs(rows=32, width=16)
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = (run(hidden, weight, labels) for run in (linear_ce, linear_ce_reference))
    exact = outputs_and_gradients(
        linear_ce_reference,
        {
            "hidden_NM": hidden.detach().double().requires_grad_(),
            "weight_VM": weight.detach().double(),
            "labels_N": labels,
        },
        ("hidden_NM",),
    )
    assert loss.dtype == torch.float32
    (found,), (working,) = (torch.autograd.grad(t, hidden) for t in (loss, expected))
    assert found.dtype == torch.float32
    check_error_budget(loss, expected, exact["output 0"])
    incoming = torch.randn((), generator=torch.Generator().manual_seed(1), dtype=torch.float64).bfloat16().double()
    check_error_budget(found * incoming, working * incoming, exact["gradient of hidden_NM"], ulps=2**14)


def test_flop_formula_counts_matrix_products():
    case = next(c for c in SPEC.cases if c.name == "trainable head")
    inputs = case.inputs(0, torch.float32)
    with FlopCounterMode(display=False) as counter:
        linear_ce_reference(**inputs).backward()
    assert SPEC.flops(inputs) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels_N": torch.zeros(3, dtype=torch.int64)}, "one per row"),
        ({"labels_N": torch.zeros(9)}, "integers"),
        ({"weight_VM": torch.zeros(7, 5)}, "weight_VM"),
        ({"bias_V": torch.zeros(4)}, "bias_V"),
        ({"segment_rows": 0}, "segment_rows"),
    ],
)
def test_refuses_what_does_not_fit(changes, message):
    hidden, weight, labels = _inputs()
    with pytest.raises(ValueError, match=message):
        linear_ce(**{"hidden_NM": hidden, "weight_VM": weight, "labels_N": labels, **changes})


def test_segments_are_chosen_by_their_bytes(monkeypatch):
    """A segment's logits stay below the limit, whatever the vocabulary; large ones come in steps of 256 rows."""
    from lemo.ops.linear_ce import op

    hidden = torch.zeros(1, 4, dtype=torch.bfloat16)
    for vocabulary in (1, 300, 32000, 128256, 1 << 29):
        for backend, bytes_each in (("triton", 2), ("reference", 6)):
            rows = op._fitting_rows(hidden, vocabulary, None, backend)
            assert rows >= 1 and (rows == 1 or rows * vocabulary * bytes_each <= op.SEGMENT_BYTES)
            assert (rows + 256) * vocabulary * bytes_each > op.SEGMENT_BYTES
    assert op._fitting_rows(hidden, 128256, None, "triton") == 2048
    seen = []
    shape_of = op._segment_loss
    monkeypatch.setattr(op, "_segment_loss", lambda z, *rest: seen.append(len(z)) or shape_of(z, *rest))
    monkeypatch.setattr(op, "SEGMENT_BYTES", 4 * 7 * (4 + 4))
    linear_ce(*_inputs())
    assert seen == [4, 4, 1]


def test_a_second_derivative_is_refused():
    """Gradients are saved outputs: differentiating them would leave out all but the incoming gradient."""
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    labels = torch.randint(0, 11, (6,))
    with pytest.raises(RuntimeError, match=r"linear_ce has no second derivative.*create_graph=True"):
        torch.autograd.grad(linear_ce(hidden, weight, labels), (hidden, weight), create_graph=True)
    assert all(g.any() for g in torch.autograd.grad(linear_ce(hidden, weight, labels), (hidden, weight)))
