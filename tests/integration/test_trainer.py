"""Transformers' Trainer, not subclassed: losses and weights with a plan attached against the plain library's."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

from lemo.errors import LabelsError
from lemo.runtime.attach import attach
from tests.integration.plans import documents, exact, keep_all, padded, skipping, supervised_are_kept
from tests.runtime.oracle import relative, tiny_model


def arguments(folder, **changes) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
    } | changes
    return TrainingArguments(**settings)


def train(folder, plan=None, *, loss="model", trainer_class=Trainer, seed=0, **changes):
    """Loss curve and final weights of a few steps, and the handle."""
    model = tiny_model(seed=seed)
    handle = None if plan is None else attach(model, plan(model), loss=loss, self_test=False)
    trainer = trainer_class(
        model=model, args=arguments(folder, **changes), train_dataset=documents(12), data_collator=padded
    )
    trainer.lemo_handle = handle
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return curve, {n: p.detach().clone() for n, p in model.named_parameters()}, handle


def assert_close(got, wanted, bound):
    assert torch.allclose(torch.tensor(got[0]), torch.tensor(wanted[0]), rtol=bound, atol=0)
    assert len(got[0]) == len(wanted[0]) > 0
    for name, weight in wanted[1].items():
        assert relative(got[1][name], weight) <= bound, name


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_keep_all_trains_bit_for_bit_like_the_plain_trainer(tmp_path, average, batch_size):
    """Accumulation over micro-batches with 2 to 19 supervised tokens: same curve, same weights."""
    settings = {"average_tokens_across_devices": average, "per_device_train_batch_size": batch_size, "max_steps": 2}
    settings["gradient_accumulation_steps"] = 4 if batch_size == 1 else 2
    wanted = train(tmp_path, **settings)
    got = train(tmp_path, keep_all, **settings)
    assert got[0] == wanted[0]
    assert all(torch.equal(got[1][name], weight) for name, weight in wanted[1].items())


def test_segmented_loss_trains_like_the_plain_trainer(tmp_path):
    """`num_items_in_batch` of the accumulation window reaches the segmented loss: equal within fp32 rounding."""
    got = train(tmp_path, keep_all, loss="segmented")
    assert_close(got, train(tmp_path), 1e-5)


def test_exact_forward_starts_at_the_plain_loss(tmp_path):
    """All rows forward: the first logged loss is the dense one; then gradients, and with them weights, differ."""
    got, wanted = train(tmp_path, exact), train(tmp_path)
    assert got[0][0] == wanted[0][0]
    assert got[0][1:] != wanted[0][1:]
    assert got[2].sparse_batches == 12
    assert got[2].dense_batches == 0


@pytest.mark.parametrize("plan", [skipping, exact])
@pytest.mark.parametrize("loss", ["model", "segmented"])
def test_accumulation_equals_one_large_batch_under_selection(tmp_path, plan, loss):
    """Selection is per document: four micro-batches of one document train like one padded batch of four."""
    one_by_one = train(tmp_path, plan, loss=loss)
    together = train(tmp_path, plan, loss=loss, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    assert one_by_one[2].sparse_batches == 12
    assert together[2].sparse_batches == 3
    assert_close(one_by_one, together, 1e-5)


class Observing(Trainer):
    """Looks at the selection of every training step."""

    seen = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            supervised_are_kept(self.lemo_handle.selections, inputs["labels"])
            type(self).seen += 1
        return result


def test_supervised_rows_are_never_skipped(tmp_path):
    """In no micro-batch, under a ratio that leaves hardly anything else."""
    Observing.seen = 0
    train(tmp_path, lambda m: skipping(m, 0.05), trainer_class=Observing)
    assert Observing.seen == 12


def test_evaluation_inside_training_is_the_dense_model(tmp_path):
    """`trainer.evaluate` runs densely: the same number as without lemo."""
    model, samples = tiny_model(), documents(4)
    settings = arguments(tmp_path, per_device_eval_batch_size=2)
    wanted = Trainer(model=model, args=settings, eval_dataset=samples, data_collator=padded).evaluate()["eval_loss"]
    with attach(model, skipping(model), self_test=False) as handle:
        trainer = Trainer(model=model, args=settings, eval_dataset=samples, data_collator=padded)
        assert trainer.evaluate()["eval_loss"] == wanted
        with handle.loss_only():
            assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-6)
    assert not handle.selections


class Stating(Trainer):
    """Label smoothing under selection: states which rows carry loss, because Trainer takes the labels away."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        mask_BT = torch.zeros_like(inputs["labels"], dtype=torch.bool)
        mask_BT[:, :-1] = inputs["labels"][:, 1:] != -100
        labels = inputs["labels"].clone()
        with self.lemo_handle.supervised(mask_BT):
            result = super().compute_loss(model, inputs, *args, **kwargs)
        supervised_are_kept(self.lemo_handle.selections, labels)
        return result


def test_label_smoothing_keep_all_is_plain(tmp_path):
    wanted = train(tmp_path, label_smoothing_factor=0.1)
    got = train(tmp_path, lambda model: keep_all(model, 1.0), loss="segmented", label_smoothing_factor=0.1)
    assert got[0] == wanted[0]
    assert all(torch.equal(got[1][name], weight) for name, weight in wanted[1].items())


def test_label_smoothing_under_selection_asks_for_a_statement(tmp_path):
    with pytest.raises(LabelsError, match=r"handle\.supervised"):
        train(tmp_path, skipping, label_smoothing_factor=0.1)


@pytest.mark.parametrize("loss", ["model", "segmented"])
def test_label_smoothing_under_selection_trains_with_a_statement(tmp_path, loss):
    """The smoothed loss is Trainer's own, of the exact forward's logits: the first value is the dense one."""
    wanted = train(tmp_path, label_smoothing_factor=0.1)
    got = train(tmp_path, exact, loss=loss, trainer_class=Stating, label_smoothing_factor=0.1)
    assert got[0][0] == wanted[0][0]
    assert got[0][-1] < got[0][0]
    assert got[2].sparse_batches == 12
