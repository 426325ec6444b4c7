"""Hooks and replaced forwards: what the fused engine would not call is left to the generic executor; none is missed."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LNTuningConfig, LoraConfig, get_peft_model

from lemo import attach
from lemo.core.plan import LayerPlan, Plan
from lemo.errors import UnsupportedModelError
from lemo.runtime.fused.attachment import FusedEngine
from lemo.runtime.model import causal_model, decoder_layers
from tests.runtime.oracle import batch, fill_adapters, gradients, relative, tiny_model
from tests.runtime.test_exact import in_double
from tests.runtime.test_fused import plan_of, run

INSIDE = [
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn",
    "self_attn.q_proj",
    "self_attn.o_proj",
    "mlp",
    "mlp.act_fn",
    "mlp.down_proj",
]
KINDS = {
    "forward hook": lambda m: m.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda m: m.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    "replaced forward": lambda m: _Replaced(m),
}
ALL = {0, 1, 2, 3}


class _Replaced:
    """Another forward on the instance, which `remove` takes away."""

    def __init__(self, module) -> None:
        own, self._module = module.forward, module
        module.forward = lambda *args, **kwargs: own(*args, **kwargs)

    def remove(self) -> None:
        del self._module.forward


@pytest.fixture
def asked(monkeypatch):
    """Lets engine `auto` take the fused engine on the CPU, too."""
    monkeypatch.setattr(FusedEngine, "layers", lambda self: self._ask(list(decoder_layers(self._handle.model))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", INSIDE)
def test_a_layer_with_a_hook_inside_is_refused(place, kind, monkeypatch):
    """At attach and later, by module and kind; without it the layer is fused again, bit for bit."""
    in_double(monkeypatch)
    model, inputs = tiny_model(dtype=torch.float64), batch(48)
    plan = plan_of(model, "exact keys")
    module = decoder_layers(model)[1].get_submodule(place)
    hook = KINDS[kind](module)
    with pytest.raises(UnsupportedModelError, match=f"layer 1: {place} has a {kind} \\(.*test_fused_hooks"):
        attach(model, plan, engine="fused")
    hook.remove()
    with attach(model, plan, engine="fused", self_test=False) as handle:
        wanted = model(**inputs).loss.detach()
        hook = KINDS[kind](module)
        with pytest.raises(UnsupportedModelError, match=f"layer 1: {place} has a {kind} "):
            model(**inputs)
        hook.remove()
        handle.sparse_batches = 0
        assert torch.equal(model(**inputs).loss, wanted)


def _half(module, args, output):
    return (0.5 * output[0], *output[1:]) if isinstance(output, tuple) else 0.5 * output


@pytest.mark.parametrize("place", INSIDE)
def test_auto_leaves_a_layer_with_a_hook_to_the_generic_engine(place, asked, monkeypatch):
    """What the hook does counts, also when it comes after attach, and the note names it."""
    in_double(monkeypatch)
    model, inputs = tiny_model(dtype=torch.float64), batch(48)
    plan = plan_of(model, "skip")
    module = decoder_layers(model)[1].get_submodule(place)
    with attach(model, plan, engine="auto", self_test=False) as handle:
        plain = float(model(**inputs).loss.detach())
        assert handle.fused_layers() == ALL
        module.register_forward_hook(_half)
        handle.sparse_batches = 0
        loss = model(**inputs).loss
        loss.backward()
        got = gradients(model)
        assert handle.fused_layers() == ALL - {1}
        assert any(f"layer 1): {place} has a forward hook" in note for note in handle.notes)
    wanted_loss, wanted, _ = run(model, plan, inputs, "generic")
    assert relative(loss, wanted_loss) < 1e-10 and abs(float(loss.detach()) - plain) > 1e-6
    scale = torch.stack([g.norm() for g in wanted.values()]).norm()
    assert all(float((got[name] - gradient).norm() / scale) < 1e-10 for name, gradient in wanted.items())


@pytest.mark.parametrize("inside", ["", "base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"])
def test_hooks_inside_an_adapter_are_seen(inside):
    model = get_peft_model(tiny_model(), LoraConfig(r=3, target_modules="all-linear"))
    with attach(model, plan_of(model, "skip"), engine="fused", self_test=False) as handle:
        assert handle.fused_layers() == ALL
        name = f"mlp.up_proj.{inside}".rstrip(".")
        hook = decoder_layers(causal_model(model))[2].get_submodule(name).register_forward_hook(lambda *_: None)
        with pytest.raises(UnsupportedModelError, match=f"layer 2: {name} has a forward hook"):
            handle.fused_layers()
        hook.remove()
        assert handle.fused_layers() == ALL


def _recorders(model):
    with torch.no_grad():
        model(input_ids=torch.arange(3, 9)[None], output_hidden_states=True, output_attentions=True)
    assert all(layer.self_attn._forward_hooks for layer in decoder_layers(model))


def _checkpoints(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()


def _accelerate_was_here(model):
    for layer in decoder_layers(model):
        add_hook_to_module(layer.mlp, ModelHook())
        remove_hook_from_module(layer.mlp)
    assert "forward" in decoder_layers(model)[0].mlp.__dict__


def _liger(model):
    def forward(self, hidden_states):
        return type(self).forward(self, hidden_states)

    forward.__module__ = "liger_kernel.transformers.rms_norm"
    for layer in decoder_layers(model):
        layer.input_layernorm.forward = MethodType(forward, layer.input_layernorm)


@pytest.mark.parametrize("change", [_recorders, _checkpoints, _accelerate_was_here, _liger])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_peers_leave_behind_keeps_the_fused_engine(when, change):
    """Transformers' idle recorders, its hooks on embeddings, a forward given back, and kernels for the same numbers."""
    model, inputs = tiny_model(attn_implementation="eager"), batch(48)
    if when == "before":
        change(model)
    with attach(model, plan_of(model, "exact keys"), engine="fused", self_test=False) as handle:
        model(**inputs).loss.backward()
        if when == "after":
            change(model)
        model(**inputs).loss.backward()
        assert handle.fused_layers() == ALL and handle.notes == []


