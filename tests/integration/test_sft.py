"""TRL's SFTTrainer, whose own fused head keeps the loss: keep-all against plain TRL, and what selection may not do."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from lemo.runtime.attach import attach
from tests.integration.plans import documents, exact, keep_all, skipping, supervised_are_kept
from tests.integration.text import sentence, tokenizer
from tests.runtime.oracle import tiny_model

LENGTHS = {"plain": {}, "packed": {"packing": True, "max_length": 160}}
LENGTHS["padding_free"] = {"padding_free": True, "max_length": None}
LENGTHS["wrapped"] = {"packing": True, "packing_strategy": "wrapped", "max_length": 64}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")


def arguments(folder, **changes) -> SFTConfig:
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
        "max_length": 128,
    } | changes
    return SFTConfig(**settings)


def tokens() -> Dataset:
    """Tokenised documents with a mask over what is to be learnt."""
    rows = []
    for sample in documents(16):
        mask = [int(label != -100) for label in sample["labels"]]
        rows.append({"input_ids": sample["input_ids"], "completion_mask": mask})
    return Dataset.from_list(rows)


class Observing(SFTTrainer):
    """Checks the selection of every training step against the labels of its batch."""

    handle = None
    steps = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        labels = inputs["labels"].clone()
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if self.handle is not None and self.handle.selections and model.training:
            supervised_are_kept(self.handle.selections, labels)
            self.steps += 1
        return result


def make(folder, plan, *, when="before", data=None, adapters=True, **changes):
    """A trainer around a tiny model; the plan is attached before the trainer, after PEFT, or on the trainer's model."""
    model, handle = tiny_model(), None
    if plan is not None and when == "before":
        handle = attach(model, plan(model), self_test=False)
    if when == "after_peft":
        torch.manual_seed(42)
        model = get_peft_model(model, lora())
        if plan is not None:
            handle = attach(model, plan(model.get_base_model()), self_test=False)
    trainer = Observing(
        model=model,
        args=arguments(folder, **({"completion_only_loss": True} if data is None else {}) | changes),
        train_dataset=tokens() if data is None else data,
        processing_class=tokenizer(),
        peft_config=lora() if adapters and when != "after_peft" else None,
    )
    if plan is not None and when == "trainer_model":
        handle = attach(trainer.model, plan(trainer.model), self_test=False)
    trainer.handle = handle
    return trainer


def trained(trainer):
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return curve, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def assert_equal(got, wanted):
    assert len(wanted[0]) > 0
    assert got[0] == wanted[0]
    assert {n.replace("base_model.model.", "") for n in got[1]} == {
        n.replace("base_model.model.", "") for n in wanted[1]
    }
    assert all(torch.equal(got[1][name], weight) for name, weight in wanted[1].items())


CASES = [("before", lengths) for lengths in LENGTHS] + [("after_peft", "packed"), ("trainer_model", "plain")]


@pytest.mark.parametrize(("when", "lengths"), CASES)
def test_keep_all_is_plain_trl_bit_for_bit(tmp_path, when, lengths):
    """LoRA, checkpointing on as TRL has it by default: same curve, same adapters."""
    settings = LENGTHS[lengths]
    wanted = trained(make(tmp_path, None, when=when, **settings))  # trainer_model: PEFT wraps as with "before"
    assert_equal(trained(make(tmp_path, keep_all, when=when, **settings)), wanted)


def test_keep_all_is_plain_trl_when_all_weights_train(tmp_path):
    wanted = trained(make(tmp_path, None, adapters=False))
    assert_equal(trained(make(tmp_path, keep_all, adapters=False)), wanted)


@pytest.mark.parametrize(("when", "lengths"), CASES)
def test_selection_trains_and_never_skips_supervised_rows(tmp_path, when, lengths):
    trainer = make(tmp_path, skipping, when=when, **LENGTHS[lengths])
    curve, weights = trained(trainer)
    assert trainer.steps == trainer.handle.sparse_batches >= 3
    assert trainer.handle.dense_batches == 0
    assert all(loss > 0 for loss in curve)
    assert any(weight.abs().sum() > 0 for name, weight in weights.items() if "lora_B" in name)


