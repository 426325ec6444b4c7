"""Ops on rows without autograd: their gradients are those of their values, and what they promise about memory."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import lemo.ops
from lemo.errors import BackendError
from lemo.ops import (
    bypass_rows_,
    bypass_rows_backward_,
    gated_act,
    gated_act_backward,
    norm_rows,
    norm_rows_backward,
    rope_rows_,
    scatter_rows,
    write_rows_,
)
from lemo.ops.gated_act.reference import ACTS, LowRank, gated_act_reference
from lemo.ops.norm_rows.reference import norm_rows_reference
from lemo.ops.rope_rows.reference import rope_rows_reference


def _draw(*shape, **options):
    return torch.randn(*shape, dtype=torch.float64, **options)


# ---- norm_rows


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_meets_torch(kind):
    x, weight, bias = _draw(9, 12), _draw(12), _draw(12)
    rows = torch.tensor([1, 4, 8])
    normed, kept, rstd, mean = norm_rows(x, weight, bias_M=bias, rows_n=rows, eps=1e-3, kind=kind, keep_rows=True)
    if kind == "layer":
        torch.testing.assert_close(normed, F.layer_norm(x[rows], (12,), weight, bias, 1e-3))
        torch.testing.assert_close(mean, x[rows].mean(1))
    else:
        torch.testing.assert_close(normed, F.rms_norm(x[rows], (12,), weight, 1e-3) + bias)
        assert mean is None
    assert torch.equal(kept, x[rows]) and kept.data_ptr() != x.data_ptr()
    again = norm_rows(kept, weight, bias_M=bias, eps=1e-3, kind=kind, keep_rows=True)
    assert torch.equal(again[0], normed) and torch.equal(again[2], rstd) and again[1].data_ptr() == kept.data_ptr()


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_gradient_is_that_of_its_value(kind):
    x, weight, bias = (_draw(*s, requires_grad=True) for s in ((5, 8), (8,), (8,)))
    normed, _, rstd, mean = norm_rows_reference(x, weight, bias_M=bias, eps=1e-3, kind=kind)
    grad, residual = _draw(5, 8), _draw(5, 8)
    wanted = torch.autograd.grad(normed, [x, weight, bias], grad)
    saved = {"mean_n": None if mean is None else mean.detach(), "residual_nM": residual}
    found = norm_rows_backward(
        grad, x.detach(), weight.detach(), rstd.detach(), **saved, weight_grad=True, bias_grad=True
    )
    assert found[0] is not None and found[0].data_ptr() == grad.data_ptr()
    torch.testing.assert_close(found[0], wanted[0] + residual)
    torch.testing.assert_close(found[1], wanted[1])
    torch.testing.assert_close(found[2], wanted[2])


def test_norm_gradient_is_written_to_its_rows_only():
    x, weight, grad = _draw(3, 8), _draw(8), _draw(3, 8)
    rstd = norm_rows(x, weight, eps=1e-3)[2]
    out, rows = _draw(2, 5, 8), torch.tensor([7, 0, 4])
    before, grad_before = out.clone(), grad.clone()
    assert norm_rows_backward(grad, x, weight, rstd, out_NM=out, out_rows_n=rows) == (None, None, None)
    assert torch.equal(grad, grad_before)
    compact = norm_rows_backward(grad, x, weight, rstd)[0]
    assert torch.equal(out.view(10, 8)[rows], compact)
    others = torch.ones(10, dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(out.view(10, 8)[others], before.view(10, 8)[others])


# ---- rope_rows_


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_transpose_is_the_gradient(interleaved):
    state, cos, sin = _draw(4, 3, 12, requires_grad=True), _draw(9, 8), _draw(9, 8)
    rows = torch.tensor([2, 5, 14, 20])
    options = {"rows_N": rows, "interleaved": interleaved}
    grad = _draw(4, 3, 12)
    wanted = torch.autograd.grad(rope_rows_reference(state, cos, sin, **options), state, grad)[0]
    rope_rows_(grad, cos, sin, inverse=True, **options)
    torch.testing.assert_close(grad, wanted)


def test_rope_meets_the_formula_of_models():
    state, angle = _draw(6, 2, 8), _draw(3, 4).repeat(1, 2)
    rows = torch.tensor([0, 1, 2, 5, 7, 9])
    cos, sin = (t[rows % 3][:, None] for t in (angle.cos(), angle.sin()))
    half = torch.cat([-state[..., 4:], state[..., :4]], -1)
    wanted = state * cos + half * sin
    undone = state.clone()
    rope_rows_(state, angle.cos(), angle.sin(), rows_N=rows)
    torch.testing.assert_close(state, wanted)
    rope_rows_([state], angle.cos(), angle.sin(), rows_N=rows, inverse=True)
    torch.testing.assert_close(state, undone)


def test_interleaved_pairs_are_neighbours():
    """The same rotation, once the dimensions are sorted into even and odd ones."""
    state, cos, sin = _draw(5, 2, 8), _draw(5, 8), _draw(5, 8)
    sorted_ = torch.cat([state[..., 0::2], state[..., 1::2]], -1).contiguous()
    rope_rows_(sorted_, cos, sin)
    rope_rows_(state, cos, sin, interleaved=True)
    torch.testing.assert_close(torch.cat([state[..., 0::2], state[..., 1::2]], -1), sorted_)


# ---- gated_act


@pytest.mark.parametrize(("act", "gated"), list(itertools.product(ACTS, [True, False])))
def test_activation_gradient_is_that_of_its_value(act, gated):
    gate, up = (_draw(4, 6, requires_grad=True) for _ in range(2))
    grad = _draw(4, 6)
    value = gated_act_reference(gate, up if gated else None, act)
    wanted = torch.autograd.grad(value, [gate, up] if gated else [gate], grad)
    found = gated_act_backward(grad, gate.detach(), up.detach() if gated else None, act, want_act=True)
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[2], value.detach())
    if gated:
        torch.testing.assert_close(found[1], wanted[1])


def test_reused_memory_holds_the_results():
    grad, gate, up = (_draw(4, 6) for _ in range(3))
    fresh = gated_act_backward(grad, gate, up, "silu", want_act=True)
    owners = gate, up, grad
    reused = gated_act_backward(grad, gate, up, "silu", want_act=True, reuse=True)
    for new, owner, expected in zip(reused, owners, fresh, strict=True):
        assert new.data_ptr() == owner.data_ptr() and torch.equal(new, expected)


def test_activation_may_overwrite_its_input():
    gate, up = _draw(4, 6), _draw(4, 6)
    wanted = gated_act(gate, up, "gelu")
    assert gated_act(gate, up, "gelu", out=gate) is gate and torch.equal(gate, wanted)


# ---- stream_rows


def test_bypass_and_its_gradient_are_those_of_scatter_rows():
    stream, down, up = _draw(3, 7, 8), _draw(8, 3), _draw(3, 8)
    rows = torch.tensor([0, 3, 11, 20])
    source = stream.clone().requires_grad_()
    nobody = torch.empty(0, dtype=torch.int64)
    wanted = scatter_rows(
        source, nobody, _draw(0, 8), skipped_rows=rows, down_MR=down, up_RM=up, eps=1e-3, inplace=False
    )
    rstd = bypass_rows_(stream, rows, down, up, eps=1e-3)
    torch.testing.assert_close(stream, wanted.detach())
    grad = _draw(3, 7, 8)
    wanted_grad = torch.autograd.grad(wanted, source, grad)[0]
    bypass_rows_backward_(grad, rows, rstd, down, up)
    torch.testing.assert_close(grad, wanted_grad)


def test_rows_left_alone_are_left_alone():
    stream, down, up = _draw(9, 8), _draw(8, 3), _draw(3, 8)
    stream[4] = torch.nan
    before, rows = stream.clone(), torch.tensor([1, 4, 6])
    applied = torch.tensor([True, False, True])
    rstd = bypass_rows_(stream, rows, down, up, apply_s=applied)
    assert rstd[1] == 0 and (rstd[[0, 2]] > 0).all()
    left = [i for i in range(9) if i not in (1, 6)]
    assert torch.equal(stream[left].nan_to_num(7.0), before[left].nan_to_num(7.0))
    assert not torch.isclose(stream[[1, 6]], before[[1, 6]]).all()
    grad = _draw(9, 8)
    grad_before = grad.clone()
    bypass_rows_backward_(grad, rows, rstd, down, up)
    assert torch.equal(grad[left], grad_before[left])


def test_write_touches_valid_rows_only():
    stream, values, residual = _draw(9, 8), _draw(3, 8), _draw(3, 8)
    before, rows = stream.clone(), torch.tensor([7, 2, 5])
    write_rows_(stream, rows, values, residual_nM=residual, valid_n=torch.tensor([True, True, False]))
    assert torch.equal(stream[[7, 2]], (values + residual)[:2])
    left = [i for i in range(9) if i not in (7, 2)]
    assert torch.equal(stream[left], before[left])


def test_entries_that_are_not_valid_may_share_a_row():
    stream, values = _draw(9, 8), _draw(5, 8)
    before, rows = stream.clone(), torch.tensor([3, 8, 0, 8, 8])
    write_rows_(stream, rows, values, valid_n=rows != 8)
    assert torch.equal(stream[[3, 0]], values[[0, 2]])
    left = [i for i in range(9) if i not in (3, 0)]
    assert torch.equal(stream[left], before[left])


# ---- what is refused

FIT = {
    "norm_rows": lambda: {"x_NM": torch.zeros(4, 6), "weight_M": torch.zeros(6), "eps": 1e-6},
    "norm_rows_backward": lambda: {
        "grad_nM": torch.zeros(4, 6), "x_nM": torch.zeros(4, 6), "weight_M": torch.zeros(6), "rstd_n": torch.zeros(4),
    },
    "rope_rows_": lambda: {"state_NHD": torch.zeros(4, 2, 6), "cos_PR": torch.ones(3, 4), "sin_PR": torch.ones(3, 4)},
    "gated_act": lambda: {"gate_nF": torch.zeros(4, 6), "up_nF": torch.zeros(4, 6), "act": "silu"},
    "gated_act_backward": lambda: {
        "grad_nF": torch.zeros(4, 6), "gate_nF": torch.zeros(4, 6), "up_nF": None, "act": "silu",
    },
    "write_rows_": lambda: {
        "stream_NM": torch.zeros(4, 6), "rows_n": torch.arange(2), "values_nM": torch.zeros(2, 6),
    },
    "bypass_rows_": lambda: {
        "stream_NM": torch.zeros(4, 6), "rows_s": torch.arange(2),
        "down_MR": torch.zeros(6, 3), "up_RM": torch.zeros(3, 6),
    },
    "bypass_rows_backward_": lambda: {
        "grad_NM": torch.zeros(4, 6), "rows_s": torch.arange(2), "rstd_s": torch.zeros(2),
        "down_MR": torch.zeros(6, 3), "up_RM": torch.zeros(3, 6),
    },
}  # fmt: skip
WIDE = torch.float64
UNFIT = [
    ("norm_rows", {"x_NM": torch.zeros(6, 4).mT}, "contiguous"),
    ("norm_rows", {"weight_M": torch.zeros(5)}, "weight_M"),
    ("norm_rows", {"rows_n": torch.arange(2, dtype=torch.int32)}, "int64"),
    ("norm_rows", {"kind": "batch"}, "kind"),
    ("norm_rows_backward", {"x_nM": torch.zeros(3, 6)}, "x_nM"),
    ("norm_rows_backward", {"rstd_n": torch.zeros(4, dtype=WIDE)}, "rstd_n"),
    ("norm_rows_backward", {"out_rows_n": torch.arange(4)}, "out_NM"),
    ("norm_rows_backward", {"out_NM": torch.zeros(9, 6), "out_rows_n": torch.arange(3)}, "rows"),
    ("rope_rows_", {"state_NHD": torch.zeros(4, 2, 3)}, "D >= 4"),
    ("rope_rows_", {"state_NHD": torch.zeros(2, 4, 6).transpose(0, 1)}, "inside rows"),
    ("rope_rows_", {"sin_PR": torch.ones(3, 2)}, "sin_PR"),
    ("rope_rows_", {"rows_N": torch.arange(5)}, "rows_N"),
    ("rope_rows_", {"state_NHD": []}, "no state"),
    ("gated_act", {"act": "swish"}, "act must"),
    ("gated_act", {"up_nF": torch.zeros(4, 6, dtype=WIDE)}, "up_nF"),
    ("gated_act", {"gate_nF": torch.zeros(6, 4).mT}, "inside rows"),
    ("gated_act", {"adapters": (LowRank(torch.zeros(4, 2), torch.zeros(5, 2)), None)}, "second_FR of gate"),
    ("gated_act", {"adapters": (None, LowRank(torch.zeros(4, 2), torch.zeros(6, 2).mT))}, "second_FR of up"),
    ("gated_act", {"adapters": (None, LowRank(torch.zeros(4, 65), torch.zeros(6, 65)))}, "rank 64 and less"),
    ("gated_act", {"up_nF": None, "adapters": (None, LowRank(torch.zeros(4, 2), torch.zeros(6, 2)))}, "needs up_nF"),
    ("gated_act_backward", {"grad_nF": torch.zeros(4, 5)}, "grad_nF"),
    ("write_rows_", {"values_nM": torch.zeros(3, 6)}, "values_nM"),
    ("write_rows_", {"valid_n": torch.zeros(2)}, "bool"),
    ("bypass_rows_", {"up_RM": torch.zeros(3, 6, dtype=WIDE)}, "up_RM"),
    ("bypass_rows_", {"apply_s": torch.ones(3, dtype=torch.bool)}, "apply_s"),
    ("bypass_rows_backward_", {"rstd_s": torch.zeros(2, dtype=WIDE)}, "rstd_s"),
]


@pytest.mark.parametrize(("op", "changes", "message"), UNFIT)
def test_refuses_what_does_not_fit(op, changes, message):
    run = getattr(lemo.ops, op)
    run(**FIT[op]())
    with pytest.raises(ValueError, match=message):
        run(**{**FIT[op](), **changes})


@pytest.mark.parametrize("op", FIT)
def test_kernel_that_cannot_run_is_not_replaced(op):
    with pytest.raises(BackendError, match=op):
        getattr(lemo.ops, op)(**FIT[op](), backend="triton")
