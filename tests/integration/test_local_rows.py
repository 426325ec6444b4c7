"""TRL's SFTTrainer around a collator that marks local loss rows: they reach the layers, and nothing else."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from trl import SFTTrainer

from lemo.core.plan import Plan
from lemo.runtime.attach import attach
from lemo.train.loss_rows import LossRows
from tests.integration.test_sft import LENGTHS, arguments, lora
from tests.integration.text import tokenizer
from tests.runtime.oracle import tiny_model


@pytest.mark.parametrize("lengths", ["plain", "packed", "padding_free"])
def test_marks_reach_the_layers(tmp_path, lengths, monkeypatch):
    from lemo.runtime import context

    part_rows, parted = context.part_rows, []

    def watched(*arguments):
        parted.append(part_rows(*arguments))
        return parted[-1]

    monkeypatch.setattr("lemo.runtime.step.part_rows", watched)
    model, generator = tiny_model(), torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 120, (40 + 9 * i,), generator=generator).tolist() for i in range(8)]
    plan = Plan.uniform(model, backward_ratio=0.25, block_size=4, gradient="keys", context_window=8, kv="all")
    with attach(model, plan, self_test=False) as handle:
        trainer = SFTTrainer(
            model=model,
            args=arguments(tmp_path, **LENGTHS[lengths]),
            train_dataset=Dataset.from_list([{"input_ids": row} for row in rows]),
            processing_class=tokenizer(),
            peft_config=lora(),
        )
        trainer.data_collator = LossRows(trainer.data_collator, 0.2, block_size=4, local_share=0.4)
        trainer.train()
        assert handle.sparse_batches == 4
        assert handle.notes == ["the model's forward was replaced by another library; its own loss stays in force"]
    # Two steps of two batches, four layers.
    assert len(parted) == 16
    assert all(1.5 * len(x.far_n) < len(x.near_n) < 2.5 * len(x.far_n) for x in parted)
