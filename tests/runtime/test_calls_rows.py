"""Which rows of a call carry loss, and which see each other: the same in both engines and in the dense model."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from lemo import attach
from lemo.ops.backend import HostCopy
from lemo.runtime import batch as batch_module
from lemo.runtime.batch import read_layout
from lemo.runtime.model import reads_positions
from tests.runtime.oracle import batch, tiny_model
from tests.runtime.test_exact import in_double
from tests.runtime.test_fused import BOUND, MODES, assert_equal_engines, plan_of, run

ENGINES = ("generic", "fused")
WIDE = torch.float64
BORDER = 20


@pytest.fixture(autouse=True)
def _double(monkeypatch):
    in_double(monkeypatch)


def packed(kind: str) -> dict[str, torch.Tensor]:
    """Two documents in a sequence, told apart by `kind`; loss in the second alone."""
    inputs = batch(48, supervised_from=30)
    if "seq_idx" in kind:
        inputs["seq_idx"] = (torch.arange(48) >= BORDER).long()[None]
    if "lengths" in kind:
        inputs["cu_seq_lens_q"] = torch.tensor([0, BORDER, 48], dtype=torch.int32)
    if "running" in kind:
        inputs["position_ids"] = torch.arange(48)[None]
    if "restarting" in kind:
        inputs["position_ids"] = torch.cat([torch.arange(BORDER), torch.arange(48 - BORDER)])[None]
    return inputs


@pytest.mark.parametrize("kind", ["seq_idx", "lengths", "seq_idx running", "lengths running", "seq_idx restarting"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.startswith("exact")])
def test_documents_do_not_see_each_other(mode, kind):
    """A change in one document changes no loss in the other, in layers that skip and in dense ones."""
    model = tiny_model(dtype=WIDE)
    plan = replace(plan_of(model, mode, dense=(1,)), scorer="recent")
    inputs = packed(kind)
    other = inputs | {"input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, :BORDER] = 7
    for engine in ENGINES:
        loss, wanted, _ = run(model, plan, inputs, engine)
        moved, got, _ = run(model, plan, other, engine)
        assert abs(float(loss - moved)) <= BOUND
        inside = [name for name in wanted if "layers" in name]
        assert all(torch.allclose(got[name], wanted[name], atol=1e-12) for name in inside)
    assert_equal_engines(model, plan, inputs)


@pytest.mark.parametrize("how", ["evaluation", "evaluation, loss only", "training mode", "training mode, no labels"])
def test_documents_do_not_see_each_other_without_gradients(how):
    """Transformers parts them by their positions only where it makes no cache, which it does unless told otherwise."""
    model, inputs = tiny_model(dtype=WIDE), packed("restarting")
    assert model.config.use_cache
    asked = {name: x for name, x in inputs.items() if name != "labels" or "no labels" not in how}
    other = asked | {"input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, :BORDER] = 7
    with attach(model, plan_of(model, "exact keys")) as handle, torch.no_grad():
        model.train("training" in how)
        with handle.loss_only() if "loss only" in how else nullcontext():
            found, moved = model(**asked), model(**other)
    assert found.past_key_values is None
    if "labels" in asked:
        alone = {name: tensor[:, BORDER:] for name, tensor in inputs.items()}
        wanted = float(model(**alone).loss.detach())
        assert abs(float(found.loss) - wanted) <= BOUND * wanted and abs(float(moved.loss) - wanted) <= BOUND * wanted
    if found.logits is not None:
        assert torch.allclose(moved.logits[:, BORDER:], found.logits[:, BORDER:], rtol=0, atol=1e-12)


def test_a_cache_that_is_asked_for_is_made():
    """By the call, by one that it brings, or by an evaluation forward without labels, as generation by hand does."""
    model, inputs = tiny_model(dtype=WIDE), batch(48)
    ids = {"input_ids": inputs["input_ids"]}
    with attach(model, plan_of(model, "exact keys")), torch.no_grad():
        for training in (True, False):
            model.train(training)
            assert model(**inputs, use_cache=True).past_key_values.get_seq_length() == 48
            assert model(**inputs, past_key_values=DynamicCache()).past_key_values.get_seq_length() == 48
        assert model(**ids).past_key_values.get_seq_length() == 48


def test_borders_in_positions_leave_the_dense_pass(monkeypatch):
    """Where dense attention sees the documents by itself, all rows still run in their usual shape."""
    model = tiny_model(dtype=WIDE)
    shapes = []
    model.model.layers[0].mlp.register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape[:2])))
    inputs = {k: torch.cat([v, v]) for k, v in packed("seq_idx restarting").items()}
    run(model, replace(plan_of(model, "exact keys"), scorer="recent"), inputs, "generic")
    assert (2, 48) in shapes


def left_padded(first_labelled: bool) -> dict[str, torch.Tensor]:
    """Two sequences, the second with nine rows of padding in front."""
    inputs = batch(40, rows=2, supervised_from=0)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :9] = 0
    inputs["labels"][1, : 9 if first_labelled else 10] = -100
    return inputs | {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


@pytest.mark.parametrize("loss", ["segmented", "model"])
@pytest.mark.parametrize("counted", ["no", "int", "tensor"])
def test_labels_of_hidden_rows(counted, loss):
    """The label that padding would predict is left out of the loss and its count, in both engines, with a note."""
    model = tiny_model(dtype=WIDE)
    plan = replace(plan_of(model, "exact keys"), scorer="recent")
    got = []
    for first_labelled in (True, False):
        inputs = left_padded(first_labelled)
        items = (inputs["labels"][:, 1:] != -100).sum()
        if counted != "no":
            inputs["num_items_in_batch"] = items if counted == "tensor" else int(items)
        labels = inputs["labels"].clone()
        for engine in ENGINES:
            with attach(model, plan, engine=engine, self_test=False, loss=loss) as handle:
                got.append(float(model(**inputs).loss.detach()))
                assert any("padding" in note for note in handle.notes) == first_labelled
        assert torch.equal(inputs["labels"], labels)
        if not first_labelled:
            got.append(float(model(**inputs).loss.detach()))
    assert max(got) - min(got) <= BOUND * got[0]


def test_shifted_labels_of_hidden_rows():
    """The same where labels come shifted."""
    model = tiny_model(dtype=WIDE)
    plan = replace(plan_of(model, "exact keys"), scorer="recent")
    inputs = left_padded(True)
    shifted = torch.full_like(inputs["labels"], -100)
    shifted[:, :-1] = inputs.pop("labels")[:, 1:]
    wanted = float(run(model, plan, left_padded(False), "generic")[0])
    for engine in ENGINES:
        assert abs(float(run(model, plan, inputs | {"shift_labels": shifted}, engine)[0]) - wanted) <= BOUND * wanted


def test_labels_beside_supervised_rows():
    """Rows of either kind carry loss; the model's loss is that of all labels, in both engines."""
    model = tiny_model(dtype=WIDE)
    plan = replace(plan_of(model, "exact keys"), scorer="recent")
    inputs = batch(48, supervised_from=20)
    dense = float(model(**inputs).loss.detach())
    rows = torch.zeros(1, 48, dtype=torch.bool)
    rows[:, 36:47] = True
    for engine in ENGINES:
        with attach(model, plan, engine=engine, self_test=False) as handle, handle.supervised(rows):
            assert abs(float(model(**inputs).loss.detach()) - dense) <= BOUND * dense


