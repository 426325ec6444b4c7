"""Libraries that wrap, replace, checkpoint or compile the model, before and after attach."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

from lemo.errors import UnsupportedModelError
from lemo.runtime.attach import attach
from lemo.runtime.layer import SkippingLayer
from lemo.runtime.model import decoder_layers
from tests.integration.checks import INPUTS, assert_equal, is_plain, run
from tests.integration.plans import documents, exact, keep_all, padded, skipping, supervised_are_kept
from tests.runtime.oracle import gradients, relative, tiny_model

PLANS = {
    "skip": skipping,
    "skip_kept": lambda m: skipping(m, kv="kept"),
    "rows": exact,
    "rows_of_some": lambda m: exact_of_some(m, "rows"),
    "pairs": lambda m: exact(m, gradient="pairs"),
}


def exact_of_some(model, gradient):
    """Both budgets: 0.8 of the rows forward, the others by the bypass, 0.4 backward."""
    plan = skipping(model, gradient=gradient)
    return replace(plan, layers=tuple(replace(x, forward_ratio=0.8) for x in plan.layers))


# Attach and detach


def test_attaching_twice_is_refused():
    model = tiny_model()
    with attach(model, skipping(model), self_test=False) as handle:
        for second in (model, get_peft_model(model, LoraConfig(target_modules=["q_proj"]))):
            with pytest.raises(UnsupportedModelError, match="attached already"):
                attach(second, keep_all(model), self_test=False)
        assert handle.context is None
    assert is_plain(model)
    attach(model, skipping(model), self_test=False).detach()


def test_detach_twice_does_nothing_and_leaves_a_newer_plan_alone():
    model = tiny_model()
    first = attach(model, skipping(model), self_test=False)
    first.detach()
    with attach(model, exact(model), self_test=False) as second:
        first.detach()
        run(model)
        assert second.sparse_batches == 1


def test_a_refused_attach_leaves_the_model_as_it_was(monkeypatch):
    """An error half-way, in a layer's installation or in the self-test, changes nothing."""
    from lemo.runtime import attach as module

    model, installed = tiny_model(), []

    def third_fails(layer, state):
        if len(installed) == 2:
            raise UnsupportedModelError("the third layer")
        installed.append(layer)
        original(layer, state)

    original = module.install
    monkeypatch.setattr(module, "install", third_fails)
    with pytest.raises(UnsupportedModelError, match="the third layer"):
        attach(model, skipping(model))
    assert len(installed) == 2
    assert is_plain(model)


# Forwards that peers replace


def fused_forward(model):
    """A peer's forward in the manner of TRL and Liger: kept on the instance, calling what it found."""
    found = model.forward
    calls = []

    def forward(*args, **kwargs):
        calls.append(kwargs)
        return found(*args, **kwargs)

    model.forward = forward
    return calls


@pytest.mark.parametrize("order", ["peer_first", "lemo_first"])
def test_forward_replaced_by_a_peer_still_gets_labels_to_lemo(order):
    model = tiny_model()
    if order == "peer_first":
        calls = fused_forward(model)
        handle = attach(model, skipping(model), self_test=False)
        assert any("replaced" in note for note in handle.notes)
    else:
        handle = attach(model, skipping(model), self_test=False)
        calls = fused_forward(model)
    output = model(**INPUTS)
    assert output.logits is not None, "the peer's loss and logits stay in force"
    output.loss.backward()
    assert len(calls) == 1
    assert handle.sparse_batches == 1
    supervised_are_kept(handle.selections, INPUTS["labels"])
    handle.detach()
    assert is_plain(model)
    assert torch.equal(model(**INPUTS).logits, tiny_model()(**INPUTS).logits)
    assert len(calls) == 2


