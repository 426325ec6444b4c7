"""Ops and kernels on a CUDA device: all cases in bf16 and fp32, every tiling, large and far tensors."""

from __future__ import annotations

import pytest
import torch

import lemo.ops
from lemo.ops import block_score, linear_ce
from lemo.ops.block_score.cases import SPEC as BLOCK_SCORE
from lemo.ops.block_score.cases import Shape, layout
from lemo.ops.block_score.reference import block_score_reference
from lemo.testing import Case, check_case, check_error_budget, specs_in

pytestmark = pytest.mark.gpu

# The matrix units sum products of 16-bit numbers with fewer guard bits than ordinary fp32 addition.
TENSOR_CORE_ULPS = 32.0
CASES = [pytest.param(spec, case, id=f"{spec.name}: {case.name}") for spec in specs_in(lemo.ops) for case in spec.cases]

SHAPES = {
    "head dimension 128": {"documents": (700,), "block": 64, "heads": 4, "groups": 4, "head_dim": 128},
    "grouped, packed": {"documents": (300, 64, 517), "block": 64, "heads": 8, "groups": 2, "head_dim": 64},
    "head dimension 256": {"documents": (390,), "block": 64, "heads": 2, "groups": 1, "head_dim": 256},
    "head dimension 80": {"documents": (390,), "block": 32, "heads": 2, "groups": 1, "head_dim": 80},
    "block 16": {"documents": (500, 77), "block": 16, "heads": 3, "groups": 3, "head_dim": 64},
    "block 128": {"documents": (1000,), "block": 128, "heads": 2, "groups": 2, "head_dim": 128},
    "block 48": {"documents": (1000,), "block": 48, "heads": 2, "groups": 2, "head_dim": 64},
    "model layout": {"documents": (2049,), "block": 64, "heads": 4, "groups": 4, "head_dim": 128, "order": "NHD"},
    "softcap": {"documents": (600,), "block": 64, "heads": 4, "groups": 2, "head_dim": 128, "softcap": 0.5},
    "many tiles": {"documents": (9000,), "block": 16, "heads": 1, "groups": 1, "head_dim": 16},
}


def _no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_op_meets_its_reference(spec, case, dtype, monkeypatch):
    _no_tf32(monkeypatch)
    if spec.name == "block_score" and dtype != torch.float32:
        case = Case(case.name, case.build, case.gradients, case.gradcheck, TENSOR_CORE_ULPS)
    check_case(spec, case, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_block_score_kernel(name, dtype, monkeypatch):
    _no_tf32(monkeypatch)
    case = Case(name, Shape(**SHAPES[name]).inputs)
    exact = block_score_reference(**case.inputs(0, torch.float64, "cuda"))
    working = block_score_reference(**case.inputs(0, dtype, "cuda"))
    actual = block_score(**case.inputs(0, dtype, "cuda"), backend="triton")
    check_error_budget(actual, working, exact, ulps=4.0 if dtype == torch.float32 else TENSOR_CORE_ULPS, what=name)


def test_every_tiling_gives_the_same_map():
    from lemo.ops.block_score import kernel

    case = Case("tilings", Shape(**SHAPES["grouped, packed"]).inputs)
    inputs = case.inputs(0, torch.bfloat16, "cuda")
    blocks = tuple(inputs[f"block_{part}_K"] for part in ("start", "length", "document"))
    arguments = (inputs["query_HND"], inputs["key_GND"], blocks, inputs["scaling"], None, 64)
    maps = [
        kernel.launch(*arguments, tiling) for tiling in kernel.CANDIDATES if kernel.fits(tiling, 64, 64, torch.bfloat16)
    ]
    assert len(maps) >= 4
    for other in maps[1:]:
        torch.testing.assert_close(other, maps[0], rtol=1e-5, atol=1e-6)


def test_memory_is_linear():
    """The map and the copied layout, and no matrix of scores (which would take 1 GiB here)."""
    rows = 16384
    shape = Shape((rows,), block=64, heads=4, groups=4)
    inputs = Case("linear", shape.inputs).inputs(0, torch.bfloat16, "cuda")
    block_score(**inputs, backend="triton")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    block_score(**inputs, backend="triton")
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 4 * (rows // 64) ** 2 + (1 << 20)


@pytest.mark.parametrize("order", ["HND", "NHD"])
def test_addresses_beyond_32_bits(order):
    """More than 2^31 elements; blocks lie at the far end only, so that the reference stays small."""
    heads, rows, head_dim = 16, 1 << 20, 144
    shape = (heads, rows, head_dim) if order == "HND" else (rows, heads, head_dim)
    query = torch.full(shape, torch.nan, dtype=torch.bfloat16, device="cuda")
    query = query if order == "HND" else query.transpose(0, 1)
    assert query.numel() > 1 << 31
    key = torch.full((1, rows, head_dim), torch.nan, dtype=torch.bfloat16, device="cuda")
    blocks = layout((190, 100), 64)
    first = rows - 300
    blocks["block_start_K"] = blocks["block_start_K"] + first
    generator = torch.Generator("cuda").manual_seed(0)
    query[:, first:] = torch.randn(heads, 300, head_dim, generator=generator, device="cuda").bfloat16()
    key[:, first:] = torch.randn(1, 300, head_dim, generator=generator, device="cuda").bfloat16()
    actual = block_score(query, key, **blocks, scaling=0.1, backend="triton")
    near = {**blocks, "block_start_K": blocks["block_start_K"] - first, "scaling": 0.1}
    tails = query[:, first:], key[:, first:]
    exact = block_score_reference(*(t.double() for t in tails), **near)
    working = block_score_reference(*tails, **near)
    check_error_budget(actual, working, exact, ulps=TENSOR_CORE_ULPS)


def test_repeated_runs_agree_bit_for_bit():
    inputs = BLOCK_SCORE.cases[3].inputs(0, torch.bfloat16, "cuda")
    first = block_score(**inputs, backend="triton")
    assert all(torch.equal(block_score(**inputs, backend="triton"), first) for _ in range(5))


def test_auto_takes_the_kernel(caplog, monkeypatch):
    import logging

    from lemo.ops import backend

    monkeypatch.setattr(backend, "_logged", set())
    with caplog.at_level(logging.INFO, logger="lemo"):
        block_score(**BLOCK_SCORE.cases[0].inputs(0, torch.bfloat16, "cuda"))
    assert "triton" in caplog.text


def test_linear_ce_holds_the_logits_of_one_segment():
    """All logits in fp32 would take 1 GiB."""
    rows, width, vocabulary, segment = 8192, 256, 32768, 1024
    hidden = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=torch.bfloat16, device="cuda")
    labels = torch.randint(vocabulary, (rows,), device="cuda")
    linear_ce(hidden, weight, labels, segment_rows=segment).backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_ce(hidden, weight, labels, segment_rows=segment).backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 6 * segment * vocabulary + (24 << 20)
