"""Row ops on a CUDA device: shapes of real models, addresses beyond 32 bits, every tiling, repeats, no waiting."""

from __future__ import annotations

import pytest
import torch

from lemo.ops import (
    bypass_rows_,
    bypass_rows_backward_,
    gated_act,
    gated_act_backward,
    norm_rows,
    norm_rows_backward,
    rope_rows_,
    write_rows_,
)
from lemo.ops.gated_act import cases as gated_act_cases
from lemo.ops.norm_rows import cases as norm_rows_cases
from lemo.ops.rope_rows import cases as rope_rows_cases
from lemo.ops.stream_rows import cases as stream_rows_cases
from lemo.testing import Case, OpSpec, check_case

pytestmark = pytest.mark.gpu

MODULES = (norm_rows_cases, rope_rows_cases, gated_act_cases, stream_rows_cases)
SPECS: dict[str, OpSpec] = {spec.name: spec for module in MODULES for spec in module.SPECS}
# The matrix units sum products of 16-bit numbers with fewer guard bits than ordinary fp32 addition.
TENSOR_CORE_ULPS = 4.0
FAR_ROWS = 1 << 19  # x 4112 columns: more than 2^31 elements


def _stream(**options) -> stream_rows_cases.Shape:
    return stream_rows_cases.Shape(**options)


REAL = {
    "norm, Llama": ("norm_rows", norm_rows_cases.Shape((300, 4096), 201, keep_rows=True).forward),
    "norm, no power of two": ("norm_rows", norm_rows_cases.Shape((90, 5120), 33, kind="layer", bias=True).forward),
    "norm, heads": ("norm_rows", norm_rows_cases.Shape((77, 9, 128), None).forward),
    "norm, very wide": ("norm_rows", norm_rows_cases.Shape((40, 16384), 17).forward),
    "norm gradient, Llama": (
        "norm_rows_backward",
        norm_rows_cases.Shape((900, 4096), 701, residual=True, scattered=True, bias=True).backward,
    ),
    "norm gradient, heads": ("norm_rows_backward", norm_rows_cases.Shape((70000, 128), None, bias=True).backward),
    "norm gradient, very wide": ("norm_rows_backward", norm_rows_cases.Shape((40, 16384), 17, bias=True).backward),
    "rope, Llama": ("rope_rows_", rope_rows_cases.Shape(321, (32, 8), 128, table=500, wide=True).inputs),
    "rope, 40 heads": ("rope_rows_", rope_rows_cases.Shape(100, (40, 40), 128, table=50, inverse=True).inputs),
    "rope, part": ("rope_rows_", rope_rows_cases.Shape(100, (32, 32), 80, rotated=32, table=50, fused=True).inputs),
    "activation, Llama": ("gated_act", gated_act_cases.Shape((65, 11008)).forward),
    "activation, halves": ("gated_act", gated_act_cases.Shape((65, 8192), act="gelu_tanh", fused=True).forward),
    "activation gradient, Llama": ("gated_act_backward", gated_act_cases.Shape((65, 11008), reuse=True).backward),
    "write, Llama": ("write_rows_", _stream(shape=(300, 4096), rows=201, residual=True, flags=True).write),
    **{
        f"bypass, {width} wide, rank {rank}": ("bypass_rows_", _stream(shape=(500, width), rows=301, rank=rank).bypass)
        for width in (4096, 5120, 896)
        for rank in (8, 64, 128)
    },
    **{
        f"bypass gradient, 4096 wide, rank {rank}": (
            "bypass_rows_backward_",
            _stream(shape=(500, 4096), rows=301, rank=rank, flags=True).bypass_backward,
        )
        for rank in (8, 64, 100)
    },
}


@pytest.mark.parametrize("name", REAL)
def test_shapes_of_real_models(name):
    op, build = REAL[name]
    check_case(SPECS[op], Case(name, build, ulps=TENSOR_CORE_ULPS), torch.bfloat16, "cuda")


@pytest.mark.parametrize("rank", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 63, 65, 333])
@pytest.mark.parametrize("width", [576, 1000, 4096])
def test_last_tile_of_the_bypass_may_be_short(rank, dtype, rows, width):
    """Several draws: a fault of the compiler's pipelining once showed in some of them only."""
    build = _stream(shape=(400, width), rows=rows, rank=rank).bypass
    for seed in range(4):
        check_case(SPECS["bypass_rows_"], Case("short tile", build, ulps=TENSOR_CORE_ULPS), dtype, "cuda", seed=seed)


