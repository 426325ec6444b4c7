"""attend_forward and attend_backward on a CUDA device: every backend against the fp32 reference, bf16."""

from __future__ import annotations

import pytest
import torch

from lemo.ops import attend_backward, attend_forward, plan_rows
from lemo.ops.attend_rows import stripes, vendor
from lemo.ops.attend_rows.cases import Shape, segments_of
from lemo.ops.attend_rows.cuts import Cut
from lemo.ops.attend_rows.reference import Segments, attend_backward_reference, attend_rows_reference
from lemo.testing import Case, check_error_budget

pytestmark = pytest.mark.gpu

# Units of bf16 for sums of products whose factors were rounded to it, and of fp32 for the log-sum-exp.
ULPS, LSE_ULPS = 4.0, 64.0
SHAPES = {
    "grouped": Shape(documents=(3000,), block=64, heads=8, groups=2, head_dim=128, order="NHD"),
    "one head a group": Shape(documents=(2100,), block=64, heads=4, groups=4, head_dim=128, order="NHD"),
    "head dimension 64": Shape(documents=(2500,), heads=6, groups=2, head_dim=64, order="NHD", share=0.3),
    "packed": Shape(documents=(1500, 64, 1, 900), block=16, heads=4, groups=2, head_dim=128, order="NHD"),
    "gaps between documents": Shape(documents=(900, 700), gap=37, heads=4, groups=2, head_dim=128, order="NHD"),
    "long runs": Shape(documents=(6000, 2000), share=0.25, block=300, heads=4, groups=2, head_dim=128, order="NHD"),
    "heads outside": Shape(documents=(1300,), block=64, heads=4, groups=2, head_dim=128),
}
NAMES = ("output", "lse", "dq", "dk", "dv")


def _drawn(name: str, compact: bool) -> tuple[list[torch.Tensor], Segments, Segments, float]:
    shape = SHAPES[name]
    inputs = Case(name, shape.inputs).inputs(0, torch.bfloat16, "cuda")
    queries, keys = segments_of(inputs)
    tensors = [inputs[n].detach() for n in ("query_HND", "key_GKD", "value_GKD")]
    if compact:
        count = tensors[0].shape[1]
        tensors, keys = [tensors[0], *(t[:, -count:] for t in tensors[1:])], queries
    return tensors, queries, keys, inputs["scaling"]


def _reference(grad: torch.Tensor, tensors: list[torch.Tensor], queries, keys, scaling: float, dtype: torch.dtype):
    cast = [t.to(dtype) for t in tensors]
    saved = attend_rows_reference(*cast, queries, keys, scaling=scaling)
    return *saved, *attend_backward_reference((grad.to(dtype), *cast, *saved), queries, keys, scaling=scaling)


def _check(found, grad, tensors, queries, keys, scaling: float) -> None:
    exact = _reference(grad, tensors, queries, keys, scaling, torch.float64)
    working = _reference(grad, tensors, queries, keys, scaling, torch.bfloat16)
    for name, actual, near, wanted in zip(NAMES, found, working, exact, strict=True):
        assert actual.dtype == (torch.float32 if name == "lse" else torch.bfloat16)
        check_error_budget(actual, near.to(actual.dtype), wanted, ulps=LSE_ULPS if name == "lse" else ULPS, what=name)
        if name != "lse":
            assert actual.transpose(0, 1).flatten(1).data_ptr() == actual.data_ptr()


def _both_passes(grad, tensors, queries, keys, scaling: float, backend):
    options = {"scaling": scaling, "backend": backend}
    saved = attend_forward(*tensors, queries, keys, **options)
    return *saved, *attend_backward(grad, *tensors, *saved, queries, keys, **options)


@pytest.mark.parametrize("backend", ["vendor", "triton", "auto"])
@pytest.mark.parametrize("name", SHAPES)
def test_compact_attention(name, backend):
    if name == "gaps between documents" and backend == "vendor":
        pytest.skip("the vendors' kernels want documents end to end")
    tensors, queries, keys, scaling = _drawn(name, True)
    grad = torch.randn_like(tensors[0])
    _check(_both_passes(grad, tensors, queries, keys, scaling, backend), grad, tensors, queries, keys, scaling)


@pytest.mark.parametrize("planned", [True, False], ids=["planned", "unplanned"])
@pytest.mark.parametrize("backend", ["vendor", "triton", "auto"])
@pytest.mark.parametrize("name", SHAPES)
def test_kept_queries_on_all_keys(name, backend, planned):
    tensors, queries, keys, scaling = _drawn(name, False)
    grad = torch.randn_like(tensors[0])
    # Small enough that several rectangles are not empty.
    rows = plan_rows(queries, keys, Cut(256, 512, 128, 100)) if planned else queries
    _check(_both_passes(grad, tensors, rows, keys, scaling, backend), grad, tensors, queries, keys, scaling)


