"""attend_local on a CUDA device: both kernel paths at shapes of many tiles, and in the runtime, without waiting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lemo.ops import attend_local, attend_local_backward, plan_local
from lemo.ops.attend_local import pieces, vendor
from lemo.ops.attend_local.cases import (
    backward_case,
    local_case,
    local_of,
    operands_of,
    reference,
    reference_backward,
    run,
    run_backward,
)
from lemo.ops.attend_rows.reference import Segments
from lemo.testing import check_error_budget, poisoned_allocations
from tests.gpu.test_fused_gpu import adapted, step
from tests.runtime.oracle import batch
from tests.runtime.test_fused import plan_of

pytestmark = pytest.mark.gpu

WHOLE = {"share": 1.0, "compact": True, "order": "NHD"}
SHAPES = {
    "head dimension 64": {"documents": (3000,), "chunk": 512, "sink": 64, "heads": 6, "groups": 2, "head_dim": 64},
    "head dimension 128": {"documents": (2900,), "chunk": 512, "sink": 64, "heads": 8, "groups": 2, "head_dim": 128},
    "one key head a query head": {"documents": (2048,), "chunk": 512, "sink": 64, "heads": 4, "groups": 4},
    "whole chunks": {"documents": (4096,), "chunk": 1024, "sink": 64, "heads": 4, "groups": 1, "head_dim": 128},
    "ragged": {"documents": (1300, 64, 1, 517, 2049, 700), "chunk": 512, "sink": 64, "heads": 4, "groups": 2},
    "sink of 16": {"documents": (2500,), "chunk": 512, "sink": 16, "heads": 2, "groups": 1, "head_dim": 128},
}
KERNEL_ONLY = {
    "small chunks": {"documents": (1500, 200), "chunk": 48, "sink": 16, "heads": 2, "groups": 1, "head_dim": 64},
    "gaps between documents": {"documents": (1300, 700), "gap": 37, "chunk": 512, "sink": 64, "compact": False},
    "some rows": {"documents": (3000, 900), "share": 0.4, "block": 64, "chunk": 512, "sink": 64, "head_dim": 128},
    "some rows on all keys": {
        "documents": (3000,),
        "share": 0.4,
        "block": 64,
        "chunk": 256,
        "sink": 64,
        "compact": False,
    },
    "window": {"documents": (2000,), "chunk": 256, "sink": 64, "window": 700, "head_dim": 64},
}


def _agrees(name, options, dtype, backend):
    case = local_case(name, **({"head_dim": 64} | WHOLE | options))
    exact = reference(**case.inputs(0, torch.float64, "cuda"))
    working = reference(**case.inputs(0, dtype, "cuda"))
    found = run(**case.inputs(0, dtype, "cuda"), backend=backend)
    for what, got, near, wanted in zip(("output", "lse"), found, working, exact, strict=True):
        assert got.isfinite().all()
        check_error_budget(got, near, wanted, ulps=8.0, what=f"{name}, {backend}: {what}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "vendor"])
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_meet_their_reference(name, backend, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    _agrees(name, SHAPES[name], dtype, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KERNEL_ONLY)
def test_rows_that_only_our_kernel_takes(name, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    _agrees(name, KERNEL_ONLY[name], dtype, "triton")


BACKWARD = {
    "head dimension 64": {"documents": (3000,), "chunk": 512, "sink": 64, "heads": 6, "groups": 2},
    "head dimension 128": {"documents": (2900,), "chunk": 512, "sink": 64, "heads": 8, "groups": 2, "head_dim": 128},
    "all rows": {"documents": (4096,), "share": 1.0, "compact": True, "chunk": 1024, "sink": 64, "head_dim": 128},
    "empty chunks": {"documents": (9000,), "share": 0.04, "chunk": 512, "sink": 64, "heads": 4, "groups": 1},
    "packed": {"documents": (1300, 64, 1, 517, 2049, 700), "chunk": 512, "sink": 64, "heads": 4, "groups": 2},
    "gaps between documents": {"documents": (1300, 1700), "gap": 37, "chunk": 512, "sink": 64, "heads": 2, "groups": 1},
    "chunks of no whole tiles": {"documents": (3000, 900), "chunk": 600, "sink": 48, "heads": 4, "groups": 2},
    "one key head a query head": {"documents": (2600,), "chunk": 512, "sink": 64, "heads": 4, "groups": 4},
    "output of all keys": {
        "documents": (4000, 700),
        "chunk": 512,
        "sink": 64,
        "heads": 4,
        "groups": 2,
        "saw_all": True,
    },
    "many queries": {"documents": (7000,), "share": 0.9, "chunk": 512, "sink": 64, "heads": 3, "groups": 1},
}
BACKWARD_KERNEL_ONLY = {
    "small chunks": {"documents": (1500, 200), "chunk": 48, "sink": 16, "heads": 2, "groups": 1},
    "a tile of one chunk": {"documents": (1000,), "chunk": 128, "sink": 128, "heads": 2, "groups": 1},
    "some rows among themselves": {"documents": (3000, 900), "compact": True, "chunk": 512, "sink": 64},
    "window of two chunks and more": {"documents": (2000,), "chunk": 256, "sink": 64, "window": 700},
    "window between one chunk and two": {"documents": (2000,), "chunk": 256, "sink": 64, "window": 400},
    "window shorter than a chunk": {"documents": (2000,), "chunk": 256, "sink": 64, "window": 200},
}


def _backward_case(name, options):
    return backward_case(name, **({"head_dim": 64, "order": "NHD", "block": 64} | options))


def _backward_agrees(name, options, dtype, backend):
    case = _backward_case(name, options)
    exact = reference_backward(**case.inputs(0, torch.float64, "cuda"))
    working = reference_backward(**case.inputs(0, dtype, "cuda"))
    with poisoned_allocations():
        found = run_backward(**case.inputs(0, dtype, "cuda"), backend=backend)
    for what, got, near, wanted in zip(("query", "key", "value"), found, working, exact, strict=True):
        check_error_budget(got, near, wanted, ulps=8.0, what=f"{name}, {backend}: gradient of {what}")


WAYS = {"runs": (65536, 100), "runs, many calls": (3000, 100), "chunks": (65536, 0), "chunks, many calls": (3000, 0)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "vendor"])
@pytest.mark.parametrize("name", BACKWARD)
def test_gradients_meet_their_reference(name, backend, dtype, way, monkeypatch):
    if backend == "triton" and way != "runs":
        pytest.skip("only vendor kernels gather keys")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(pieces, "GATHERED_KEYS", WAYS[way][0])
    monkeypatch.setattr(pieces, "MOST_COPIES", WAYS[way][1])
    _backward_agrees(name, BACKWARD[name], dtype, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BACKWARD_KERNEL_ONLY)
def test_gradients_that_only_our_kernel_takes(name, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    _backward_agrees(name, BACKWARD_KERNEL_ONLY[name], dtype, "triton")


@pytest.mark.parametrize("compact", [True, False], ids=["among themselves", "on all keys"])
def test_rows_that_are_not_valid_do_not_count(compact):
    """They lie at the end of their document: finite forward, and without gradient no trace of them backward."""
    generator = torch.Generator("cuda").manual_seed(0)
    position = torch.randperm(1500, generator=generator, device="cuda")
    valid = torch.arange(700, device="cuda") < 600
    chosen = torch.cat([position[:600].sort().values, position[600:700]])
    few = Segments((0,), (600,), chosen[:600])
    mixed = Segments((0,), (700,), chosen, valid)
    keys = Segments((0,), (1500,), torch.arange(1500, device="cuda"))
    count = 700 if compact else 1500
    tensors = [torch.randn(2, n, 64, generator=generator, device="cuda").bfloat16() for n in (700, 700, count, count)]
    grad = tensors.pop(0) * valid[:, None]
    local = plan_local(mixed, mixed if compact else keys, chunk=128, sink=64)
    saved = attend_local(*tensors, local, scaling=0.3, backend="triton")
    assert all(t.isfinite().all() for t in saved)
    found = attend_local_backward(grad, *tensors, *saved, local, scaling=0.3, backend="triton")
    alone = plan_local(few, few if compact else keys, chunk=128, sink=64)
    cut = [tensors[0][:, :600], *(t[:, : 600 if compact else count] for t in tensors[1:])]
    expected = attend_local(*cut, alone, scaling=0.3, backend="triton")
    torch.testing.assert_close(saved[0][:, :600], expected[0])
    gradients = attend_local_backward(grad[:, :600], *cut, *expected, alone, scaling=0.3, backend="triton")
    for actual, wanted in zip(found, gradients, strict=True):
        torch.testing.assert_close(actual[:, : wanted.shape[1]], wanted, rtol=0.02, atol=0.02)
        assert not actual[:, wanted.shape[1] :].any()


@pytest.mark.parametrize("backend", ["triton", "vendor"])
def test_gradients_wait_for_nothing(backend):
    """Nor does a plan that is new; and our kernel's repeated runs agree."""
    inputs = _backward_case("packed", BACKWARD["packed"]).inputs(0, torch.bfloat16, "cuda")
    operands, local = operands_of(inputs)
    first = attend_local_backward(*operands, local, **inputs, backend=backend)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = attend_local_backward(*operands, replace(local, _made={}), **inputs, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if backend == "triton":
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    else:
        torch.testing.assert_close(first, second, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_batched_kernel_of_a_vendor_runs_here(head_dim):
    device = torch.device("cuda", torch.cuda.current_device())
    found = {n: vendor.probe(k, torch.bfloat16, head_dim, device) for n, k in vendor.KERNELS.items()}
    print(found)
    assert None in found.values()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernel_for_varied_lengths_takes_runs_here(head_dim):
    assert vendor.takes_runs(torch.empty(1, 1, head_dim, dtype=torch.bfloat16, device="cuda"))


@pytest.mark.parametrize("backend", ["triton", "vendor"])
def test_repeated_runs_agree_and_wait_for_nothing(backend):
    case = local_case("ragged", **({"head_dim": 64} | WHOLE | SHAPES["ragged"]))
    inputs = case.inputs(0, torch.bfloat16, "cuda")
    first = run(**inputs, backend=backend)
    local_of(dict(inputs))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        others = [run(**inputs, backend=backend) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for number, other in enumerate(others):
        for what, wanted, found in zip(("output", "lse"), first, other, strict=True):
            rows = (found != wanted).reshape(*wanted.shape[:2], -1).any(-1).any(0).nonzero().flatten().tolist()
            assert not rows, f"run {number}: {what} of {len(rows)} rows differs, from row {rows[0]} to {rows[-1]}"


@pytest.mark.parametrize("window", [64, 512])
@pytest.mark.parametrize("kv", ["kept", "all"])
@pytest.mark.parametrize("mode", ["exact rows", "exact pairs", "exact keys", "both keys"])
def test_context_rows_in_half_precision(mode, kv, window):
    """Error against fp32: at most twice that of the generic executor in bf16, with a floor of a few bf16 units."""
    inputs = {name: tensor.cuda() for name, tensor in batch(1900, 1, supervised_from=1700).items()}
    model = adapted(torch.float32)
    plan = replace(plan_of(model, mode, kv, dense=(1,)), block_size=32, context_window=window)
    exact_loss, exact = step(model, plan, inputs, engine="generic")
    full_loss, _ = step(model, replace(plan, context_window=None), inputs, engine="generic")
    model = model.bfloat16()
    generic_loss, generic = step(model, plan, inputs, engine="generic")
    loss, got = step(model, plan, inputs, engine="fused")
    scale = float(exact.norm())
    error, allowed = (float((x - exact).norm()) / scale for x in (got, generic))
    print(
        f"{mode} {kv} {window}: fused {error:.2e}, generic {allowed:.2e}, without window {full_loss - exact_loss:.2e}"
    )
    assert exact_loss != full_loss
    assert error <= 2 * allowed + 4 * torch.finfo(torch.bfloat16).eps
    assert abs(loss - exact_loss) <= 2 * abs(generic_loss - exact_loss) + 2e-3 * abs(exact_loss)