def test_repeated_runs_agree_bit_for_bit():
    for op, build in ((op, build) for op, build in REAL.values() if "backward" in op or op == "bypass_rows_"):
        runs = []
        for _ in range(3):
            outputs = SPECS[op].run(**Case(op, build).inputs(0, torch.bfloat16, "cuda"))
            outputs = outputs if isinstance(outputs, tuple | list) else [outputs]
            runs.append([t for t in outputs if t is not None])
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


def _far() -> tuple[torch.Tensor, torch.Tensor]:
    """A stream of more than 2^31 elements, NaN but for its last rows, and those rows' numbers."""
    stream = torch.full((FAR_ROWS, 4112), torch.nan, dtype=torch.bfloat16, device="cuda")
    assert stream.numel() > 1 << 31
    stream[-100:] = torch.randn(100, 4112, device="cuda").bfloat16()
    return stream, torch.arange(FAR_ROWS - 100, FAR_ROWS, device="cuda")


def test_stream_addresses_beyond_32_bits():
    stream, rows = _far()
    near, near_rows = stream[-100:].clone(), torch.arange(100, device="cuda")
    down, up = (torch.randn(s, device="cuda").bfloat16() / 16 for s in ((4112, 64), (64, 4112)))
    values, weight = torch.randn_like(near), torch.randn(4112, device="cuda").bfloat16()
    found = []
    for x, at in ((stream, rows), (near, near_rows)):
        rstd = bypass_rows_(x, at[:40], down, up)
        bypass_rows_backward_(x, at[20:60], torch.ones(40, device="cuda"), down, up)
        write_rows_(x, at[70:], values[70:], residual_nM=values[:30])
        normed, kept, scale, _ = norm_rows(x, weight, rows_n=at, eps=1e-6, keep_rows=True)
        norm_rows_backward(values[:50], kept[:50], weight, scale[:50], out_NM=x, out_rows_n=at[:50])
        found.append((rstd, normed, kept, x[-100:].clone()))
    for far, expected in zip(*found, strict=True):
        assert expected.isfinite().all() and torch.equal(far, expected)
    assert stream[:-100].isnan().all()


def test_compact_addresses_beyond_32_bits():
    """All rows of a large tensor: the last ones are what a small call gives."""
    stream, _ = _far()
    weight = torch.randn(4112, device="cuda").bfloat16()
    last = stream[-100:].clone()
    normed = norm_rows(stream, weight, eps=1e-6)[0]
    assert torch.equal(normed[-100:], norm_rows(last, weight, eps=1e-6)[0])
    assert torch.equal(gated_act(stream, stream, "silu", out=normed)[-100:], gated_act(last, last, "silu"))
    state, near = stream.view(FAR_ROWS, 16, 257), last.view(100, 16, 257)
    cos, sin = torch.rand(2, 50, 256, device="cuda")
    rows = torch.arange(FAR_ROWS, device="cuda")
    rope_rows_(state, cos, sin, rows_N=rows)
    rope_rows_(near, cos, sin, rows_N=rows[-100:])
    assert torch.equal(state[-100:], near)


def test_nothing_waits_for_the_device():
    given = Case("x", _stream(shape=(300, 512), rows=100, rank=16, flags=True).bypass).inputs(0, torch.bfloat16, "cuda")
    stream, rows, maps = given["stream_NM"], given["rows_s"], (given["down_MR"], given["up_RM"])
    weight, cos = torch.ones(512, device="cuda"), torch.ones(9, 64, device="cuda")

    def everything() -> None:
        rstd = bypass_rows_(stream, rows, *maps, apply_s=given["apply_s"])
        bypass_rows_backward_(stream, rows, rstd, *maps)
        normed, kept, scale, _ = norm_rows(stream, weight, rows_n=rows, eps=1e-6, keep_rows=True)
        rope_rows_(normed.view(100, 8, 64), cos, cos, rows_N=rows)
        act = gated_act(normed, kept, "gelu")
        gated_act_backward(act, normed, kept, "gelu", want_act=True, reuse=True)
        norm_rows_backward(act, kept, weight, scale, out_NM=stream, out_rows_n=rows, weight_grad=True)
        write_rows_(stream, rows, act, residual_nM=kept, valid_n=given["apply_s"])

    everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
