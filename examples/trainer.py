"""lemo under a plain Transformers Trainer: three lines, marked below. Runs in seconds on a tiny random model.

python examples/trainer.py
"""

from __future__ import annotations

import tempfile

import torch
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lemo
from lemo.train.callback import LemoCallback


def samples(count: int, tokens: int = 256) -> list[dict[str, list[int]]]:
    """Random tokens in place of text."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 500, (tokens,), generator=generator).tolist()} for _ in range(count)]


def main() -> lemo.Handle:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    collator = DataCollatorWithFlattening()

    # 1. Every row runs forward, gradient through the rows that carry loss: nothing to calibrate. Rows without loss
    #    attend within chunks of 1,024. lemo.Plan.load(folder) reads a calibrated plan, which may skip rows in forward.
    plan = lemo.Plan.uniform(model, backward_ratio=0.12, gradient="keys", scorer="recent", context_window=1024)
    # 2. Loss on 12 % of the blocks of plain text, which attend to all rows, and on 25 % that attend as rows without
    #    loss do; in runs. Answers-only data needs no draw.
    collator = lemo.LossRows(collator, share=0.12, local_share=0.25, span=1024, repeats_beyond=1024, seed=0)
    # 3. From here on the model's layers leave rows out in training; leaving the block undoes it.
    with lemo.attach(model, plan) as handle, tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=4,
                per_device_train_batch_size=2,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=samples(8),
            data_collator=collator,
            # Optional: logs tokens/s, memory and ratios, draws new loss rows each epoch, evaluates with all labels.
            callbacks=[LemoCallback(handle, loss_rows=collator)],
        )
        trainer.train()
        for layer, (forward, backward) in sorted(handle.ratios().items()):
            print(f"layer {layer}: {forward:.0%} of rows forward, {backward:.0%} with gradient")
    return handle


if __name__ == "__main__":
    main()