@pytest.fixture
def accelerator():
    """Mixed precision on the CPU: accelerate replaces the model's forward."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def prepared(accelerator, order, plan):
    """A model under mixed precision, with or without a plan, and the handle."""
    model, handle = tiny_model(), None
    if plan is not None and order == "lemo_first":
        handle = attach(model, plan(model), loss="model", self_test=False)
    model = accelerator.prepare_model(model)
    if plan is not None and order == "accelerate_first":
        handle = attach(model, plan(model), loss="model", self_test=False)
    return model, handle


@pytest.mark.parametrize("order", ["accelerate_first", "lemo_first"])
def test_mixed_precision_of_accelerate(accelerator, order):
    """Prepared before or after attach: autocast is in force, keep-all equals plain bits, selection sees the labels."""
    wanted = run(prepared(accelerator, order, None)[0])
    assert not torch.equal(wanted[0], run(tiny_model())[0]), "mixed precision changes nothing here"
    assert_equal(run(prepared(accelerator, order, keep_all)[0]), wanted)
    assert torch.equal(run(prepared(accelerator, order, exact)[0])[0], wanted[0])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("order", ["accelerate_first", "lemo_first"])
def test_selection_under_mixed_precision(accelerator, order, plan):
    """RoPE leaves queries in fp32 and values in bf16: every attention path takes that, near full precision."""
    model, handle = prepared(accelerator, order, PLANS[plan])
    loss, got = run(model)
    assert handle.sparse_batches == 1
    supervised_are_kept(handle.selections, INPUTS["labels"])
    model = tiny_model()
    with attach(model, PLANS[plan](model), loss="model", self_test=False):
        wanted_loss, wanted = run(model)
    assert relative(loss, wanted_loss) < 0.02
    whole = [torch.cat([g[name].flatten() for name in wanted]) for g in (got, wanted)]
    assert relative(*whole) < 0.1


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("order", ["accelerate_first", "lemo_first"])
def test_accelerate_unwraps_an_attached_model(accelerator, order, keep):
    """`unwrap_model` gives full precision back when asked to, lemo stays in force, and detach leaves a plain model."""
    model = tiny_model()
    if order == "lemo_first":
        handle = attach(model, skipping(model), loss="model", self_test=False)
    model = accelerator.prepare_model(model)
    if order == "accelerate_first":
        handle = attach(model, skipping(model), loss="model", self_test=False)
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=keep)
    run(unwrapped)
    assert handle.sparse_batches == 1
    handle.detach()
    assert is_plain(unwrapped)
    same = torch.equal(run(unwrapped)[0], run(tiny_model())[0])
    assert same == (not keep)


# Checkpointing and compilation


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("plan", ["keep_all", "skip_kept", "rows", "pairs"])
def test_reentrant_checkpointing_gives_the_same_gradients(plan, adapters):
    plans = {"keep_all": keep_all, "rows": exact}
    plans["skip_kept"] = lambda m: skipping(m, kv="kept")
    plans["pairs"] = lambda m: exact(m, gradient="pairs")
    model = base = tiny_model()
    if adapters:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.enable_input_require_grads()
    with attach(model, plans[plan](base), self_test=False) as handle:
        wanted = run(model)
        base.gradient_checkpointing_enable({"use_reentrant": True})
        handle.sparse_batches = 0
        assert_equal(run(model), wanted)


def test_reentrant_checkpointing_is_refused_where_rows_offer_keys():
    """Keys of skipped rows get gradient, but no reentrant checkpoint would hand it on: refused, in training only."""
    model = tiny_model()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with attach(model, skipping(model, kv="all"), self_test=False):
        with pytest.raises(UnsupportedModelError, match="use_reentrant"):
            model(**INPUTS)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        run(model)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "layers"])
@pytest.mark.parametrize("plan", [keep_all, skipping, exact])
def test_compiled_model_has_the_same_loss_and_gradients(plan, how):
    """torch.compile of the whole model, which is told to leave the layers alone, or of each layer."""
    torch._dynamo.reset()
    model = tiny_model()
    with attach(model, plan(model), loss="model", self_test=False) as handle:
        wanted = run(model)
        compiled = model
        if how == "whole":
            compiled = torch.compile(model, backend="aot_eager")
        else:
            for layer in decoder_layers(model):
                layer.compile(backend="aot_eager")
        for _ in range(2):
            got = run(compiled)
            assert torch.allclose(got[0], wanted[0], rtol=1e-5)
            assert got[1].keys() == wanted[1].keys()
            for name, gradient in wanted[1].items():
                assert torch.allclose(got[1][name], gradient, rtol=1e-3, atol=1e-5), name
        said = any("layer.compile()" in note for note in handle.notes)
        assert said == (how == "whole")


def test_layers_keep_the_names_that_wrappers_look_for():
    """FSDP policies and device maps find layers by class name; one cached class serves all layers of all models."""
    model, other = tiny_model(), tiny_model(seed=1)
    with attach(model, skipping(model), self_test=False), attach(other, skipping(other), self_test=False):
        classes = {type(x) for m in (model, other) for x in decoder_layers(m)}
        assert len(classes) == 1
        (found,) = classes
        assert found.__name__ in model._no_split_modules
        assert issubclass(found, SkippingLayer)


@pytest.mark.parametrize("attached", [False, True])
def test_wrapping_policies_of_accelerate_find_every_layer(attached):
    """The policy that accelerate makes for FSDP2 from class names matches all layers and nothing else."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    model = tiny_model()
    if attached:
        attach(model, skipping(model), self_test=False)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert [m for m in model.modules() if policy(m)] == list(decoder_layers(model))


