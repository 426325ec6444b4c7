"""Selection and loss kernels on a CUDA device at real sizes: equal to torch, far addresses, all tilings, no waiting."""

from __future__ import annotations

import pytest
import torch

from lemo.core.layout import Layout
from lemo.core.policy import select
from lemo.core.predictor import PatternPredictor
from lemo.ops import linear_ce, pool_blocks, rank_blocks, score_blocks, select_rows
from lemo.ops.linear_ce.reference import linear_ce_reference
from lemo.ops.pool_blocks.reference import POOLS, Blocks, pool_blocks_reference
from lemo.ops.score_blocks.cases import PREDICTOR, _case
from lemo.ops.select_rows.cases import _inputs, table_of
from lemo.testing import check_error_budget, poisoned_allocations

pytestmark = pytest.mark.gpu
# Matrix units cut off low bits at each of the 256 steps over the width of a model.
TENSOR_CORE_ULPS = 256.0


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def _blocks(rows: int, size: int, first: int = 0) -> Blocks:
    start = torch.arange(0, rows, size, device="cuda")
    return Blocks(first + start, torch.minimum(torch.tensor(size, device="cuda"), rows - start), size)


def _pooled(x: torch.Tensor, projection: torch.Tensor, blocks: Blocks, **options) -> tuple[torch.Tensor, ...]:
    """By the kernel, by the reference in the working dtype, and exactly."""
    with poisoned_allocations():
        actual = pool_blocks(x, projection, blocks, backend="triton", **options)
    working = pool_blocks_reference(x, projection, blocks)
    return actual, working, pool_blocks_reference(x.double(), projection.double(), blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [8, 16, 48, 64, 100, 128])
def test_pool_blocks_at_the_width_of_a_model(dtype, size):
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(3000, 4096, generator=generator, device="cuda").to(dtype)
    projection = (torch.randn(4096, 128, generator=generator, device="cuda") / 64).to(dtype)
    check_error_budget(*map(_float32, _pooled(x, projection, _blocks(3000, size))), ulps=TENSOR_CORE_ULPS)


def _float32(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_tiling_pools_alike(dtype):
    from lemo.ops.pool_blocks import kernel

    x = torch.randn(777, 1000, device="cuda").to(dtype)
    projection, blocks = (torch.randn(1000, 200, device="cuda") / 32).to(dtype), _blocks(777, 64)
    candidates = kernel.CANDIDATES if dtype == torch.bfloat16 else kernel.CANDIDATES_FP32
    tilings = [tiling for tiling in candidates if kernel.fits(tiling, 64, dtype)]
    found = [kernel.launch(x, projection, blocks, POOLS, None, 1e-6, tiling) for tiling in tilings]
    assert len(found) >= 2
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


def test_pooling_reaches_beyond_32_bits():
    rows, width = 540_000, 4096
    x = torch.full((rows, width), torch.nan, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 1 << 31
    x[-300:] = torch.randn(300, width, device="cuda").bfloat16()
    projection = (torch.randn(width, 128, device="cuda") / 64).bfloat16()
    actual = pool_blocks(x, projection, _blocks(300, 64, rows - 300), backend="triton")
    near = pool_blocks(x[-300:].clone(), projection, _blocks(300, 64), backend="triton")
    assert torch.equal(actual, near)


@pytest.mark.parametrize("documents", [(1,), (128,), (2048,), (16000,), (700, 1, 90, 2, 1300)])
def test_scores_of_many_blocks(documents):
    case = _case("large", documents=documents, **PREDICTOR)
    inputs = {name: case.inputs(0, dtype, "cuda") for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64))}
    from lemo.ops.score_blocks.cases import _arguments

    working, exact = (score_blocks(**_arguments(inputs[name]), backend="reference") for name in ("fp32", "fp64"))
    with poisoned_allocations():
        actual = score_blocks(**_arguments(inputs["fp32"]), backend="triton")
    check_error_budget(actual, working, exact, ulps=64.0)


@pytest.mark.parametrize("documents", [(1_048_576,), (131_072,), (40_000, 64, 8_000, 1, 90_000), (50,) * 900])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.4])
def test_rows_equal_those_by_sorting(documents, ties, threshold):
    drawn = _inputs(torch.Generator().manual_seed(0), documents=documents, block=64, ties=ties, ratio=0.3)
    table = table_of(drawn)
    scores = drawn["scores_K"].float().cuda()
    scores[::7] = torch.nan
    scores[::11] = -torch.inf
    scores[::13] = torch.inf
    with poisoned_allocations():
        rank = rank_blocks(scores, table, backend="triton")
        keep = None if threshold is None else scores >= threshold
        found = select_rows(rank, drawn["budget_D"], table, keep_K=keep, backend="triton")
    assert torch.equal(rank, rank_blocks(scores, table, backend="reference"))
    expected = select_rows(rank, drawn["budget_D"], table, keep_K=keep, backend="reference")
    assert found.segment_lengths == expected.segment_lengths
    assert torch.equal(found.rows_N, expected.rows_N) and torch.equal(found.skipped_S, expected.skipped_S)
    assert (found.valid_N is None) == (keep is None)
    assert keep is None or torch.equal(found.valid_N, expected.valid_N)


