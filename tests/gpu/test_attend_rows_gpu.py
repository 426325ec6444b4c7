"""attend_rows on a CUDA device: shapes of several tiles, every tiling, far addresses, memory, no synchronisation."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lemo.ops import attend_rows
from lemo.ops.attend_rows.cases import OWN, SPEC, Shape, segments_of
from lemo.ops.attend_rows.reference import Segments, attend_rows_reference
from lemo.testing import Case, check_case, check_error_budget, outputs_and_gradients

pytestmark = pytest.mark.gpu

PLAIN = ("query_HND", "key_GKD", "value_GKD")
SHAPES = {
    "head dimension 64": {"documents": (1500,), "block": 64, "heads": 3, "groups": 1, "head_dim": 64},
    "head dimension 128": {"documents": (1500,), "block": 64, "heads": 4, "groups": 2, "head_dim": 128},
    "head dimension 80": {"documents": (900,), "block": 32, "heads": 2, "groups": 1, "head_dim": 80},
    "head dimension 256": {"documents": (700,), "block": 64, "heads": 2, "groups": 1, "head_dim": 256},
    "all rows": {"documents": (1025,), "share": 1.0, "heads": 2, "groups": 2, "head_dim": 64},
    "few rows": {"documents": (2049,), "share": 0.05, "heads": 2, "groups": 1, "head_dim": 64},
    "packed": {"documents": (300, 64, 1, 517, 129), "block": 16, "heads": 6, "groups": 2, "head_dim": 64},
    "gaps between documents": {"documents": (700, 300), "gap": 37, "heads": 2, "groups": 1, "head_dim": 128},
    "window": {"documents": (1500, 200), "block": 64, "window": 300, "heads": 2, "groups": 1, "head_dim": 64},
    "window below a tile": {"documents": (900,), "window": 33, "heads": 2, "groups": 1, "head_dim": 128},
    "model layout": {"documents": (1100,), "order": "NHD", "heads": 4, "groups": 2, "head_dim": 128},
    "without order": {"documents": (900, 300), "shuffled": True, "heads": 2, "groups": 1, "head_dim": 64},
    "constant": {"documents": (1100, 300), "block": 64, "constant": True, "heads": 4, "groups": 2, "head_dim": 128},
    "constant, window": {"documents": (900,), "window": 200, "constant": True, "heads": 2, "groups": 1, "head_dim": 64},
    "many programs": {"documents": (4000,), "heads": 32, "groups": 32, "head_dim": 16},
}


def _case(name: str) -> Case:
    shape = Shape(**SHAPES[name])
    return Case(name, shape.inputs, OWN if shape.constant else PLAIN, ulps=8.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_several_tiles(name, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    case = _case(name)
    exact = outputs_and_gradients(SPEC.reference, case.inputs(0, torch.float64, "cuda"), case.gradients)
    working = outputs_and_gradients(SPEC.reference, case.inputs(0, dtype, "cuda"), case.gradients)
    run = partial(SPEC.run, backend="triton")
    actual = outputs_and_gradients(run, case.inputs(0, dtype, "cuda"), case.gradients)
    for what in exact:
        check_error_budget(actual[what], working[what], exact[what], ulps=case.ulps, what=f"{name}: {what}")


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_tiling_gives_the_same(head_dim):
    from lemo.ops.attend_rows import kernel, tiling

    shape = Shape(documents=(700, 300), block=64, heads=4, groups=2, head_dim=head_dim)
    inputs = Case("tilings", shape.inputs).inputs(0, torch.bfloat16, "cuda")
    query, key, value = (inputs[name] for name in PLAIN)
    work = tiling.Work.between(*segments_of(dict(inputs)))
    scaling, grad = inputs["scaling"], query.clone()
    saved = kernel.forward(query, key, value, work, scaling, None)
    sums = saved[1], kernel.backward_query(grad, query, key, value, saved, work, scaling, None)[1]
    calls = {
        "forward": partial(kernel.forward, query, key, value, work, scaling, None),
        "query": partial(kernel.backward_query, grad, query, key, value, saved, work, scaling, None),
        "key": partial(kernel.backward_key, grad, query, key, value, sums, work, scaling, None, True),
    }
    for kind, call in calls.items():
        found = [call(tiling=t) for t in tiling.tilings(kind, head_dim, torch.bfloat16)]
        assert len(found) >= 2
        for other in found[1:]:
            for actual, expected in zip(other, found[0], strict=True):
                torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_repeated_runs_agree_bit_for_bit():
    inputs = _case("packed").inputs(0, torch.bfloat16, "cuda")
    first = outputs_and_gradients(SPEC.run, inputs, PLAIN)
    for _ in range(5):
        again = outputs_and_gradients(SPEC.run, inputs, PLAIN)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_nothing_waits_for_the_device():
    inputs = _case("packed").inputs(0, torch.bfloat16, "cuda")
    output = SPEC.run(**inputs)
    grad = torch.ones_like(output)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(SPEC.run(**inputs), [inputs[name] for name in PLAIN], grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_linear():
    """Output, log-sum-exp and small tables; scores would take 2 GiB, repeated keys 32 MiB."""
    inputs = _large_inputs(16384)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = SPEC.run(**inputs)
    torch.cuda.synchronize()
    rows = inputs["query_HND"].shape[1]
    assert torch.cuda.max_memory_allocated() - before <= output.numel() * 2 + 4 * 8 * rows + (1 << 20)


def _large_inputs(rows: int) -> dict:
    shape = Shape(documents=(rows,), block=64, heads=8, groups=1, head_dim=64)
    return Case("large", shape.inputs).inputs(0, torch.bfloat16, "cuda")


def test_addresses_beyond_32_bits():
    """More than 2^31 elements; documents lie at the far end only, so that the reference stays small."""
    heads, rows, head_dim, length = 16, 1 << 20, 144, 300
    query = torch.full((rows, heads, head_dim), torch.nan, dtype=torch.bfloat16, device="cuda").transpose(0, 1)
    assert query.numel() > 1 << 31
    key, value = (torch.full((1, rows, head_dim), torch.nan, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    generator = torch.Generator("cuda").manual_seed(0)
    for t in (query, key, value):
        t[:, -length:] = torch.randn(len(t), length, head_dim, generator=generator, device="cuda").bfloat16()
    position = torch.zeros(rows, dtype=torch.int64, device="cuda")
    position[-length:] = torch.arange(length, device="cuda")
    far = Segments((rows - length,), (length,), position)
    near = Segments((0,), (length,), position[-length:])
    actual = attend_rows(query, key, value, far, far, scaling=0.1, backend="triton")
    tails = [t[:, -length:] for t in (query, key, value)]
    exact = attend_rows_reference(*(t.double() for t in tails), near, near, scaling=0.1)[0]
    working = attend_rows_reference(*tails, near, near, scaling=0.1)[0]
    check_error_budget(actual[:, -length:], working, exact, ulps=8.0)
    assert not actual[:, :-length].any()


def test_auto_takes_the_kernel(caplog, monkeypatch):
    import logging

    from lemo.ops import backend

    monkeypatch.setattr(backend, "_logged", set())
    with caplog.at_level(logging.INFO, logger="lemo"):
        check_case(SPEC, _case("packed"), torch.bfloat16, "cuda")
    assert "attend_rows uses backend triton" in caplog.text
