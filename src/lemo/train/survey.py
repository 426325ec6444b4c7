"""What can be found out about a model, data and a machine before a recipe is written, without loading weights."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

from lemo.config import ModelConfig
from lemo.errors import ConfigError, DataError
from lemo.train.chat import has_template
from lemo.train.documents import COMPLETION, PROMPT, TOOLS, Document
from lemo.train.foreign_rows import CONVERSATIONS, INPUT, INSTRUCTION, OUTPUT, SYSTEM, has_speakers
from lemo.train.model import extend_context, find_gguf, load_settings
from lemo.train.rehearsal import check_causal
from lemo.train.sources import list_sources, read_documents, read_first_row
from lemo.train.windows import WindowCutter

KNOWN_CHATS = ("messages", CONVERSATIONS)  # keys of conversations that a recipe does not need to name
_SAMPLED_DOCUMENTS, _SAMPLED_CHARACTERS = 24, 50_000
# What is asked and what is answered, where rows keep them in fields of their own.
_QUESTIONS = ("instruction", "question", "prompt", "query", "input")
_ANSWERS = ("output", "answer", "completion", "response", "chosen")

COUNTED = 64  # samples, of those with most characters, whose tokens are counted


@dataclass(frozen=True)
class ModelFacts:
    """What a model's configuration says.

    Attributes:
        path: as the user named it.
        gguf_file: the only weights in its folder, or None.
        kind: Transformers' model type.
        context_tokens: longest sequence that it was made for; None where it does not say.
        heads: query heads.
        kv_heads: key heads.
        layers: decoder layers.
        vocabulary: number of tokens.
        settings: the configuration itself.
    """

    path: str
    gguf_file: str | None
    kind: str
    context_tokens: int | None
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int
    settings: Any

    def rope_scaling(self, tokens: int) -> Literal["none", "linear", "yarn"] | None:
        """How RoPE reaches a length: `none` within the model's own, None when it cannot."""
        if self.context_tokens is None or tokens <= self.context_tokens:
            return "none"
        # Dividing positions is the plainest way and was measured at twice the length; yarn holds further out.
        method: Literal["linear", "yarn"] = "linear" if tokens <= 2 * self.context_tokens else "yarn"
        try:
            extend_context(deepcopy(self.settings), ModelConfig("", context_length=tokens, rope_scaling=method))
        except ConfigError:
            return None
        return method


