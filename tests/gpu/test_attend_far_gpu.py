"""A sample of far keys on a CUDA device: both kernel paths against the reference, in the runtime, without waiting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lemo.ops import attend_backward, attend_forward, plan_far
from lemo.ops.attend_rows import far, far_stripes
from lemo.ops.attend_rows.cases import Shape, segments_of
from lemo.testing import Case, check_error_budget
from tests.gpu.test_fused_gpu import adapted, step
from tests.ops.test_attend_far import drawn
from tests.runtime.oracle import batch
from tests.runtime.test_fused import plan_of

pytestmark = pytest.mark.gpu

SHAPES = {
    "head dimension 64": {"documents": (3000,), "heads": 6, "groups": 2, "head_dim": 64, "block": 64},
    "head dimension 128": {"documents": (2900,), "heads": 8, "groups": 2, "head_dim": 128, "block": 64},
    "one key head a query head": {"documents": (2048,), "heads": 4, "groups": 4, "head_dim": 64, "share": 0.3},
    "runs": {"documents": (6000,), "heads": 4, "groups": 1, "head_dim": 128, "block": 500, "share": 0.15},
    "packed": {"documents": (1300, 64, 1, 517, 2049, 700), "heads": 4, "groups": 2, "head_dim": 64},
    "a row each": {"documents": (2500, 1500), "heads": 2, "groups": 1, "head_dim": 128, "share": 0.01},
}


def _gradients(name, dtype, backend, *, own=False, share=0.3, stripe=256):
    """Gradients of one shape; operands of a dtype are those of the reference in it."""
    shape = Shape(**({"order": "NHD"} | SHAPES[name]))
    inputs = Case(name, shape.inputs).inputs(0, dtype, "cuda")
    queries, keys = segments_of(inputs)
    query, *pair = (inputs[n].detach() for n in ("query_HND", "key_GKD", "value_GKD"))
    scaling = inputs["scaling"]
    saved = attend_forward(query, *pair, queries, keys, scaling=scaling, backend="reference")
    grad = torch.randn(query.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(query)
    sampled = plan_far(queries, keys, drawn(shape.documents, share, stripe=stripe), shape.documents, stripe=stripe)
    options = {"scaling": scaling, "far": sampled, "backend": backend}
    if own:
        sides = zip(queries.starts, queries.lengths, keys.starts, strict=True)
        own_N = torch.cat([queries.position_N[q : q + n] + k for q, n, k in sides])
        options["own"] = tuple(t[:, own_N] for t in pair)
    return attend_backward(grad, query, *pair, *saved, queries, keys, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["all keys", "own keys"])
@pytest.mark.parametrize("backend", ["triton", "vendor"])
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_meet_their_reference(name, backend, own, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(far_stripes, "GATHERED_KEYS", 1024)  # several calls
    exact = _gradients(name, torch.float64, "reference", own=own)
    working = _gradients(name, dtype, "reference", own=own)
    found = _gradients(name, dtype, backend, own=own)
    for what, got, near, wanted in zip(("dq", "dk", "dv"), found, working, exact, strict=True):
        assert got.isfinite().all()
        check_error_budget(got, near, wanted, ulps=8.0, what=f"{name}, {backend}: {what}")


def test_stripes_of_the_usual_size(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    options = {"stripe": far.FAR_STRIPE, "share": 0.25}
    exact = _gradients("runs", torch.float64, "reference", **options)
    working = _gradients("runs", torch.bfloat16, "reference", **options)
    found = _gradients("runs", torch.bfloat16, "auto", **options)
    for what, got, near, wanted in zip(("dq", "dk", "dv"), found, working, exact, strict=True):
        check_error_budget(got, near, wanted, ulps=8.0, what=what)


@pytest.mark.parametrize("own", [False, True], ids=["all keys", "own keys"])
@pytest.mark.parametrize("backend", ["triton", "vendor"])
def test_nothing_waits_for_the_device(backend, own):
    shape = Shape(**({"order": "NHD"} | SHAPES["packed"]))
    inputs = Case("packed", shape.inputs).inputs(0, torch.bfloat16, "cuda")
    queries, keys = segments_of(inputs)
    tensors = [inputs[n].detach() for n in ("query_HND", "key_GKD", "value_GKD")]
    saved = attend_forward(*tensors, queries, keys, scaling=0.1)
    options = {"own": tuple(t[:, : tensors[0].shape[1]] for t in tensors[1:])} if own else {}
    tables = drawn(shape.documents, 0.3, stripe=256)

    def run():
        sampled = plan_far(queries, keys, tables, shape.documents, stripe=256)
        operands = torch.ones_like(tensors[0]), *tensors, *saved
        return attend_backward(*operands, queries, keys, scaling=0.1, far=sampled, backend=backend, **options)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kv", ["kept", "all"])
@pytest.mark.parametrize("mode", ["exact rows", "exact keys"])
def test_engines_in_half_precision(mode, kv, monkeypatch):
    """Error against fp32 with the same draws: at most twice that of the generic executor in bf16, and a few units."""
    monkeypatch.setattr(far, "FAR_STRIPE", 128)
    inputs = {name: tensor.cuda() for name, tensor in batch(1900, 1, supervised_from=1700).items()}
    model = adapted(torch.float32)
    plan = replace(plan_of(model, mode, kv, dense=(1,)), block_size=32, far_share=0.25)
    _, full = step(model, replace(plan, far_share=1.0), inputs, engine="generic")
    exact_loss, exact = step(model, plan, inputs, engine="generic")
    model = model.bfloat16()
    generic_loss, generic = step(model, plan, inputs, engine="generic")
    loss, got = step(model, plan, inputs, engine="fused")
    scale = float(exact.norm())
    error, allowed, moved = (float((x - exact).norm()) / scale for x in (got, generic, full))
    print(f"{mode} {kv}: fused {error:.2e}, generic {allowed:.2e}, against all keys {moved:.2e}")
    assert error <= 2 * allowed + 4 * torch.finfo(torch.bfloat16).eps
    assert moved > 2 * error  # the draws are seen
    assert abs(loss - exact_loss) <= 2 * abs(generic_loss - exact_loss) + 2e-3 * abs(exact_loss)
