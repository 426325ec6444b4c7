"""Exact forward and MLP rows against references written with explicit stop-gradients, in fp64."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from lemo.core.bypass import Bypass
from lemo.core.plan import LayerPlan, Plan
from lemo.errors import ConfigError, UnsupportedModelError
from lemo.families import find_family
from lemo.ops.scatter_rows.reference import bypass_reference
from lemo.runtime.attach import attach
from lemo.runtime.batch import read_layout
from lemo.runtime.model import decoder_layers
from lemo.runtime.pairs import attend_pairs
from lemo.runtime.rows import RowRange
from tests.runtime.oracle import FAMILIES, batch, gradients, relative, tiny_model
from tests.runtime.test_laws import assert_same_gradients, sparse_plan

BOUND = 1e-10


class StopGradient:
    """Dense attention whose scores or keys are constants outside the backward rows; written as plain autograd."""

    def __init__(self, gradient: str) -> None:
        self.gradient, self.seen, self.inside, self.passing = gradient, None, None, None

    def __call__(self, module, query, key, value, mask, scaling=None, softcap=None, **kwargs):
        """query (1, H, T, D); `seen` (T, T) bool, `inside` (T,) bool backward rows.

        `passing` (T, T) bool, if there: pairs whose scores and values pass gradient.
        """
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        inside = self.inside[None, None, :, None]
        if self.gradient != "keys":
            value = torch.where(inside, value, value.detach())
        if self.gradient == "rows":
            key = torch.where(inside, key, key.detach())
        scores = query @ key.transpose(2, 3) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if self.gradient == "pairs":
            scores = torch.where(self.inside, scores, scores.detach())
        if self.passing is not None:
            scores = torch.where(self.passing, scores, scores.detach())
        window = kwargs.get("sliding_window")
        seen = self.seen
        if window is not None:
            position = torch.arange(len(seen))
            seen = seen & (position[:, None] - position[None, :] < window)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        if self.passing is None:
            return (weights @ value).transpose(1, 2), None
        near = weights * self.passing
        return (near @ value + (weights - near) @ value.detach()).transpose(1, 2), None


@contextmanager
def stop_gradients(model, plan, selections, layout):
    """Inside, the dense model has the gradient that the plan's exact forward promises."""
    function = StopGradient(plan.gradient)
    AttentionInterface.register("stopgrad", function)
    AttentionMaskInterface.register("stopgrad", lambda *a, **k: None)
    model.config._attn_implementation_internal = "stopgrad"
    tokens = layout.tokens
    causal = torch.tril(torch.ones(tokens, tokens, dtype=torch.bool))
    with ExitStack() as stack:
        for index, layer in enumerate(decoder_layers(model)):
            forward, backward = (
                torch.zeros(tokens, dtype=torch.bool).index_fill(0, rows, True) for rows in selections[index]
            )
            near = torch.ones_like(causal)
            if plan.context_window is not None:
                near = near_keys(tokens, plan.context_window, plan.block_size)
            seen = causal & (near | backward[:, None])
            _hook_layer(stack, layer, function, seen, forward, backward, plan.layers[index].bypass, plan.kv)
        yield


def near_keys(tokens, window, block):
    """(T, T) bool: own chunk, the chunk before, and the first block; causality not included."""
    position = torch.arange(tokens)
    chunk = position // window
    return (chunk[None, :] >= chunk[:, None] - 1) | (position[None, :] < block)


def _hook_layer(stack, layer, function, causal, forward, backward, bypass, kv):
    inputs = []

    def before(module, args):
        inputs.append(args[0])
        keys = torch.ones_like(forward) if kv == "all" else forward
        function.seen = causal & keys[None, :] | torch.eye(len(forward), dtype=torch.bool)
        function.inside = backward

    def after(module, args, output):
        x = inputs.pop()
        hidden = output[0] if isinstance(output, tuple) else output
        constant = x + (hidden - x).detach()
        y = torch.where(backward[None, :, None], hidden, constant)
        skipped = x
        if bypass is not None:
            skipped = bypass_reference(x[0], bypass.down_MR.to(x), bypass.up_RM.to(x), 1e-6)[None]
        y = torch.where(forward[None, :, None], y, skipped)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    stack.callback(layer.register_forward_pre_hook(before).remove)
    stack.callback(layer.register_forward_hook(after).remove)


