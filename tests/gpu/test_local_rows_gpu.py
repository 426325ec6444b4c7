"""Local loss rows on a GPU: the fused engine in bf16 as near fp32 as the generic executor, and never waiting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lemo.runtime.attach import attach
from lemo.runtime.batch import LOCAL_ROWS
from tests.gpu.test_fused_gpu import adapted, step
from tests.gpu.waiting import run_layers_without_waiting
from tests.runtime.test_fused import plan_of
from tests.runtime.test_local_rows import marked

pytestmark = pytest.mark.gpu

TOKENS, BLOCK = 1920, 32
FAR = (20, 21, 40, 57)
LOCAL = {"some": (3, 19, 22, 23, 24, 41, 42, 56), "all the rest": tuple(b for b in range(60) if b not in FAR)}
LOCAL["alone"] = (0, *LOCAL["some"], *FAR, 59)


def inputs_of(case):
    far = () if case == "alone" else FAR
    return {name: t.cuda() for name, t in marked(far, LOCAL[case], tokens=TOKENS, block=BLOCK).items()}


def plan_for(model, mode, kv, window, ratio=0.4, seen="near"):
    plan = plan_of(model, mode, kv, dense=(1,))
    layers = tuple(x if x.is_dense else replace(x, backward_ratio=ratio) for x in plan.layers)
    return replace(plan, layers=layers, block_size=BLOCK, context_window=window, local_forward=seen)


@pytest.mark.parametrize("recompute", ["none", "mlp", "lin", "layer"])
@pytest.mark.parametrize("window", [64, 512])
@pytest.mark.parametrize("kv", ["kept", "all"])
@pytest.mark.parametrize(("mode", "case"), [("exact keys", case) for case in LOCAL] + [("both keys", "some")])
def test_local_rows_in_half_precision(mode, case, kv, window, recompute):
    """Error against fp32: at most twice that of the generic executor in bf16, with a floor of a few bf16 units."""
    inputs, model = inputs_of(case), adapted(torch.float32)
    plan = plan_for(model, mode, kv, window, ratio=0.1 if case == "alone" else 0.4)
    check_half_precision(model, plan, inputs, recompute, (mode, case, kv, window))


@pytest.mark.parametrize("recompute", ["lin", "layer"])
@pytest.mark.parametrize("window", [64, 512])
@pytest.mark.parametrize("case", LOCAL)
def test_local_rows_that_see_all_in_half_precision(case, window, recompute):
    """The same where they see all keys in forward: backward of near keys takes the log-sum-exp of all."""
    inputs, model = inputs_of(case), adapted(torch.float32)
    ratio = 0.1 if case == "alone" else 0.4
    near, plan = (plan_for(model, "exact keys", "all", window, ratio, seen) for seen in ("near", "all"))
    grads = [step(model, x, inputs, engine="generic")[1] for x in (near, plan)]
    assert float((grads[0] - grads[1]).norm()) > 1e-3 * float(grads[0].norm()), "the choice matters"
    check_half_precision(model, plan, inputs, recompute, (case, window))


@pytest.mark.parametrize("window", [64, 512])
@pytest.mark.parametrize("case", LOCAL)
def test_groups_of_heads_of_local_rows_in_half_precision(case, window, monkeypatch):
    """Keys are gathered from rows that hold more heads."""
    monkeypatch.setattr("lemo.runtime.fused.attention.PART_BYTES", 1)
    test_local_rows_in_half_precision("exact keys", case, "all", window, "layer")


def check_half_precision(model, plan, inputs, recompute, what):
    """`model` is in fp32, and is in bf16 afterwards."""
    exact_loss, exact = step(model, plan, inputs, engine="generic")
    if (inputs["labels"][:, 1:] == -100).any():  # else, without marks, a batch would be run densely
        unmarked = {name: t for name, t in inputs.items() if name != LOCAL_ROWS}
        assert not torch.equal(step(model, plan, unmarked, engine="generic")[1], exact), "marks matter"
    model = model.bfloat16()
    generic_loss, generic = step(model, plan, inputs, engine="generic")
    loss, got = step(model, plan, inputs, engine="fused", recompute=recompute)
    scale = float(exact.norm())
    error, allowed = (float((x - exact).norm()) / scale for x in (got, generic))
    print(f"{what} {recompute}: fused {error:.2e}, generic {allowed:.2e}")
    assert error <= 2 * allowed + 4 * torch.finfo(torch.bfloat16).eps
    assert abs(loss - exact_loss) <= 2 * abs(generic_loss - exact_loss) + 2e-3 * abs(exact_loss)


@pytest.mark.parametrize("engine", ["generic", "fused"])
def test_single_precision_agrees_with_the_reference(engine):
    """fp32 on the GPU against fp64 on the CPU, where everything is plain torch."""
    inputs = inputs_of("some")
    model = adapted(torch.float32)
    plan = plan_for(model, "exact keys", "all", 64)
    loss, got = step(model, plan, inputs, engine=engine)
    model = model.cpu().double()
    wanted_loss, wanted = step(model, plan, {n: t.cpu() for n, t in inputs.items()}, engine="generic")
    assert abs(loss - wanted_loss) <= 1e-4 * abs(wanted_loss)
    assert float((got - wanted).norm() / wanted.norm()) <= 2e-3


@pytest.mark.parametrize("case", LOCAL)
@pytest.mark.parametrize("loss_rows_only", [False, True])
@pytest.mark.parametrize("seen", ["near", "all"])
@pytest.mark.parametrize("kv", ["kept", "all"])
def test_forward_and_backward_never_wait(kv, seen, loss_rows_only, case):
    """From the first layer to the end of backward the device is asked for nothing."""
    model, inputs = adapted(torch.bfloat16), inputs_of(case)
    plan = plan_for(model, "exact keys", kv, 512, seen=seen)
    with attach(model, plan, engine="fused", self_test=False) as handle:
        model(**inputs).loss.backward()
        marks = inputs.pop(LOCAL_ROWS)
        context = handle._open(inputs | {"use_cache": False}, True, False, marks)
        context.loss_rows_only = loss_rows_only
        run_layers_without_waiting(handle, model, context, inputs["input_ids"])