def test_the_time_of_attaching_changes_nothing(tmp_path):
    """Before the trainer and PEFT, or on the trainer's model: the same training under selection."""
    assert_equal(trained(make(tmp_path, skipping, when="trainer_model")), trained(make(tmp_path, skipping)))


@pytest.mark.parametrize("plan", [skipping, exact])
@pytest.mark.parametrize("lengths", ["packed", "padding_free"])
def test_documents_never_mix(tmp_path, lengths, plan):
    """Another text in one packed document leaves the log-probabilities of all others as they were, bit for bit."""
    trainer = make(tmp_path, plan, **LENGTHS[lengths])
    model = trainer.model.train()
    batch = dict(next(iter(trainer.get_train_dataloader())))
    assert batch["seq_idx"].max() >= 1
    changed = dict(batch)
    first = batch["seq_idx"] == 0
    changed["input_ids"] = torch.where(first & (batch["labels"] == -100), 127 - batch["input_ids"], batch["input_ids"])
    wanted = model(**batch, fused_lm_head=True).log_probs[0].detach()
    got = model(**changed, fused_lm_head=True).log_probs[0].detach()
    mine = first[0, :-1]
    assert trainer.handle.sparse_batches == 2
    assert torch.equal(got[~mine], wanted[~mine])
    assert not torch.equal(got[mine], wanted[mine])
    assert (wanted[~mine] != 0).any()


def test_packing_gives_each_document_the_rows_it_has_alone(tmp_path):
    """TRL's packed batch of documents against the same documents in padded rows: equal loss under selection."""
    packed, alone = (make(tmp_path, skipping, **LENGTHS[name]) for name in ("padding_free", "plain"))
    losses = []
    for trainer in (packed, alone):
        rows = [trainer.train_dataset[i] for i in range(4)]
        batch = trainer.data_collator(rows)
        losses.append(trainer.model.train()(**batch, fused_lm_head=True).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def conversations() -> Dataset:
    rows = []
    for seed in range(8):
        turns = [("user", sentence(14, seed)), ("assistant", sentence(5, seed + 50))]
        turns += [("user", sentence(22, seed + 100)), ("assistant", sentence(7, seed + 150))]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return Dataset.from_list(rows)


def prompts() -> Dataset:
    rows = [{"prompt": sentence(40, s), "completion": " " + sentence(6 + s, s + 50)} for s in range(8)]
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    ("data", "settings", "supervised"),
    [
        (conversations, {"assistant_only_loss": True}, {14}),  # 5 + 7 words and two ends
        (prompts, {"completion_only_loss": True}, set(range(7, 15))),  # 6 to 13 words and an end
    ],
)
@pytest.mark.parametrize("packing", [False, True])
def test_masks_of_trl_decide_what_is_supervised(tmp_path, data, settings, supervised, packing):
    """Only the answers are forced: the rest of the blocks competes, and some of it is skipped."""
    settings = settings | (LENGTHS["packed"] if packing else {})
    trainer = make(tmp_path, lambda m: skipping(m, 0.05), data=data(), **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    if not packing:
        assert set((batch["labels"] != -100).sum(1).tolist()) <= supervised
    trained(trainer)
    assert trainer.steps == trainer.handle.sparse_batches == 4
    assert all(forward < 0.9 for forward, _ in trainer.handle.ratios().values())


def test_keep_all_respects_masks_like_plain_trl(tmp_path):
    settings = {"assistant_only_loss": True, "data": conversations()}
    assert_equal(trained(make(tmp_path, keep_all, **settings)), trained(make(tmp_path, None, **settings)))


def test_trl_head_put_in_while_attached_works_after_detach():
    """TRL keeps the forward that it found; after detach that one must be the model's own."""
    model = tiny_model()
    inputs = {"input_ids": torch.arange(3, 35)[None]}
    inputs["labels"] = inputs["input_ids"].clone()
    wanted = model(**inputs)
    with attach(model, skipping(model), self_test=False):
        add_fused_lm_head(model)
    got = model(**inputs)
    assert torch.equal(got.logits, wanted.logits)
    assert torch.equal(got.loss, wanted.loss)
    assert model(**inputs, fused_lm_head=True).log_probs.shape == (1, 31)


def test_lemo_says_that_trl_keeps_its_head(tmp_path):
    trainer = make(tmp_path, skipping, when="trainer_model")
    assert any("forward was replaced" in note for note in trainer.handle.notes)