def error(model, plan, **options) -> float:
    """Largest relative error of loss and gradients between the executor and the stop-gradient reference."""
    inputs = batch(48, supervised_from=30)
    plain = StopGradient("none")
    plain.inside = torch.ones(48, dtype=torch.bool)
    plain.seen = torch.tril(torch.ones(48, 48, dtype=torch.bool))
    AttentionInterface.register("dense64", plain)  # eager attention would round to fp32
    model.config._attn_implementation_internal = "dense64"
    AttentionMaskInterface.register("dense64", lambda *a, **k: None)
    with attach(model, plan, loss="model", self_test=False, unsafe_no_bypass=True, **options) as handle:
        loss = model(**inputs).loss
        loss.backward()
        got = gradients(model)
        everything = torch.arange(48)
        chosen = {
            i: tuple(everything if r is None else r.chosen() for r in (s.forward, s.backward))
            for i, s in handle.selections.items()
        }
    model.zero_grad(set_to_none=True)
    with stop_gradients(model, plan, chosen, read_layout(inputs, None, plan.block_size)):
        wanted_loss = model(**inputs).loss
        wanted_loss.backward()
    wanted = gradients(model)
    scale = torch.stack([g.norm() for g in wanted.values()]).norm()
    errors = [float((got[n] - wanted[n]).norm() / scale) for n in wanted]
    return max(relative(loss, wanted_loss), *errors)


def in_double(monkeypatch) -> None:
    """Norms and RoPE of some families round to fp32, by `.float()` or by `.to(dtype=torch.float)`; not here."""
    to = torch.Tensor.to

    def wide(x, *args, **kwargs):
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return to(x, *(torch.float64 if value is torch.float32 else value for value in args), **kwargs)

    monkeypatch.setattr(torch.Tensor, "float", lambda x: x.double())
    monkeypatch.setattr(torch.Tensor, "to", wide)


def exact_plan(model, forward: float, gradient: str, kv: str) -> Plan:
    """Backward half of the rows; forward all or most."""
    plan = sparse_plan(model, kv=kv, gradient=gradient)
    layers = tuple(replace(x, forward_ratio=forward, backward_ratio=0.4) for x in plan.layers)
    return replace(plan, layers=layers)


@pytest.mark.parametrize("kv", ["kept", "all"])
@pytest.mark.parametrize("forward", [1.0, 0.75])
@pytest.mark.parametrize("gradient", ["rows", "pairs", "keys"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_the_stop_gradient_reference(family, gradient, forward, kv, monkeypatch):
    """Exact forward, and both budgets together: autograd on the reference gives the same numbers in fp64."""
    in_double(monkeypatch)
    model = tiny_model(family, dtype=torch.float64)
    plan = exact_plan(model, forward, gradient, kv)
    capped = getattr(model.config, "attn_logit_softcapping", None) or "sliding_attention" in (
        getattr(model.config, "layer_types", None) or ()
    )
    if gradient == "pairs" and capped:
        with pytest.raises(UnsupportedModelError, match="gradient='rows'"):
            error(model, plan)
        return
    assert error(model, plan) <= BOUND


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "opt", "gpt_neox", "starcoder2"])
@pytest.mark.parametrize("kv", ["kept", "all"])
def test_own_mlp_rows_are_the_masked_reference(family, kv):
    """MLP rows of their own: the others get the MLP's bypass; equal to a dense MLP whose output is replaced."""
    model, inputs = tiny_model(family, dtype=torch.float64), batch(64)
    generator = torch.Generator().manual_seed(9)
    bypass = Bypass(torch.randn(32, 3, generator=generator) * 0.2, torch.randn(3, 32, generator=generator) * 0.2)
    layers = tuple(LayerPlan(0.6, 0.6, mlp_ratio=0.45, mlp_bypass=bypass) for _ in range(4))
    plan = Plan(layers, block_size=4, scorer="random", kv=kv, mlp="own")
    captured = {}
    with attach(model, plan, loss="model", unsafe_no_bypass=True) as handle:
        run_model = handle._close
        handle._close = lambda context: (captured.update(context.mlp_selections), run_model(context))
        loss = model(**inputs).loss
        loss.backward()
        got = gradients(model)
        rows = {i: s.forward.rows_N for i, s in handle.selections.items()}
    assert all(set(captured[i].rows_N.tolist()) < set(rows[i].tolist()) for i in rows)
    model.zero_grad(set_to_none=True)
    names = find_family(model.config).mlp
    plan_kv = replace(plan, mlp="shared", layers=tuple(replace(x, mlp_ratio=None) for x in layers))
    with ExitStack() as stack:
        for index, layer in enumerate(decoder_layers(model)):
            _hook_mlp(stack, layer, names, rows[index], captured[index].rows_N, bypass)
        from tests.runtime.oracle import masked_oracle

        model.set_attn_implementation("eager")
        with masked_oracle(model, plan_kv, rows, read_layout(inputs, None, 4)):
            wanted_loss = model(**inputs).loss
            wanted_loss.backward()
    wanted = gradients(model)
    assert relative(loss, wanted_loss) < 1e-6  # Transformers' eager softmax runs in fp32
    assert_same_gradients(got, wanted, 1e-6)


