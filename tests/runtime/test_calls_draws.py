"""Draws belong to training forwards, one each, whoever else calls the model and however often backward repeats it."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lemo import attach
from lemo.errors import UnsupportedModelError
from tests.runtime.oracle import batch, gradients, tiny_model
from tests.runtime.test_fused import plan_of

ENGINES = ("generic", "fused")
WIDE = torch.float64


def drawn(model, **choices):
    """A plan that draws its rows anew every step."""
    return plan_of(model, "exact rows", **choices)


def stepped(model, engine: str, batches, checkpointed: bool, plan=None):
    """Gradients of two steps, each with two micro-batches whose backward comes after both forwards."""
    found = []

    def loss_of(ids, labels):
        return model(input_ids=ids, labels=labels).loss

    with attach(model, drawn(model) if plan is None else plan, engine=engine, self_test=False) as handle:
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            losses = []
            for one in batches:
                inputs = one["input_ids"], one["labels"]
                losses.append(checkpoint(loss_of, *inputs, use_reentrant=False) if checkpointed else loss_of(*inputs))
            sum(losses).backward()
            found.append(gradients(model))
        return found, handle.sparse_batches


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_around_the_model_repeats_its_draw(engine):
    """Gradients of checkpointed calls are those of plain ones, and later draws are the same."""
    model = tiny_model(dtype=WIDE)
    batches = [batch(64, 2, supervised_from=58, seed=seed) for seed in (1, 2)]
    (wanted, count), (got, counted) = (stepped(model, engine, batches, on) for on in (False, True))
    assert count == counted == 4
    assert not torch.equal(*(found["model.embed_tokens.weight"] for found in wanted))
    for one, other in zip(wanted, got, strict=True):
        assert all(torch.allclose(other[name], gradient, rtol=0, atol=1e-12) for name, gradient in one.items())


def repeat_of_new_tensors(model):
    """A checkpoint that makes the model's inputs inside."""
    one = batch(64, 2, supervised_from=58)
    loss = checkpoint(
        lambda ids: model(input_ids=ids.clone(), labels=one["labels"]).loss, one["input_ids"], use_reentrant=False
    )
    loss.backward()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_repeated_draw_that_cannot_be_told(engine):
    """Tensors that backward makes anew: refused where rows are drawn, fine where they are not."""
    model = tiny_model(dtype=WIDE)
    with (
        attach(model, drawn(model), engine=engine, self_test=False) as handle,
        pytest.raises(UnsupportedModelError, match="which rows were drawn"),
    ):
        repeat_of_new_tensors(model)
    with attach(model, replace(drawn(model), scorer="recent"), engine=engine, self_test=False) as handle:
        repeat_of_new_tensors(model)
        assert handle.sparse_batches == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_tensors_twice_before_backward(engine):
    """Each repetition has its own draw: backward comes to what the call returned before it repeats the call."""
    model, one = tiny_model(dtype=WIDE), batch(64, 2, supervised_from=58)
    (wanted, count), (got, counted) = (stepped(model, engine, [one, one], on) for on in (False, True))
    assert count == counted
    assert all(torch.allclose(got[1][name], gradient, rtol=0, atol=1e-12) for name, gradient in wanted[1].items())


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_forwards_without_backward_leave_no_draw(engine, kept):
    """A step that was left out, and plain ones, whether somebody keeps their loss or not."""
    model, one = tiny_model(dtype=WIDE), batch(64, 2, supervised_from=58)
    inputs, losses = (one["input_ids"], one["labels"]), []

    def loss_of(ids, labels):
        return model(input_ids=ids, labels=labels).loss

    found = []
    for on in (False, True):
        with attach(model, drawn(model), engine=engine, self_test=False):
            losses.append(checkpoint(loss_of, *inputs, use_reentrant=False))
            losses.append(loss_of(*inputs))
            losses[-1].backward()
            if not kept:
                losses.clear()
            model.zero_grad(set_to_none=True)
            (checkpoint(loss_of, *inputs, use_reentrant=False) if on else loss_of(*inputs)).backward()
        found.append(gradients(model))
    assert all(torch.allclose(found[1][name], x, rtol=0, atol=1e-12) for name, x in found[0].items())


@pytest.mark.parametrize("passed", [False, True])
def test_reentrant_checkpoints_after_plain_steps(passed):
    """They are told from others by their first call, which has no gradients; their inputs are passed or found."""
    model, inputs = tiny_model(dtype=WIDE), batch(64, supervised_from=58)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    with attach(model, drawn(model), engine="generic", self_test=False) as handle:
        for count in (2, 4):
            model(**inputs).loss.backward()
            if passed:
                checkpoint(
                    lambda x: model(inputs_embeds=x, labels=inputs["labels"]).loss, embeds, use_reentrant=True
                ).backward()
            else:
                anchor = torch.zeros((), requires_grad=True)
                checkpoint(lambda a: model(**inputs).loss + a, anchor, use_reentrant=True).backward()
            assert handle.sparse_batches == count


