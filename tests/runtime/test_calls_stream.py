"""What others hold of a call stays as it was; layers whose forward others replaced do not run without their rows."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch.nn.modules.module import register_module_forward_hook

from lemo import attach
from lemo.errors import UnsupportedModelError
from lemo.runtime import step
from tests.runtime.oracle import batch, gradients, tiny_model
from tests.runtime.test_fused import plan_of, run

ENGINES = ("generic", "fused")
WIDE = torch.float64


def exact(model, **choices):
    """Exact forward that draws the same rows every time."""
    return replace(plan_of(model, "exact keys", **choices), scorer="recent")


@pytest.mark.parametrize("dense", [(), (0,)])
@pytest.mark.parametrize("engine", ENGINES)
def test_inputs_embeds_stay(engine, dense):
    """The caller's embeddings are read, whether they are a leaf, constant or computed."""
    model, inputs = tiny_model(dtype=WIDE), batch(64, 2)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    leaf = embeds.clone().requires_grad_()
    for given in (embeds, leaf, leaf * 1.0):
        before = given.detach().clone()
        with attach(model, exact(model, dense=dense), engine=engine, self_test=False):
            losses = [float(model(inputs_embeds=given, labels=inputs["labels"]).loss.detach()) for _ in range(3)]
        assert torch.equal(given.detach(), before)
        assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", ["embedding", "layer 0 before", "layer 1 before", "layer 1"])
def test_what_hooks_keep_stays(place, engine):
    """A loss on what a hook kept has the gradient that it has where nothing is written in place."""
    model, inputs = tiny_model(dtype=WIDE), batch(48)
    kept = []

    def keep(x):
        kept.append(x)

    if place == "embedding":
        model.model.embed_tokens.register_forward_hook(lambda m, i, o: keep(o))
    elif place.endswith("before"):
        model.model.layers[int(place[6])].register_forward_pre_hook(lambda m, i: keep(i[0]))
    else:
        model.model.layers[1].register_forward_hook(lambda m, i, o: keep(o))

    def step_of(in_place):
        model.zero_grad(set_to_none=True)
        kept.clear()
        with attach(model, exact(model), engine=engine, self_test=False) as handle:
            handle.in_place = in_place
            loss = model(**inputs).loss
            (loss + 0.1 * kept[0].pow(2).mean()).backward()
        return gradients(model)

    wanted, got = step_of(False), step_of(True)
    assert all(torch.equal(got[name], gradient) for name, gradient in wanted.items())


@pytest.mark.parametrize("engine", ENGINES)
def test_token_ids_without_hooks_pay_no_copy(engine, monkeypatch):
    """All layers write into one stream."""
    model = tiny_model()
    seen = set()
    run_layer = step.run_layer

    def watched(dense_call, x_BTM, *rest):
        output = run_layer(dense_call, x_BTM, *rest)
        seen.add((x_BTM.data_ptr(), output.data_ptr()))
        return output

    monkeypatch.setattr("lemo.runtime.layer.run_layer", watched)
    with attach(model, exact(model), engine=engine, self_test=False):
        model(**batch(64))
    assert len(seen) == 1 and len(set(*seen)) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_forward_replaced_before_attach_is_refused(engine):
    """It would swallow what lemo tells the layer; once its hook is gone, the layer is as good as new."""
    model, inputs = tiny_model(dtype=WIDE), batch(48)
    wanted = run(model, exact(model), inputs, engine)[0]
    for layer in model.model.layers:
        add_hook_to_module(layer, ModelHook())
    with pytest.raises(UnsupportedModelError, match=r"layer 0 .*accelerate.*remove_hook_from_module"):
        attach(model, exact(model), engine=engine, self_test=False)
    for layer in model.model.layers:
        remove_hook_from_module(layer)
    assert torch.equal(run(model, exact(model), inputs, engine)[0], wanted)


def test_hooks_of_accelerate_after_attach_do_not_hinder():
    """They call the forward that they found, lemo's: also after the plan is gone, and when they are gone."""
    model, inputs = tiny_model(dtype=WIDE), batch(48)
    dense = model(**inputs).loss.detach()
    wanted = run(model, exact(model), inputs, "generic")[0]
    handle = attach(model, exact(model), engine="generic", self_test=False)
    for layer in model.model.layers:
        add_hook_to_module(layer, ModelHook())
    assert torch.equal(model(**inputs).loss.detach(), wanted) and handle.sparse_batches == 1
    remove_hook_from_module(model.model.layers[0])
    assert torch.equal(model(**inputs).loss.detach(), wanted)
    handle.detach()
    assert torch.equal(model(**inputs).loss.detach(), dense)
    assert "forward" not in model.model.layers[0].__dict__