def test_accelerates_hook_is_named():
    model = tiny_model()
    with attach(model, plan_of(model, "skip"), engine="fused", self_test=False) as handle:
        add_hook_to_module(decoder_layers(model)[3].mlp, ModelHook())
        with pytest.raises(UnsupportedModelError, match=r"mlp has a replaced forward \(ModelHook of accelerate"):
            handle.fused_layers()


# The norm before the head

HALF = {
    "norm hook": lambda m: m.model.norm.register_forward_hook(lambda mod, a, out: 0.5 * out),
    "norm pre-hook": lambda m: m.model.norm.register_forward_pre_hook(lambda mod, a: (a[0] + 1.0,)),
    "norm forward": lambda m: setattr(m.model.norm, "forward", lambda x, own=m.model.norm.forward: 0.5 * own(x)),
    "decoder hook": lambda m: m.model.register_forward_hook(_half_of_the_decoders),
}


def _half_of_the_decoders(module, args, output):
    output.last_hidden_state = 0.5 * output.last_hidden_state[..., : 1 << 20]
    return output


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("mode", ["skip", "exact keys"])
@pytest.mark.parametrize("kind", HALF)
def test_hooks_on_the_norm_before_the_head_run(kind, mode, when, monkeypatch):
    """Loss and gradients are the generic executor's, and a note says what that costs."""
    in_double(monkeypatch)
    model, inputs = tiny_model(dtype=torch.float64), batch(48)
    plan = plan_of(model, mode)
    plain = run(model, plan, inputs, "fused")[0]
    if when == "before":
        HALF[kind](model)
    with attach(model, plan, engine="fused", self_test=False) as handle:
        if when == "after":
            model(**inputs)
            HALF[kind](model)
            handle.sparse_batches = 0
        model.zero_grad(set_to_none=True)
        loss = model(**inputs).loss
        loss.backward()
        got = gradients(model)
        assert len(handle.notes) == 1 and "run on all rows" in handle.notes[0]
    wanted_loss, wanted, _ = run(model, plan, inputs, "generic")
    assert relative(loss, wanted_loss) < 1e-10 and relative(loss, plain) > 1e-3
    scale = torch.stack([g.norm() for g in wanted.values()]).norm()
    assert all(float((got[name] - gradient).norm() / scale) < 1e-10 for name, gradient in wanted.items())