def _predictor_and_layout(rows: int = 8192) -> tuple[PatternPredictor, Layout]:
    torch.manual_seed(0)
    predictor = PatternPredictor(512).cuda()
    supervised = torch.zeros(1, rows, dtype=torch.bool)
    supervised[:, -rows // 8 :] = True
    return predictor, Layout.build(torch.zeros(1, rows, dtype=torch.int64), supervised, device="cuda")


def test_a_layer_selects_in_few_launches_and_without_waiting():
    predictor, layout = _predictor_and_layout()
    x = torch.randn(8192, 512, device="cuda").bfloat16()

    def layer():
        return select(layout, predictor.scores(x, layout), forward_ratio=0.3, backward_ratio=0.3)

    layer()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        layer()
        torch.cuda.synchronize()
    kernels = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 5 <= len(kernels) <= 6, kernels


def test_scores_rank_as_in_fp32():
    """The kernels' 16-bit operands against the same rows and weights in fp32 on the CPU."""
    predictor, layout = _predictor_and_layout()
    x = torch.randn(8192, 512, device="cuda").bfloat16()
    found = predictor.scores(x, layout).cpu()
    on_host = Layout.build(torch.zeros(1, 8192, dtype=torch.int64), None)
    expected = predictor.cpu().scores(x.cpu().float(), on_host)
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.999


def test_a_changed_projection_is_seen():
    """The 16-bit copy of the projection is made anew when its source changes, in place or by another tensor."""
    predictor, layout = _predictor_and_layout()
    x = torch.randn(8192, 512, device="cuda").bfloat16()
    first = predictor.raw_features(x, layout)
    predictor.projection_MF.mul_(2)
    torch.testing.assert_close(predictor.raw_features(x, layout)[:, :128], 2 * first[:, :128], rtol=1e-3, atol=1e-4)
    predictor.load_state_dict({**predictor.state_dict(), "projection_MF": predictor.projection_MF / 2})
    torch.testing.assert_close(predictor.raw_features(x, layout)[:, :128], first[:, :128], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}, {"logit_scale": 0.25}], ids=str)
def test_loss_at_the_vocabulary_of_a_model(dtype, options):
    torch.manual_seed(0)
    hidden = torch.randn(700, 256, device="cuda").to(dtype)
    weight, labels = torch.randn(128_256, 256, device="cuda").to(dtype) / 4, torch.randint(128_256, (700,)).cuda()
    made = {}
    for name, run, wide in (
        ("actual", linear_ce, dtype),
        ("working", linear_ce_reference, dtype),
        ("exact", linear_ce_reference, torch.float64),
    ):
        h = hidden.to(wide, copy=True).requires_grad_()
        extra = {"backend": "triton", "segment_rows": 300} if name == "actual" else {}
        loss = run(h, weight.to(wide), labels, **options, **extra)
        made[name] = loss.detach(), torch.autograd.grad(loss, h)[0]
    for actual, working, exact in zip(*(made[name] for name in ("actual", "working", "exact")), strict=True):
        check_error_budget(actual, working, exact, ulps=16.0)


def test_every_tiling_gives_the_same_loss():
    from lemo.ops.linear_ce import kernel

    logits, labels = torch.randn(64, 50_001, device="cuda").bfloat16(), torch.randint(50_001, (64,)).cuda()
    found = []
    for tiling in kernel.CANDIDATES:
        copy, loss = logits.clone(), torch.empty(64, device="cuda")
        kernel.launch(copy, labels, loss, None, 1.0, True, tiling)
        found.append((loss, copy))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-2, atol=1e-6)


def test_logits_beyond_32_bits():
    from lemo.ops.linear_ce import kernel

    rows, vocabulary = 17_000, 128_256
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    assert logits.numel() > 1 << 31
    logits[-1] = torch.randn(vocabulary, device="cuda").bfloat16()
    labels, loss = torch.arange(rows, device="cuda"), torch.empty(rows, device="cuda")
    alone, alone_loss = logits[-1:].clone(), torch.empty(1, device="cuda")
    kernel.launch(logits, labels, loss, None, 1.0, True)
    kernel.launch(alone, labels[-1:].clone(), alone_loss, None, 1.0, True)
    assert torch.equal(loss[-1:], alone_loss) and torch.equal(logits[-1:], alone)


def test_a_label_outside_the_vocabulary_is_not_silent():
    hidden, weight = torch.randn(4, 16, device="cuda"), torch.randn(10, 16, device="cuda")
    assert linear_ce(hidden, weight, torch.tensor([1, 2, 10, 3], device="cuda"), backend="triton").isnan()
