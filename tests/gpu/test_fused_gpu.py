"""The fused engine on a GPU: in bf16 as near fp32 as the generic executor, and never waiting for the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lemo.ops import dropout_rows
from lemo.ops.dropout_rows.reference import keep_mask
from lemo.runtime.attach import attach
from tests.gpu.waiting import run_layers_without_waiting
from tests.runtime.oracle import batch, gradients, tiny_model
from tests.runtime.test_fused import MODES, plan_of

pytestmark = pytest.mark.gpu


def adapted(dtype: torch.dtype, family: str = "llama", dropout: float = 0.0):
    """A model of several tiles with adapters that matter; weights are bf16 numbers in every dtype."""
    model = tiny_model(
        family, hidden_size=256, intermediate_size=512, num_attention_heads=4, max_position_embeddings=2048
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, lora_dropout=dropout)
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                scale = 0.05 if "lora_B" in name else 0.03
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            parameter.copy_(parameter.bfloat16())
    return model.cuda().to(dtype)


def step(model, plan, inputs, **options):
    """Loss and gradients in fp32 on the CPU."""
    model.zero_grad(set_to_none=True)
    with attach(model, plan, self_test=False, unsafe_no_bypass=True, **options) as handle:
        loss = model(**inputs).loss
        loss.backward()
        assert handle.notes == []
    flat = torch.cat([g.float().cpu().flatten() for g in gradients(model).values()])
    return float(loss), flat


@pytest.mark.parametrize("recompute", ["none", "mlp", "lin", "layer"])
@pytest.mark.parametrize("kv", ["kept", "all"])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_is_as_good_as_the_generic_executors(mode, kv, recompute):
    """Error against fp32: at most twice that of the generic executor in bf16, with a floor of a few bf16 units."""
    inputs = {name: tensor.cuda() for name, tensor in batch(1500, 1, supervised_from=1200).items()}
    model = adapted(torch.float32)
    plan = replace(plan_of(model, mode, kv, dense=(1,)), block_size=32)
    exact_loss, exact = step(model, plan, inputs, engine="generic")
    model = model.bfloat16()
    generic_loss, generic = step(model, plan, inputs, engine="generic")
    loss, got = step(model, plan, inputs, engine="fused", recompute=recompute)
    scale = float(exact.norm())
    error, allowed = (float((x - exact).norm()) / scale for x in (got, generic))
    print(f"{mode} {kv} {recompute}: fused {error:.2e}, generic {allowed:.2e}")
    assert error <= 2 * allowed + 4 * torch.finfo(torch.bfloat16).eps
    assert abs(loss - exact_loss) <= 2 * abs(generic_loss - exact_loss) + 2e-3 * abs(exact_loss)


@pytest.mark.parametrize("kv", ["kept", "all"])
@pytest.mark.parametrize("mode", MODES)
def test_groups_of_heads_in_half_precision(mode, kv, monkeypatch):
    """Vendors' kernels take some heads of rows that hold all of them."""
    monkeypatch.setattr("lemo.runtime.fused.attention.PART_BYTES", 1)
    test_half_precision_is_as_good_as_the_generic_executors(mode, kv, "layer")


@pytest.mark.parametrize("recompute", ["none", "lin"])
@pytest.mark.parametrize("kv", ["kept", "all"])
@pytest.mark.parametrize("mode", MODES)
def test_dropout_in_half_precision(mode, kv, recompute):
    """Against fp32 under the same masks: no farther than twice what the engine is off without dropout."""
    inputs = {name: tensor.cuda() for name, tensor in batch(1500, 1, supervised_from=1200).items()}
    errors = {}
    for dropout in (0.0, 0.1):
        model, found = adapted(torch.float32, dropout=dropout), []
        plan = replace(plan_of(model, mode, kv, dense=(1,)), block_size=32)
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(11)
            found.append(step(model.to(dtype), plan, inputs, engine="fused", recompute=recompute)[1])
        errors[dropout] = float((found[1] - found[0]).norm() / found[0].norm())
    print(f"{mode} {kv} {recompute}: {errors}")
    assert errors[0.1] <= 2 * errors[0.0] + 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dropout_masks_are_the_references(dtype):
    """Bit for bit, for rows with numbers beyond 31 bits, several tiles of columns and keys with the highest bit set."""
    rows = torch.tensor([0, 1, 5, 2**31 - 1, 2**31 + 7, 2**32 - 1, 130_001], device="cuda")
    for key in ((0, 0), (2**32 - 1, 2**31), (1, 0xDEADBEEF)):
        for width in (77, 4096, 11008):
            x = torch.ones(len(rows), width, dtype=dtype, device="cuda")
            kept = dropout_rows(x, 0.3, key, rows, backend="triton") != 0
            assert torch.equal(kept, keep_mask(rows, width, 0.3, key))


def test_dropout_of_more_than_two_to_the_31_elements():
    """Addresses are 64 bits wide."""
    x = torch.ones(1 << 19, 4112, dtype=torch.bfloat16, device="cuda")
    dropped = dropout_rows(x, 0.3, (3, 4), backend="triton")
    tail = torch.arange(len(x) - 50, len(x), device="cuda")
    assert torch.equal(dropped[-50:] != 0, keep_mask(tail, 4112, 0.3, (3, 4)))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_fused_forward_and_backward_never_wait(dropout):
    """From the first layer to the end of backward the device is asked for nothing."""
    model = adapted(torch.bfloat16, dropout=dropout)
    inputs = {name: tensor.cuda() for name, tensor in batch(1024, 1, supervised_from=900).items()}
    for kv in ("kept", "all"):
        plan = replace(plan_of(model, "skip", kv), block_size=32)
        with attach(model, plan, engine="fused", self_test=False) as handle:
            model(**inputs).loss.backward()
            context = handle._open(inputs | {"use_cache": False}, True, False)
            run_layers_without_waiting(handle, model, context, inputs["input_ids"])
