"""TRL's DPOTrainer: policy and reference through one model, chosen and rejected answers in one batch."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from lemo.runtime.attach import attach
from tests.integration.plans import exact, keep_all, skipping, supervised_are_kept
from tests.integration.text import sentence, tokenizer
from tests.runtime.oracle import tiny_model

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def pairs() -> Dataset:
    rows = []
    for seed in range(8):
        chosen, rejected = sentence(5 + seed, seed + 50), sentence(9, seed + 100)
        rows.append({"prompt": sentence(40 + seed, seed), "chosen": " " + chosen, "rejected": " " + rejected})
    return Dataset.from_list(rows)


class Observing(DPOTrainer):
    """Checks the rows of every policy forward against the answers."""

    handle = None
    steps = 0

    def _compute_loss(self, model, inputs, return_outputs):
        result = super()._compute_loss(model, inputs, return_outputs)
        if self.handle is not None and self.handle.selections:
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            supervised_are_kept(self.handle.selections, labels)
            self.steps += 1
        return result


def train(folder, plan=None, *, when="before", **changes):
    """Loss and margin curves, adapters, handle."""
    model, handle = tiny_model(), None
    if plan is not None and when == "before":
        handle = attach(model, plan(model), self_test=False)
    settings = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    } | changes
    trainer = Observing(
        model=model,
        args=DPOConfig(**settings),
        train_dataset=pairs(),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    if plan is not None and when == "trainer_model":
        handle = attach(trainer.model, plan(trainer.model), self_test=False)
    trainer.handle = handle
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    curves = [(entry["loss"], entry["rewards/margins"]) for entry in logs]
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return curves, weights, trainer


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("when", ["before", "trainer_model"])
def test_keep_all_is_plain_dpo_bit_for_bit(tmp_path, when, precompute):
    wanted = train(tmp_path, precompute_ref_log_probs=precompute)
    got = train(tmp_path, keep_all, when=when, precompute_ref_log_probs=precompute)
    assert got[0] == wanted[0]
    assert all(torch.equal(got[1][name], weight) for name, weight in wanted[1].items())


@pytest.mark.parametrize("precompute", [False, True])
def test_exact_forward_starts_where_plain_dpo_starts(tmp_path, precompute):
    """All rows run forward, so policy and reference agree before the first step: loss log 2, margin 0."""
    curves, _, trainer = train(tmp_path, exact, precompute_ref_log_probs=precompute)
    wanted = train(tmp_path, precompute_ref_log_probs=precompute)[0]
    assert curves[0] == wanted[0]
    assert curves[0][0] == pytest.approx(0.6931, abs=1e-3)
    assert curves[1] != wanted[1]
    assert trainer.steps == trainer.handle.sparse_batches == 4


def test_skipping_trains_and_says_that_the_reference_is_dense(tmp_path):
    """Policy rows skip, the reference does not: that is said, and answers are in both sets of every layer."""
    curves, weights, trainer = train(tmp_path, skipping)
    assert trainer.steps == trainer.handle.sparse_batches == 4
    assert all(torch.isfinite(torch.tensor(curve)).all() for curve in curves)
    assert any(weight.abs().sum() > 0 for name, weight in weights.items() if "lora_B" in name)
    assert any("forward_ratio 1" in note for note in trainer.handle.notes)


def test_exact_forward_has_nothing_to_say_about_the_reference(tmp_path):
    trainer = train(tmp_path, exact)[2]
    assert not any("without gradients" in note for note in trainer.handle.notes)


def test_two_forwards_before_two_backwards_equal_one_after_the_other():
    """Chosen and rejected through two calls: gradients add up as if each had its own backward."""
    model = tiny_model()
    batches = [torch.randint(3, 128, (1, 64), generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    calls = []
    for ids in batches:
        labels = ids.clone()
        labels[:, :50] = -100
        calls.append({"input_ids": ids, "labels": labels})

    def gradients():
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    for plan in (skipping(model), exact(model), exact(model, gradient="pairs"), skipping(model, kv="kept")):
        for checkpointed in (False, True):
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            with attach(model, plan, self_test=False) as handle:
                for inputs in calls:
                    model(**inputs).loss.backward()
                wanted = gradients()
                first, second = (model(**inputs).loss for inputs in calls)
                first.backward()
                second.backward()
                got = gradients()
                assert handle.sparse_batches == 4
            assert wanted
            assert all(torch.equal(got[name], wanted[name]) for name in wanted)
            model.gradient_checkpointing_disable()
