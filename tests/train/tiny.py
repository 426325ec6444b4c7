"""A tiny tokenizer and a tiny model, made in code."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 259  # 256 bytes, padding, end of text, unknown


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; `<end>` ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<end>": 1, "<unknown>": 2, **{c: i + 3 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    )


def tiny_llama(layers: int = 3, **overrides) -> LlamaForCausalLM:
    """A random Llama with the vocabulary of `byte_tokenizer`."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        **overrides,
    }
    return LlamaForCausalLM(LlamaConfig(**settings))


def save_tiny_model(folder: Path, **overrides) -> Path:
    """Folder with a tiny model and its tokenizer."""
    tiny_llama(**overrides).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def words(count: int, seed: int = 0) -> str:
    """Text of `count` short words."""
    import random

    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(count))


def save_empty_checkpoint(folder: Path, processes: int = 1) -> None:
    """The files that make a checkpoint of a run whole, with nothing in them."""
    folder.mkdir(parents=True)
    states = ["lemo.json", *(f"lemo-{rank}.json" for rank in range(1, processes))]
    for name in ("trainer_state.json", *states):
        (folder / name).write_text("{}")
    random = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    for name in ("optimizer.pt", "scheduler.pt", *random):
        torch.save({}, folder / name)
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