def _hook_mlp(stack, layer, names, kept, chosen, bypass):
    inputs = []
    runs = torch.zeros(64, dtype=torch.bool).index_fill(0, chosen, True)

    def before(module, args):
        inputs.append(args[0].reshape(-1, args[0].shape[-1]))

    def after(module, args, output):
        x = inputs.pop()
        update = bypass.to(dtype=x.dtype).update(x)
        return torch.where(runs[:, None], output.reshape(x.shape), update).reshape(output.shape)

    stack.callback(getattr(layer, names[0]).register_forward_pre_hook(before).remove)
    stack.callback(getattr(layer, names[-1]).register_forward_hook(after).remove)


def test_own_mlp_rows_are_refused_with_exact_forward():
    """Exact forward runs every MLP row, so rows of its own would mean nothing."""
    with pytest.raises(ConfigError, match="equal forward and backward"):
        Plan((LayerPlan(1.0, 0.5),), mlp="own")


def test_dropout_is_refused_on_exact_forward():
    """The second pass would draw other dropout masks than the first."""
    model = tiny_model("opt", dropout=0.1)
    plan = Plan.uniform(model, backward_ratio=0.5, block_size=4)
    with attach(model, plan, self_test=False), pytest.raises(UnsupportedModelError, match="dropout"):
        model(**batch())
    skipping = Plan.uniform(model, forward_ratio=0.5, backward_ratio=0.5, block_size=4)
    with attach(model, skipping, unsafe_no_bypass=True):
        assert torch.isfinite(model(**batch()).loss)


def test_jitter_is_refused_on_exact_forward():
    """The second pass would draw other factors than the first; the message names the configuration's key."""
    model = tiny_model("mixtral", router_jitter_noise=0.2)
    plan = Plan.uniform(model, backward_ratio=0.5, block_size=4)
    needed = r"mlp has jitter_noise=0\.2; set router_jitter_noise to 0 in the model's configuration"
    with attach(model, plan, self_test=False):
        with pytest.raises(UnsupportedModelError, match=needed):
            model(**batch())
        model.eval()
        assert torch.isfinite(model(**batch()).loss)
    skipping = Plan.uniform(model, forward_ratio=0.5, backward_ratio=0.5, block_size=4)
    with attach(model.train(), skipping, unsafe_no_bypass=True):
        assert torch.isfinite(model(**batch()).loss)


def test_attention_of_pairs_has_no_second_derivative():
    """Its backward is not differentiable, and says so instead of giving a derivative without it."""
    rows = RowRange.of_batch(read_layout(batch(12), None, 4))
    query, key, value, output = (torch.randn(2, 12, 4, dtype=torch.float64, requires_grad=True) for _ in range(4))
    found = attend_pairs(query, key, value, output.detach(), torch.zeros(2, 12, dtype=torch.float64), rows, 0.5)
    (grad,) = torch.autograd.grad(found.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