@pytest.mark.parametrize("engine", ENGINES)
def test_a_repetition_under_another_handle_is_refused(engine):
    """It would make another draw."""
    model, one = tiny_model(dtype=WIDE), batch(64, 2, supervised_from=58)
    with attach(model, drawn(model), engine=engine, self_test=False):
        loss = checkpoint(
            lambda ids: model(input_ids=ids, labels=one["labels"]).loss, one["input_ids"], use_reentrant=False
        )
    with (
        attach(model, drawn(model), engine=engine, self_test=False),
        pytest.raises(UnsupportedModelError, match="same attached plan"),
    ):
        loss.backward()


@pytest.mark.parametrize("layers", [False, True])
def test_other_checkpoints_are_left_alone(layers):
    """Those of layers, which repeat no call of the model, and reentrant ones, whose first call draws nothing."""
    model, inputs = tiny_model(dtype=WIDE), batch(64)
    if layers:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with attach(model, drawn(model), engine="generic", self_test=False) as handle:
        for count in (1, 2):
            anchor = torch.zeros((), requires_grad=True)
            if layers:
                model(**inputs).loss.backward()
            else:
                checkpoint(lambda a: model(**inputs).loss + a, anchor, use_reentrant=True).backward()
            assert handle.sparse_batches == count


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_moves_no_draw(engine):
    """How often one evaluates changes no later training step."""
    model, inputs = tiny_model(dtype=WIDE), batch(64, supervised_from=58)
    found = {}
    for evaluations in (0, 3):
        with attach(model, drawn(model), engine=engine, self_test=False, sparse_eval=True) as handle:
            rows = []
            for _ in range(3):
                model(**inputs)
                rows.append(handle.selections[0].backward.rows_N)
                model.eval()
                with torch.no_grad():
                    for _ in range(evaluations):
                        model(**inputs)
                model.train()
            found[evaluations] = rows
    assert all(torch.equal(one, other) for one, other in zip(*found.values(), strict=True))
    assert not torch.equal(found[0][0], found[0][1])
    assert (handle.sparse_batches, handle.sparse_evaluations) == (3, 9)


def held_up():
    """A hook that holds up forwards of other threads than the main one, the event of one inside, and that to go on."""
    inside, go_on = threading.Event(), threading.Event()

    def wait(module, args):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go_on.wait(30)

    return inside, go_on, wait


def test_one_forward_at_a_time():
    """A forward that begins inside another thread's is refused; the running one is right, and later ones too."""
    model = tiny_model(dtype=WIDE)
    plan = replace(drawn(model), scorer="recent")
    inside, go_on, wait = held_up()
    found = []

    with attach(model, plan, engine="generic", self_test=False):
        wanted = float(model(**batch(64)).loss.detach())
        hook = model.model.norm.register_forward_pre_hook(wait)
        thread = threading.Thread(target=lambda: found.append(float(model(**batch(64)).loss.detach())))
        thread.start()
        assert inside.wait(30)
        try:
            with pytest.raises(UnsupportedModelError, match="another thread"):
                model(**batch(64, seed=3))
        finally:
            go_on.set()
            thread.join()
        hook.remove()
        assert found == [wanted] == [float(model(**batch(64)).loss.detach())]


def test_dense_forwards_share():
    """Scoring and generation in several threads need no batch; a training forward beside them is refused."""
    model, inputs = tiny_model(dtype=WIDE), batch(64)
    inside, go_on, wait = held_up()
    found = []

    def score():
        with torch.no_grad():
            found.append(float(model(**inputs).loss))

    with attach(model, drawn(model), engine="generic", self_test=False):
        score()
        hook = model.model.norm.register_forward_pre_hook(wait)
        thread = threading.Thread(target=score)
        thread.start()
        assert inside.wait(30)
        try:
            score()
            with torch.no_grad():
                model.eval().generate(inputs["input_ids"], max_new_tokens=2)
            with pytest.raises(UnsupportedModelError, match="another thread"):
                model.train()(**inputs)
        finally:
            go_on.set()
            thread.join()
        hook.remove()
        model(**inputs).loss.backward()
    assert len(found) == 3 and len(set(found)) == 1


def test_replicas_of_data_parallel_are_refused():
    """They share one handle."""
    model = tiny_model()
    with attach(model, drawn(model), engine="generic", self_test=False):
        replica = model._replicate_for_data_parallel()
        assert isinstance(replica, nn.Module)
        with pytest.raises(UnsupportedModelError, match="torchrun"):
            replica(**batch(48))
