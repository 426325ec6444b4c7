"""lemo under TRL's SFTTrainer with packing and LoRA: the same three lines. Runs in seconds on a tiny random model.

pip install 'lemo[trl]'
python examples/trl_sft.py
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

import lemo
from lemo.train.callback import LemoCallback


def pretokenised(count: int) -> Dataset:
    """Random tokens of different lengths in place of text."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(60, 250, (count,), generator=generator).tolist()
    return Dataset.from_list(
        [{"input_ids": torch.randint(3, 500, (n,), generator=generator).tolist()} for n in lengths]
    )


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
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                max_steps=4,
                max_length=256,
                packing=True,
                per_device_train_batch_size=2,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                bf16=False,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=pretokenised(16),
            processing_class=tokenizer(),
            peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        )
        # 1. Every row runs forward, gradient through the rows that carry loss: nothing to calibrate. Rows without loss
        #    attend within chunks: of 32 rows here, since the samples are short; the default is 1,024.
        layers = {"backward_ratio": 0.12, "gradient": "keys", "scorer": "recent", "context_window": 32}
        plan = lemo.Plan.uniform(trainer.model, block_size=16, **layers)
        # 2. Loss on 12 % of the blocks, which attend to all rows, and on 25 % that attend within chunks. For chats,
        #    SFTConfig(assistant_only_loss=True) does what is needed instead, and scorer="words" in the plan.
        shares = {"share": 0.12, "local_share": 0.25, "span": 1024, "repeats_beyond": 32}
        trainer.data_collator = lemo.LossRows(trainer.data_collator, block_size=16, **shares)
        # 3. The layers leave rows out in training; SFTTrainer keeps its own loss.
        with lemo.attach(trainer.model, plan) as handle:
            trainer.add_callback(LemoCallback(handle, loss_rows=trainer.data_collator))
            trainer.train()
            for layer, (forward, backward) in sorted(handle.ratios().items()):
                print(f"layer {layer}: {forward:.0%} of rows forward, {backward:.0%} with gradient")
        for note in handle.notes:
            print("note:", note)
    return handle


def tokenizer():
    """A tokenizer of 512 words, since the tokens are random."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(512)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")),
        pad_token="w0",
        eos_token="w1",
        unk_token="w2",
    )


if __name__ == "__main__":
    main()
