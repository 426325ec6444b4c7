"""A word-level tokenizer and texts for TRL's trainers, made up on the spot."""

from __future__ import annotations

import random

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>")
WORDS = tuple(f"w{i}" for i in range(128 - len(SPECIAL)))
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}<user> {{ message.content }} "
    "{% else %}<assistant> {% generation %}{{ message.content }} <eos>{% endgeneration %} {% endif %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; 128 of them, as many as the tiny models know."""
    words = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def sentence(words: int, seed: int) -> str:
    """Random words."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))