@pytest.mark.parametrize("order", ["wrapped_first", "lemo_first"])
def test_checkpoint_wrappers_around_layers_are_refused(order):
    """torch's CheckpointWrapper, which accelerate's FSDP puts around layers, would replay them without a selection."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model = tiny_model()
    layer_class = type(decoder_layers(model)[0])

    def make():
        return attach(model, skipping(model), self_test=False)

    if order == "lemo_first":
        make()
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, layer_class))
    with pytest.raises(UnsupportedModelError, match="gradient_checkpointing_enable"):
        model(**INPUTS) if order == "lemo_first" else make()
    assert torch.equal(model.eval()(**INPUTS).loss, tiny_model().eval()(**INPUTS).loss)


def test_attach_finds_the_model_inside_a_compiled_one():
    model = tiny_model()
    compiled = torch.compile(model, backend="eager")
    wanted = type(compiled)
    with attach(compiled, skipping(model), self_test=False) as handle:
        assert handle.model is model
        assert type(compiled) is wanted
    assert is_plain(model)


def test_two_attached_models_do_not_touch_each_other():
    """Interleaved forwards of two models with plans of their own."""
    first, second = tiny_model(), tiny_model(seed=1)
    inputs = padded(documents(2))
    with attach(first, skipping(first), self_test=False), attach(second, exact(second), self_test=False):
        wanted = run(first, inputs), run(second, inputs)
        losses = first(**inputs).loss, second(**inputs).loss
        (losses[0] + losses[1]).backward()
        got = tuple((loss.detach(), gradients(m)) for loss, m in zip(losses, (first, second), strict=True))
    for a, b in zip(got, wanted, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("gradient", ["rows", "pairs"])
def test_a_checkpoint_replays_the_rows_that_pass_gradient_only(gradient):
    """Exact forward under checkpointing: the pass over all rows runs once, the compact one is recomputed."""
    model = tiny_model()
    sizes = []
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with attach(model, exact(model, gradient=gradient), self_test=False) as handle:
        model.model.layers[2].mlp.register_forward_pre_hook(lambda m, args: sizes.append(args[0].shape[1]))
        run(model)
        kept = handle.selections[2].backward.capacity
    assert sizes == [64, kept, kept]
    assert kept < 64