@pytest.mark.parametrize("engine", ENGINES)
def test_a_forward_that_drops_the_rows_fails_loudly(engine):
    """A forward put in place after attach that does not call the layer's own."""
    model = tiny_model()
    with attach(model, exact(model), engine=engine, self_test=False):
        layer = model.model.layers[1]
        own = type(layer).__mro__[2].forward
        layer.forward = lambda *args, lemo_call=None, **kwargs: own(layer, *args, **kwargs)
        with pytest.raises(UnsupportedModelError, match=r"layer 1 .*replaced"):
            model(**batch(48))


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_after_detach_says_so(reentrant):
    """The checkpoint of a layer would repeat it without its rows."""
    model = tiny_model()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    plan = replace(exact(model), gradient="rows")
    handle = attach(model, plan, engine="generic", self_test=False)
    loss = model(**batch(48)).loss
    handle.detach()
    with pytest.raises(UnsupportedModelError, match=r"before handle\.detach"):
        loss.backward()


@pytest.mark.parametrize("engine", ["generic", "fused"])
def test_a_hook_that_is_given_rows_is_said(engine):
    """Under exact forward the generic engine loses what a hook changes; the fused one gives it the whole stream."""
    model, inputs = tiny_model(), batch(48)
    plan = replace(plan_of(model, "exact keys"), scorer="recent")
    model.model.layers[1].register_forward_hook(lambda module, args, output: output * 1.5)
    dense = model(**inputs).loss
    with attach(model, plan, engine=engine, self_test=False) as handle:
        found = model(**inputs).loss
    said = [note for note in handle.notes if "layer 1 has a forward hook" in note]
    assert bool(said) == (engine == "generic")
    assert torch.isclose(found, dense, rtol=1e-5) == (engine == "fused")


def test_hooks_of_one_kind_are_said_once():
    model = tiny_model()
    for index in (0, 2):
        model.model.layers[index].register_forward_hook(lambda module, args, output: None)
    plan = replace(plan_of(model, "exact keys"), scorer="recent")
    with attach(model, plan, engine="generic", self_test=False) as handle:
        model(**batch(48))
        said = [note for note in handle.notes if "forward hook" in note]
    assert len(said) == 1 and said[0].startswith("layers 0, 2 have a forward hook"), said


def test_what_hooks_inside_a_layer_keep_stays():
    """Whoever holds what a norm was given holds the stream; the layer then writes into a copy."""
    model, inputs, kept = tiny_model(dtype=WIDE), batch(48), []
    layer = model.model.layers[1]
    with attach(model, exact(model), engine="generic", self_test=False) as handle:
        wanted = model(**inputs).loss.detach()
        hook = layer.input_layernorm.register_forward_pre_hook(lambda m, a: kept.append((a[0], a[0].detach().clone())))
        assert torch.equal(model(**inputs).loss, wanted)
        assert kept and all(torch.equal(x, before) for x, before in kept)
        assert handle._insides.observed(model.model.layers) == {1}
        hook.remove()
        assert not handle._insides.observed(model.model.layers)
        layer.mlp = type(layer.mlp)(model.config).to(WIDE)
        layer.mlp.register_forward_hook(lambda *_: None)
        assert handle._insides.observed(model.model.layers) == {1}


def test_what_global_hooks_keep_stays():
    """Torch calls them for every module; the fused engine, which calls few, leaves the layers to the other."""
    model, inputs, kept = tiny_model(dtype=WIDE), batch(48), []
    plan = exact(model, dense=(0,))
    wanted = run(model, plan, inputs, "generic")[0]

    def keep(module, args, output):
        if isinstance(output, torch.Tensor):
            kept.append((output, output.detach().clone()))

    with attach(model, plan, engine="fused", self_test=False) as handle:
        assert len(handle.fused_layers()) == 4
        hook = register_module_forward_hook(keep)
        try:
            with pytest.raises(UnsupportedModelError, match="global forward hook"):
                handle.fused_layers()
            handle.detach()
            assert torch.equal(run(model, plan, inputs, "generic")[0], wanted)
        finally:
            hook.remove()
    assert kept and all(torch.equal(x, before) for x, before in kept)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_replaced_embedding_keeps_stays(engine):
    model, inputs, kept = tiny_model(dtype=WIDE), batch(48), []
    own = model.model.embed_tokens.forward

    def embed(ids):
        kept.append(own(ids))
        return kept[-1]

    with torch.no_grad():
        wanted = own(inputs["input_ids"])
    model.model.embed_tokens.forward = embed
    run(model, exact(model), inputs, engine)
    assert torch.equal(kept[-1].detach(), wanted)


@pytest.mark.parametrize("mode", ["skip", "exact keys", "exact rows"])
def test_a_step_leaves_no_tensors_to_the_collector(mode):
    """With Python's search for cycles off, the number of tensors does not grow from step to step."""
    model, counts = tiny_model(), []
    gc.collect()
    gc.disable()
    try:
        with attach(model, plan_of(model, mode), engine="generic", self_test=False) as handle:
            for seed in range(5):
                model(**batch(96, supervised_from=60, seed=seed)).loss.backward()
                model.zero_grad(set_to_none=True)
                handle.selections = {}
                counts.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    finally:
        gc.enable()
    assert len(set(counts[2:])) == 1
