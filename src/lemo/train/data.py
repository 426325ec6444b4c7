"""From files to batches: `load_windows` reads, cuts and counts, `WindowCollator` pads, others draw rows with loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lemo.config import DataConfig
from lemo.errors import ConfigError
from lemo.train.collate import WindowCollator, WindowDataset
from lemo.train.data_report import DataReport
from lemo.train.documents import Document
from lemo.train.hold_out import note_shared, split_documents
from lemo.train.loss_rows import LossRows
from lemo.train.prompt_rows import PromptRows
from lemo.train.sources import describe_unread, read_documents, write_npz
from lemo.train.windows import Window, WindowCutter, spread

__all__ = [
    "DataReport",
    "Document",
    "LossRows",
    "PromptRows",
    "Window",
    "WindowCollator",
    "WindowCutter",
    "WindowDataset",
    "load_windows",
    "read_documents",
    "token_batches",
    "write_npz",
]


def load_windows(
    config: DataConfig,
    tokenizer: Any,
    split: Literal["train", "validation"] = "train",
    *,
    window_tokens: int | None = None,
    limit: int | None = None,
    vocabulary: int | None = None,
) -> tuple[WindowDataset, DataReport]:
    """Samples of one split.

    Args:
        config: what to read and how to cut it.
        tokenizer: Transformers tokenizer, or None for pre-tokenised data.
        split: which files.
        window_tokens: overrides the window of `config`.
        limit: overrides the limit of the split.
        vocabulary: tokens of .npz data must be below this.

    Raises:
        ConfigError: the split names no files.
        DataError: a file or row cannot be used.
    """
    paths = config.train if split == "train" else config.validation_sources
    if not paths:
        raise ConfigError(
            f"data.{split} is empty: name at least one file or folder"
            + (", or set data.held_out_share" if split == "validation" else "")
        )
    if limit is None:
        limit = config.max_windows if split == "train" else config.validation_windows
    cutter = WindowCutter(
        tokenizer,
        window_tokens or config.window_tokens,
        packing=config.packing,
        remainder=config.remainder,
        answer_only=config.answer_only,
        long_rows=config.long_rows,
        vocabulary=vocabulary,
    )
    fields = {"text_field": config.text_field, "messages_field": config.messages_field}
    documents = read_documents(paths, **fields)
    notes: list[str] = []
    part, advice = f" of data.{split}", ""
    if config.held_out_share and not config.validation:
        documents = split_documents(documents, config.held_out_share, split, notes=notes)
        if split == "validation":
            part = f" held out for validation by data.held_out_share={config.held_out_share}"
            advice = "raise that share, name files in data.validation, "
    elif split == "train" and config.validation:
        documents = note_shared(documents, read_documents(config.validation, **fields), notes)
    unread = describe_unread(paths)
    windows, report = cutter.cut(documents, part, advice)
    report.notes.extend([*notes, unread] if unread else notes)
    return WindowDataset(spread(windows, limit, report)), report


def token_batches(dataset: WindowDataset, collator: Any, batch_size: int = 1) -> Sequence[dict[str, Any]]:
    """All batches of a dataset in order, as calibration and evaluation read them."""
    samples = [dataset[i] for i in range(len(dataset))]
    return [collator(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size)]