def test_a_hook_on_the_last_layer_is_given_all_rows(monkeypatch):
    """What the last layer returns is the dense model's stream, and a note says what that costs."""
    in_double(monkeypatch)
    model, inputs, seen = tiny_model(dtype=torch.float64), batch(48), []
    decoder_layers(model)[-1].register_forward_hook(lambda m, a, out: seen.append(out.detach().clone()))
    model(**inputs)
    with attach(model, plan_of(model, "exact keys"), engine="fused", self_test=False) as handle:
        model(**inputs)
        assert any("the last layer has a forward hook" in note for note in handle.notes)
    assert relative(seen[1], seen[0]) < 1e-10


def test_a_norm_that_is_not_there_yet_is_not_deferred(monkeypatch):
    """FSDP2 gathers the weights of a decoder that is a unit of its own when the decoder is called."""
    model, inputs = tiny_model(), batch(48)
    wanted = run(model, plan_of(model, "exact keys"), inputs, "fused")[0]
    monkeypatch.setattr(model.model.norm.weight, "full_tensor", None, raising=False)
    with attach(model, plan_of(model, "exact keys"), engine="fused", self_test=False) as handle:
        assert relative(model(**inputs).loss, wanted) < 1e-5
        assert any("norm is sharded" in note for note in handle.notes)