@dataclass(frozen=True)
class DataFacts:
    """What a look at the data says. Lengths are in tokens, estimated from characters unless the data is tokenised.

    Attributes:
        kind: `text`, `qas`, `messages`, `completion` for prompts with completions, or `tokens` for tokenised text.
        field: key of the text or conversation; None where files have no keys.
        lengths: of each document.
        longest_tokens: of the longest, counted.
        supervised_share: share of rows that are answers, in the longest sample; None for text.
        unused: keys of the first row that hold text which is not trained on.
    """

    kind: Literal["text", "qas", "messages", "completion", "tokens"]
    field: str | None
    lengths: tuple[int, ...]
    longest_tokens: int
    supervised_share: float | None = None
    unused: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens in all documents."""
        return sum(self.lengths)

    @property
    def answers(self) -> bool:
        """Whether only answers are learned."""
        return self.kind in ("qas", "messages", "completion")


@dataclass(frozen=True)
class MachineFacts:
    """Where a run will be.

    Attributes:
        name: of the GPU, or `CPU`.
        gpu: whether there is one.
        memory_bytes: of the GPU; 0 on a CPU.
        bfloat16: whether it computes in bfloat16 at speed.
    """

    name: str
    gpu: bool
    memory_bytes: int
    bfloat16: bool


def survey_model(path: str) -> ModelFacts:
    """Reads a model's configuration.

    Raises:
        ConfigError: it cannot be read.
    """
    gguf = find_gguf(path)
    settings = load_settings(ModelConfig(path, gguf_file=gguf))
    check_causal(settings, path)
    text = settings.get_text_config()
    heads = text.num_attention_heads
    return ModelFacts(
        path=path,
        gguf_file=gguf,
        kind=text.model_type,
        context_tokens=getattr(text, "max_position_embeddings", None),
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        settings=settings,
    )


def survey_data(paths: Sequence[str], tokenizer: Any, text_field: str | None = None) -> DataFacts:
    """Reads all documents once, tokenises a sample of them, and counts the tokens of the longest by characters.

    Args:
        paths: files or folders.
        tokenizer: of the model; None where all of it is tokenised.
        text_field: key of the text in rows; None finds it.

    Raises:
        DataError: a file or row cannot be used, no key of the rows holds text, or a question and its answer stand in
            keys of their own.
    """
    field, is_chat, unused = _find_field(paths, text_field)
    known = field is None or (is_chat and field in KNOWN_CHATS)
    names = {} if known else {"messages_field" if is_chat else "text_field": field}
    documents = list(read_documents(paths, **names))
    kinds = {_kind(document, tokenizer) for document in documents}
    if len(kinds) > 1:
        if kinds <= {"text", "tokens"}:
            kinds = {"text"}
        else:
            raise DataError(
                f"{paths[0]}: some rows are {' and others '.join(sorted(kinds))}; train on one kind at a time"
            )
    kind = kinds.pop()
    if kind == "tokens":
        lengths = tuple(len(document.tokens_T) for document in documents)  # type: ignore[arg-type]
        return DataFacts(kind, None, lengths, max(lengths))
    sizes = [_characters(document) for document in documents]
    if kind == "text":
        ratio = _tokens_per_character(documents, tokenizer)
        lengths = tuple(
            len(d.tokens_T) if d.tokens_T is not None else max(2, round(size * ratio))
            for d, size in zip(documents, sizes, strict=True)
        )
        return DataFacts(kind, field, lengths, max(lengths), unused=unused)
    # Code and numbers have more tokens a character than prose: the longest is not always the one of most characters.
    most = sorted(range(len(sizes)), key=sizes.__getitem__)[-COUNTED:]
    cutter = WindowCutter(tokenizer, 10**9, answer_only=True)
    counted = [cutter.cut([documents[place]]) for place in most]
    # With what templates and questions add, which can be more than short samples say.
    spread = range(0, len(documents), max(1, len(documents) // _SAMPLED_DOCUMENTS))
    tokens = sum(len(cutter.cut([documents[place]])[0][0].tokens_T) for place in spread)
    ratio = tokens / max(1, sum(sizes[place] for place in spread))
    lengths = tuple(max(2, round(size * ratio)) for size in sizes)
    windows, report = max(counted, key=lambda found: len(found[0][0].tokens_T))
    return DataFacts(kind, field, lengths, len(windows[0].tokens_T), report.supervised_share, unused)


def survey_machine(wanted: Literal["auto", "cpu", "gpu"] = "auto") -> MachineFacts:
    """The GPU or CPU of this machine, or what is assumed of another one.

    `gpu` on a machine without one stands for a card that computes in bfloat16, of unknown memory.
    """
    import torch

    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return MachineFacts("CPU", False, 0, False)
    if not torch.cuda.is_available():
        return MachineFacts("GPU", True, 0, True)
    properties = torch.cuda.get_device_properties(0)
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return MachineFacts(properties.name, True, properties.total_memory, bfloat16)


def _find_field(paths: Sequence[str], text_field: str | None) -> tuple[str | None, bool, tuple[str, ...]]:
    """Key of the text or conversation in the first row that has keys, whether it is a conversation, and keys left."""
    for path in list_sources(paths):
        row = read_first_row(path)
        if row is None:
            continue
        texts = [name for name, value in row.items() if isinstance(value, str) and value.strip()]
        completed = PROMPT in row and COMPLETION in row
        for name in (*KNOWN_CHATS, *row):
            if _is_conversation(row.get(name)) and not (completed and name in (PROMPT, COMPLETION)):
                if text_field is not None:
                    raise DataError(f"{path}, row 1: {name!r} is a conversation, so no text field is needed")
                read = (TOOLS, SYSTEM) if has_speakers(row[name]) else (TOOLS,)
                return name, True, tuple(key for key in texts if key not in read)
        if text_field is not None:
            chosen = text_field
        elif completed and "text" not in row:
            return None, False, tuple(name for name in texts if name not in (PROMPT, COMPLETION))
        elif INSTRUCTION in row and OUTPUT in row and "text" not in row:
            read = (INSTRUCTION, INPUT, OUTPUT, SYSTEM)
            return None, False, tuple(name for name in texts if name not in read)
        elif not texts:
            raise DataError(f"{path}, row 1: no field holds text or messages (fields: {', '.join(row) or 'none'})")
        elif "text" in texts:
            chosen = "text"
        else:
            _refuse_pair(texts, f"{path}, row 1")
            chosen = max(texts, key=lambda name: len(row[name]))
        return chosen, False, tuple(name for name in texts if name != chosen)
    return None, False, ()


def _refuse_pair(texts: Sequence[str], place: str) -> None:
    """Raises DataError for a question and its answer in fields of their own: one alone would be trained on."""
    asked = next((name for name in _QUESTIONS if name in texts), None)
    answered = next((name for name in _ANSWERS if name in texts), None)
    if asked is not None and answered is not None:
        row = (
            f'{{"messages": [{{"role": "user", "content": <{asked}>}}, '
            f'{{"role": "assistant", "content": <{answered}>}}]}}'
        )
        raise DataError(
            f"{place}: {asked!r} and {answered!r} are two fields, of which one alone would be trained on; rename them "
            f"{PROMPT!r} and {COMPLETION!r}, or for the chat template write each row as {row}; if one of them is plain "
            "text, name it: data.text_field=KEY"
        )


def _is_conversation(value: Any) -> bool:
    if has_speakers(value):
        return True
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def _kind(document: Document, tokenizer: Any) -> Literal["text", "qas", "messages", "completion", "tokens"]:
    if document.messages and (has_template(tokenizer) or not document.completion):
        return "messages"
    if document.turns:
        return "qas"
    if document.completion:
        return "completion"
    return "text" if document.tokens_T is None else "tokens"


def _texts(document: Document) -> list[str]:
    """All text of a document."""
    if document.messages:
        return [message["content"] for message in document.messages]
    turns = [part for turn in document.turns for part in (turn.question, turn.answer)]
    return [document.text or "", document.completion, *turns]


def _characters(document: Document) -> int:
    return sum(map(len, _texts(document)))


def _tokens_per_character(documents: Sequence[Document], tokenizer: Any) -> float:
    """Tokens that a character takes, over a sample spread over the documents."""
    if tokenizer is None:
        raise DataError("text needs a tokenizer, and the model folder has none; use pre-tokenised .npz data")
    plain = [document for document in documents if document.tokens_T is None]
    step = max(1, len(plain) // _SAMPLED_DOCUMENTS)
    texts = ["\n".join(_texts(document))[:_SAMPLED_CHARACTERS] for document in plain[::step]]
    tokens = sum(len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts)
    return tokens / max(1, sum(map(len, texts)))