@pytest.mark.parametrize("engine", ENGINES)
def test_ratios_without_real_rows(engine):
    """A batch whose mask hides everything has shares of 0."""
    model, inputs = tiny_model(), batch(48)
    inputs["attention_mask"] = torch.zeros_like(inputs["input_ids"])
    with attach(model, plan_of(model, "exact keys"), engine=engine, self_test=False) as handle:
        model(**inputs)
        assert set(handle.ratios().values()) == {(0.0, 0.0)}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_supervised_padding_without_labels(engine, last):
    """A mask of rows drops no item from a loss that never had it, also on the last row of all."""
    model, inputs = tiny_model(dtype=WIDE), batch(40, rows=2, supervised_from=20)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, 30:] = 0
    inputs["labels"][1, 30:] = -100
    inputs["num_items_in_batch"] = int((inputs["labels"][:, 1:] != -100).sum())
    rows = torch.ones(2, 40, dtype=torch.bool)
    rows[:, -1] = last
    plan = replace(plan_of(model, "exact keys"), scorer="recent")
    with attach(model, plan, engine=engine, self_test=False) as handle:
        wanted = float(model(**inputs).loss.detach())
        with handle.supervised(rows):
            assert abs(float(model(**inputs).loss.detach()) - wanted) <= BOUND * wanted
        assert not any("padding" in note for note in handle.notes)


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("dense", [(), (1,)])
def test_documents_by_positions(family, dense):
    """Apart in both engines, also where the model's own mask does not see the borders, as OPT's."""
    model = tiny_model(family, dtype=WIDE)
    assert reads_positions(model) == (family != "opt")
    inputs = packed("restarting")
    alone = {name: tensor[:, BORDER:] for name, tensor in inputs.items()}
    wanted = float(model(**alone).loss.detach())
    plan = replace(plan_of(model, "exact keys", dense=dense), scorer="recent")
    assert_equal_engines(model, plan, inputs)
    assert abs(float(run(model, plan, inputs, "generic")[0]) - wanted) <= BOUND * wanted


def test_all_copies_begin_before_the_host_waits(monkeypatch):
    """Lengths, positions and mask are on their way to the host when it waits for the first of them."""
    events = []

    class Watched(HostCopy):
        def __init__(self, tensor):
            events.append("begin")
            super().__init__(tensor)

        def read(self):
            events.append("read")
            return super().read()

    monkeypatch.setattr(batch_module, "HostCopy", Watched)
    read_layout(packed("lengths restarting"), None, 4)
    assert events == ["begin", "begin", "read", "read"]