@pytest.mark.parametrize("place", ["input_layernorm", "model.norm"])
def test_tuned_norms_are_no_plain_norms(place, asked, monkeypatch):
    """PEFT's LNTuning puts a module around the norm: layers go to the generic engine, the last norm runs itself."""
    in_double(monkeypatch)
    model = get_peft_model(tiny_model(dtype=torch.float64), LNTuningConfig(target_modules=[place]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    inputs, plan = batch(48), plan_of(model, "exact keys")
    wanted_loss, wanted, _ = run(model, plan, inputs, "generic")
    with attach(model, plan, engine="auto", self_test=False) as handle:
        model.zero_grad(set_to_none=True)
        loss = model(**inputs).loss
        loss.backward()
        assert handle.fused_layers() == (ALL if place == "model.norm" else set())
        assert any("not a plain norm" in note for note in handle.notes)
    assert relative(loss, wanted_loss) < 1e-10
    assert wanted and all(relative(x, wanted[name]) < 1e-8 for name, x in gradients(model).items())


def test_a_trained_copy_of_the_norm_has_its_hooks_run(monkeypatch):
    """PEFT's `modules_to_save` puts a copy in force, on which the hook lies."""
    in_double(monkeypatch)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    model = get_peft_model(tiny_model(dtype=torch.float64), config)
    inputs, plan = batch(48), plan_of(model, "exact keys")
    copy = causal_model(model).model.norm.modules_to_save["default"]
    copy.register_forward_hook(lambda mod, a, out: 0.5 * out)
    assert relative(run(model, plan, inputs, "fused")[0], run(model, plan, inputs, "generic")[0]) < 1e-10


# Hooks on the decoder layers themselves


def _watched(model) -> dict[str, list]:
    """Keeps what a layer's hooks are given, and the gradients there."""
    seen = {name: [] for name in ("before", "after", "into", "out")}

    def before(module, args):
        seen["before"].append(args[0])
        args[0].register_hook(seen["out"].append)

    def after(module, args, output):
        seen["after"].append(output)
        output.register_hook(seen["into"].append)

    layer = decoder_layers(model)[1]
    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)
    return seen


def test_hooks_of_a_layer_are_given_what_stays(monkeypatch):
    """The fused engine on all rows: hooks see the dense model's streams and gradients, and what they keep stays."""
    in_double(monkeypatch)
    model, inputs = tiny_model(dtype=torch.float64), batch(48)
    plan = Plan(tuple(LayerPlan() for _ in ALL), scorer="random")
    seen = _watched(model)
    loss = model(**inputs).loss
    loss.backward()
    wanted, wanted_gradients = {name: kept.pop() for name, kept in seen.items()}, gradients(model)
    got_loss, got, _ = run(model, plan, inputs, "fused")
    assert relative(got_loss, loss) < 1e-10
    for name, kept in seen.items():
        assert len(kept) == 1 and relative(kept[0], wanted[name]) < 1e-10, name
    assert all(relative(got[name], gradient) < 1e-8 for name, gradient in wanted_gradients.items())


@pytest.mark.parametrize("mode", ["exact rows", "exact pairs", "exact keys"])
def test_what_hooks_of_a_layer_change_is_in_the_exact_loss(mode, monkeypatch):
    in_double(monkeypatch)
    model, inputs = tiny_model(dtype=torch.float64), batch(48)
    plain = model(**inputs).loss
    decoder_layers(model)[1].register_forward_hook(lambda m, args, output: args[0] + 0.5 * (output - args[0]))
    wanted = model(**inputs).loss
    assert relative(wanted, plain) > 1e-3
    assert relative(run(model, plan_of(model, mode), inputs, "fused")[0], wanted) < 1e-10


def test_loss_of_a_kept_stream_has_its_gradient(monkeypatch):
    """A penalty on what a hook kept: the layers behind it do not write over it."""
    in_double(monkeypatch)
    model, inputs = tiny_model(dtype=torch.float64), batch(48)
    plan, kept = Plan(tuple(LayerPlan() for _ in ALL), scorer="random"), []
    decoder_layers(model)[1].register_forward_hook(lambda m, a, out: kept.append(out))

    def step():
        model.zero_grad(set_to_none=True)
        loss = model(**inputs).loss + 0.1 * kept.pop().pow(2).mean()
        loss.backward()
        return loss.detach(), gradients(model)

    wanted = step()
    with attach(model, plan, engine="fused", self_test=False):
        got = step()
    assert relative(got[0], wanted[0]) < 1e-10
    assert all(relative(got[1][name], gradient) < 1e-8 for name, gradient in wanted[1].items())


def test_backward_hooks_of_a_layer_need_the_generic_engine(asked):
    model, inputs, seen = tiny_model(), batch(48), []
    layer = decoder_layers(model)[1]
    with attach(model, plan_of(model, "skip"), engine="auto", self_test=False) as handle:
        assert handle.fused_layers() == ALL
        layer.register_full_backward_hook(lambda m, before, behind: seen.append((before[0], behind[0])))
        model(**inputs).loss.backward()
        assert handle.fused_layers() == ALL - {1}
        assert any("layer 1): the layer has a backward hook" in note for note in handle.notes)
    assert len(seen) == 1 and all(float(g.norm()) > 0 for g in seen[0])


def test_adapters_without_hooks_stay_in_the_fused_engine():
    """PEFT's own modules, a trained copy of a norm and dropout among them."""
    config = LoraConfig(r=3, target_modules="all-linear", lora_dropout=0.1, modules_to_save=["input_layernorm"])
    model = get_peft_model(tiny_model(), config)
    fill_adapters(model)
    model.enable_input_require_grads()
    with attach(model, plan_of(model, "skip"), engine="fused", self_test=False) as handle:
        model(**batch(48)).loss.backward()
        assert handle.fused_layers() == ALL and handle.notes == []


class _AsIs(torch.autograd.Function):
    """FSDP2's own: hands tensors on to a layer, and is told when their gradients are there."""

    @staticmethod
    def forward(ctx, *inputs):
        return inputs

    @staticmethod
    def backward(ctx, *grads):
        return grads


@pytest.mark.parametrize("mode", ["skip", "exact keys"])
def test_sharded_layers_stay_in_the_fused_engine(mode, monkeypatch):
    """FSDP2's hooks give the layer a view of the stream that nothing may be written into."""
    in_double(monkeypatch)
    model, inputs = tiny_model(dtype=torch.float64), batch(48)
    plan = plan_of(model, mode)
    wanted = run(model, plan, inputs, "fused")

    def before(module, args):
        return _AsIs.apply(*args)

    before.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_state"
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(before)
    got = run(model, plan, inputs, "fused")
    assert torch.equal(got[0], wanted[0])
    assert got[1].keys() == wanted[1].keys() and all(torch.equal(got[1][n], g) for n, g in wanted[1].items())