@pytest.mark.parametrize("first", ["ours", "torch"])
def test_graphs_of_other_code_on_the_same_sizes(first):
    """torch keeps cuDNN's backward without the layout of the gradient: neither takes the other's."""
    tensors, queries, _, scaling = _drawn("one head a group", True)
    if first == "ours":  # sizes that the other order has not met
        tensors = [t[:, :-64] for t in tensors]
        queries = Segments((0,), (tensors[0].shape[1],), queries.position_N[:-64])
    grad = torch.randn(tensors[0].shape, dtype=torch.bfloat16, device="cuda")

    def theirs():
        leaves = [t[None].requires_grad_() for t in tensors]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            output = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, scale=scaling)
        return torch.autograd.grad(output, leaves, grad[None])

    def ours():
        return _both_passes(grad, tensors, queries, queries, scaling, "vendor")

    assert grad.stride() != tensors[0].stride()
    found, other = (ours(), theirs()) if first == "ours" else (theirs(), ours())[::-1]
    _check(found, grad, tensors, queries, queries, scaling)
    exact = _reference(grad, tensors, queries, queries, scaling, torch.float64)
    for got, wanted in zip(other, exact[2:], strict=True):
        assert float((got[0] - wanted).norm() / wanted.norm()) < 0.02


def test_every_kernel_of_rectangles():
    from lemo.ops.attend_rows.tiling import Work

    tensors, queries, keys, scaling = _drawn("grouped", False)
    grad = torch.randn_like(tensors[0])
    marks = plan_rows(queries, keys, Cut(256, 512, 128, 100)).marks
    kernels = vendor.dense_kernels(torch.bfloat16, 128, tensors[0].device)
    assert kernels
    for dense in kernels:
        work, pair = Work.between(queries, keys), (tensors[1], tensors[2])
        saved = stripes.forward(tensors[0], pair, work, marks, scaling, dense)
        found = (*saved, *stripes.backward((grad, *tensors, *saved), work, marks, scaling, dense))
        _check(found, grad, tensors, queries, keys, scaling)


@pytest.mark.parametrize("backend", ["vendor", "triton"])
def test_own_rows_and_wider_passes(backend):
    """The `rows` and `pairs` gradients of exact forward."""
    (query, key, value), queries, keys, scaling = _drawn("grouped", False)
    grad = torch.randn_like(query)
    own = tuple(t[:, queries.position_N] for t in (key, value))
    exact = [t.double() for t in (grad, query, key, value)]
    saved = attend_rows_reference(*exact[1:], queries, keys, scaling=scaling)
    near = tuple(t.to(s) for t, s in zip(saved, (torch.bfloat16, torch.float32), strict=True))
    options = {"scaling": scaling, "backend": backend}
    planned = plan_rows(queries, keys)
    found = attend_backward(grad, query, key, value, *near, planned, keys, own=own, **options)
    wanted = attend_backward_reference(
        (*exact, *saved), queries, keys, scaling=scaling, own=tuple(t.double() for t in own)
    )
    pairs = attend_backward(grad, query, *own, *near, queries, queries, **options)
    wanted_pairs = attend_backward_reference(
        (*exact[:2], *(t.double() for t in own), *saved), queries, queries, scaling=scaling
    )
    for actual, exactly in zip((*found, *pairs), (*wanted, *wanted_pairs), strict=True):
        error = (actual.double() - exactly).norm() / exactly.norm()
        assert float(error) < 0.01


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "all keys"])
def test_nothing_waits_for_the_device_in_a_layer(compact):
    tensors, queries, keys, scaling = _drawn("packed", compact)
    grad = torch.randn_like(tensors[0])
    _both_passes(grad, tensors, queries, keys, scaling, "auto")  # probes and tables
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _both_passes(grad, tensors, queries, keys, scaling, "auto")
        if not compact:
            plan_rows(queries, keys)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_deterministic_algorithms_rule_the_vendors_out():
    tensors, queries, keys, scaling = _drawn("packed", True)
    grad = torch.randn_like(tensors[0])
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (_both_passes(grad, tensors, queries, keys, scaling, "auto") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["vendor", "triton"])
@pytest.mark.parametrize("compact", [True, False], ids=["compact", "all keys"])
def test_rows_that_are_not_valid_do_not_count(compact, backend):
    (query, key, value), _, keys, scaling = _drawn("grouped", False)
    alive = 1100
    position = torch.randperm(keys.lengths[0], device="cuda")[: query.shape[1]]
    position = torch.cat([position[:alive].sort().values, position[alive:]])
    valid = torch.arange(query.shape[1], device="cuda") < alive
    rows = Segments((0,), (query.shape[1],), position, valid)
    few = Segments((0,), (alive,), position[:alive])
    if compact:
        key, value = key[:, position], value[:, position]
    grad = torch.randn_like(query) * valid[:, None]
    others = rows if compact else keys
    planned = rows if compact else plan_rows(rows, keys, Cut(256, 512, 128, 100))
    output, lse, d_query, *pair = _both_passes(grad, [query, key, value], planned, others, scaling, backend)
    kept = [query[:, :alive], *(t[:, :alive] if compact else t for t in (key, value))]
    assert not any(t[:, alive:].any() for t in (d_query, *(pair if compact else ())))
    found = [output[:, :alive], lse[:, :alive], d_query[:, :alive], *(t[:, : kept[1].shape[1]] for t in pair)]
    _check(found, grad[:, :alive], kept, few, few if compact else keys, scaling)
