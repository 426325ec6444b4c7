"""Which loss a call has: the model's own wherever it is another than the plain loss of next tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from lemo import attach
from tests.runtime.oracle import batch, gradients, tiny_model
from tests.runtime.test_exact import in_double
from tests.runtime.test_fused import BOUND, plan_of

WIDE = torch.float64


@pytest.fixture(autouse=True)
def _double(monkeypatch):
    in_double(monkeypatch)


def test_router_loss_asked_for_in_the_call():
    """Its weight counts as it does where the configuration asks; the call has the last word."""
    model, inputs = tiny_model("mixtral", dtype=WIDE), batch(48)
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.5
    wanted = {on: float(model(**inputs, output_router_logits=on).loss.detach()) for on in (True, False)}
    assert wanted[True] > wanted[False] + 0.1
    for configured in (False, True):
        model.config.output_router_logits = configured
        with attach(model, plan_of(model, "exact keys"), engine="generic", self_test=False):
            for on in (True, False):
                got = float(model(**inputs, output_router_logits=on).loss.detach())
                assert abs(got - wanted[on]) <= BOUND * wanted[on]


@pytest.mark.parametrize("engine", ["generic", "fused"])
def test_a_loss_function_set_after_attach(engine):
    """It is seen at the next call, and so is that it went."""
    model, inputs = tiny_model(dtype=WIDE), batch(48)
    plain = float(model(**inputs).loss.detach())
    with attach(model, plan_of(model, "exact keys"), engine=engine) as handle:
        model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.float().pow(2).mean()
        own = model(**inputs).loss
        assert abs(float(own.detach()) - plain) > 0.1 and any("loss_function" in note for note in handle.notes)
        own.backward()
        assert gradients(model)
        del model._loss_function
        assert abs(float(model(**inputs).loss.detach()) - plain) <= BOUND * plain
        model.loss_type = "ForTokenClassification"
        handle.notes.clear()
        with pytest.raises(Exception):  # noqa: B017 - that loss takes other arguments, which is not the point here
            model(**inputs, num_labels="none")
        assert any("ForTokenClassification" in note for note in handle.notes)


@pytest.mark.parametrize("engine", ["generic", "fused"])
def test_tuples(engine):
    """A model that returns tuples does so under a plan, and a call may ask for either."""
    model, inputs = tiny_model(dtype=WIDE), batch(48)
    wanted = float(model(**inputs).loss.detach())
    for configured, asked in ((False, None), (True, False), (False, True), (False, False)):
        model.config.return_dict = configured
        with attach(model, plan_of(model, "exact keys"), engine=engine):
            output = model(**inputs, **({} if asked is None else {"return_dict": asked}))
        assert isinstance(output, tuple) == (not asked)
        loss = output.loss if asked else output[0]
        assert abs(float(loss.detach()) - wanted) <= BOUND * wanted


def test_training_in_eval_mode_is_noted_once():
    """Nothing is skipped there; who evaluates under no_grad is not told."""
    model, inputs = tiny_model(), batch(48)
    with attach(model, plan_of(model, "exact keys"), engine="generic", self_test=False) as handle:
        model.eval()
        with torch.no_grad():
            model(**inputs)
        model(input_ids=inputs["input_ids"])
        assert handle.notes == []
        for _ in range(2):
            model(**inputs)
        assert len(handle.notes) == 1 and "eval mode" in handle.notes[0]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_foreign_forward_is_noted_once(when):
    """It computes its own loss, whenever it was put on the model."""
    model, inputs = tiny_model(dtype=WIDE), batch(48)

    def replace_forward():
        own = model.forward
        model.forward = lambda *args, **kwargs: own(*args, **kwargs)

    if when == "before":
        replace_forward()
    with attach(model, plan_of(model, "exact keys"), engine="generic", self_test=False) as handle:
        if when == "after":
            assert model(**inputs).logits is None and handle.notes == []
            replace_forward()
        for _ in range(2):
            assert model(**inputs).logits is not None
        assert len(handle.notes) == 1 and "own loss stays" in handle.notes[0]


def test_mixed_precision_of_accelerate_keeps_the_segmented_loss(request):
    """Its forward around the model's own changes nothing else; a second handle finds a forward that is not its own."""
    model, inputs = tiny_model(), batch(48)
    plan = replace(plan_of(model, "exact keys"), scorer="recent")
    handle = attach(model, plan, engine="generic", self_test=False)
    AcceleratorState._reset_state(True)  # of tests before
    request.addfinalizer(lambda: AcceleratorState._reset_state(True))
    model = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    output = model(**inputs)
    output.loss.backward()
    assert output.logits is None and handle.notes == [] and handle.sparse_batches == 1 and gradients(model)
    handle.detach()
    dense = float(model(**inputs).loss.detach())
    assert abs(float(output.loss.detach()) - dense) < 0.02 * dense
    with attach(model, plan, engine="generic", self_test=False) as handle:
        assert model(**inputs).logits is not None
        assert handle.sparse_batches == 1 and any("own loss stays" in note for note in handle.notes)
