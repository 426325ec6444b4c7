"""Writes the recipe of `lemo init`: every line with the reason for its value."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from lemo.cli.presets import PRESETS, Preset
from lemo.cli.recipe import dump_value
from lemo.cli.shape import HELD_OUT, Shape, Wish, find_shape, room_for
from lemo.train.survey import KNOWN_CHATS, DataFacts, MachineFacts, ModelFacts

PROMPT_SHARE, CPU_STEPS = 0.1, 20
_COMMENT_COLUMN = 36

KINDS = {
    "qas": "documents with questions",
    "messages": "conversations",
    "completion": "prompts with completions",
    "tokens": "tokenised text",
    "text": "text",
}

Line = tuple[str, Any, str]


def draft_recipe(wish: Wish, model: ModelFacts, data: DataFacts, machine: MachineFacts) -> str:
    """A recipe as commented YAML."""
    preset = PRESETS[wish.preset]
    shape = find_shape(wish, model, data, machine)
    sections = {
        "model": _model(model, shape, machine),
        "data": _data(wish, data, shape, machine),
        "loss_rows": _loss_rows(data, shape, preset),
        "sparsity": _sparsity(data, shape, preset),
        "lora": _lora(),
        "training": _training(shape, machine),
    }
    about = f"{model.kind} with {model.layers} layers, {data.tokens:,} tokens of {KINDS[data.kind]}, {machine.name}"
    about += f"; preset {wish.preset}: {_about(data, preset)}."
    parts = [
        "# Every key can be replaced on the command line: lemo train RECIPE training.learning_rate=1e-4",
        *textwrap.wrap(about, 110, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False),
        "# Keys that are not here keep their defaults; lemo schema lists all.",
        *_render([("output", wish.output, "receives adapter, plan, metrics and the resolved recipe")], ""),
    ]
    for name, lines in sections.items():
        if lines:
            parts += ["", f"{name}:", *_render(lines, "  ")]
    return "\n".join(parts) + "\n"


def count_rows(data: DataFacts) -> str:
    """How many rows of which kind there are, in words."""
    count, s = len(data.lengths), "" if len(data.lengths) == 1 else "s"
    kinds = {
        "qas": f"document{s} with questions",
        "messages": f"conversation{s}",
        "completion": f"prompt{s} with {'a completion' if count == 1 else 'completions'}",
        "tokens": f"tokenised document{s}",
        "text": f"document{s}",
    }
    return f"{count:,} {kinds[data.kind]}"


def _about(data: DataFacts, preset: Preset) -> str:
    """What the preset does with such data."""
    if not data.answers:
        return preset.about
    return f"every row runs forward, those of answers carry loss, {preset.loss_share:.0%} of all pass gradient"


def _model(model: ModelFacts, shape: Shape, machine: MachineFacts) -> list[Line]:
    lines: list[Line] = [("path", model.path, "a model folder, a hub name, or package:NAME")]
    if model.gguf_file:
        lines.append(("gguf_file", model.gguf_file, "the only weights there"))
    if not machine.gpu:
        lines.append(("dtype", "float32", "the fastest on most CPUs; bfloat16 takes half the memory"))
    elif machine.bfloat16:
        lines.append(("dtype", "bfloat16", "what the GPU computes fastest"))
    else:
        lines.append(("dtype", "float32", "the GPU has no bfloat16"))
    if shape.rope_scaling != "none":
        times = shape.window_tokens / (model.context_tokens or 1)
        lines.append(
            ("context_length", shape.window_tokens, f"{times:.1f} times the model's own of {model.context_tokens:,}")
        )
        how = "positions are divided by the factor" if shape.rope_scaling == "linear" else "interpolated by frequency"
        lines.append(("rope_scaling", shape.rope_scaling, how))
    return lines


def _data(wish: Wish, data: DataFacts, shape: Shape, machine: MachineFacts) -> list[Line]:
    lines: list[Line] = [("train", list(wish.train), "files or folders of text, rows or tokens")]
    if wish.validation:
        lines.append(("validation", list(wish.validation), "its loss is measured before and after"))
    elif not data.answers or len(data.lengths) > 1:  # a single sample cannot be shared out
        lines.append(("held_out_share", HELD_OUT, "of the training data, for validation: no files were named"))
    lines.append(("window_tokens", shape.window_tokens, shape.why))
    if not machine.gpu:
        lines.append(("validation_windows", 2, "of it; few, since a CPU takes seconds for each"))
    if data.kind == "messages" and data.field not in (None, *KNOWN_CHATS):
        lines.append(("messages_field", data.field, "key of the conversation in each row"))
    left = f"not used: {', '.join(data.unused)}" if data.unused else ""
    if data.field is not None and data.kind != "messages" and (data.field != "text" or left):
        lines.append(("text_field", data.field, "key of the text in each row" + (f"; {left}" if left else "")))
    if data.answers:
        share = data.supervised_share or 0.0
        lines.append(("answer_only", True, f"answers carry loss: {share:.1%} of the rows of the longest sample"))
        rule = "truncate" if shape.truncate else "error"
        what = "what happens to longer samples: error, truncate or drop"
        if shape.dropped:
            count = f"about {shape.dropped:,} of {len(data.lengths):,}"
            rule, what = "drop", f"leaves out longer samples, {count}; lemo init --window {room_for(data)} keeps all"
        lines.append(("long_rows", rule, what))
    if shape.packing or data.answers:
        lines.append(("packing", True, "documents that share a window never see each other"))
    return lines


def _loss_rows(data: DataFacts, shape: Shape, preset: Preset) -> list[Line]:
    if data.answers:
        return _prompt_rows(data, preset)
    lines: list[Line] = [
        ("share", preset.loss_share, "of the blocks are far loss rows, which attend to all rows; drawn anew each epoch")
    ]
    short = _within(shape, preset.context_window)
    how = "in windows this short far ones, too" if short else "which attend within context_window"
    about = f"besides are local loss rows, {how}" if preset.local_share else "none besides that attend locally"
    lines.append(("local_share", preset.local_share, about))
    lines.append(("span", preset.span, "rows of a run of them, so that most of what they read carries loss too"))
    return lines


def _prompt_rows(data: DataFacts, preset: Preset) -> list[Line]:
    """Loss on rows of documents that are asked about; whether conversations have such documents nobody knows here.

    Where half of the rows pass gradient there is less to make up for (docs/decisions/0019-prompt-rows.md).
    """
    if not preset.local_share:
        return []
    if data.kind == "qas":
        return [
            ("prompt_share", PROMPT_SHARE, "of the blocks carry loss beside answers: documents are learned to be read")
        ]
    return [("prompt_share", 0.0, f"{PROMPT_SHARE} where prompts are documents to understand; harm where filler")]


def _within(shape: Shape, chunk_rows: int) -> bool:
    """Whether a row of a sample sees all rows before it in its chunk and the chunk before."""
    return shape.window_tokens <= 2 * chunk_rows


def _sparsity(data: DataFacts, shape: Shape, preset: Preset) -> list[Line]:
    block = 64 if shape.window_tokens >= 2048 else 32 if shape.window_tokens >= 512 else 16
    local = " and local ones" if preset.local_share else ""
    window = f"rows of a chunk; rows without loss{local} see theirs, the one before, the first block"
    chosen = preset.sparsity
    if data.answers:
        chosen |= {"scorer": "words", "context_window": preset.answer_window}
    within = _within(shape, chosen["context_window"])
    about = {
        "forward_ratio": "share of rows that run a layer",
        "backward_ratio": "share of rows that pass gradient; all rows with loss do",
        "scorer": "beside rows with loss those shortly before them; or words, predictor, random",
        "dense_layers": "layers that leave nothing out",
        "gradient": "keys and values of all rows pass gradient as well",
        "context_window": "of no effect in windows of up to twice as many rows" if within else window,
    }
    if data.answers:
        about["scorer"] = "beside answers what shares rare words with their questions; or recent, predictor, random"
    lines: list[Line] = [("block_size", block, "rows are chosen by blocks of this many tokens")]
    return lines + [(key, value, about[key]) for key, value in chosen.items()]


def _lora() -> list[Line]:
    return [
        ("rank", 16, "of the adapter"),
        ("targets", ["all-linear"], "all linear maps of the decoder layers"),
    ]


def _training(shape: Shape, machine: MachineFacts) -> list[Line]:
    steps = shape.steps
    lines: list[Line] = []
    if not machine.gpu and steps > CPU_STEPS:
        lines.append(("max_steps", CPU_STEPS, f"a first try on a CPU; one pass over the data is {steps:,}"))
        steps = CPU_STEPS
    else:
        epochs = 1 if steps >= 10 else 3
        steps *= epochs
        lines.append(("epochs", epochs, f"about {steps:,} steps"))
    tokens = shape.accumulation * shape.window_tokens
    lines += [
        ("learning_rate", 2e-4, "usual for LoRA"),
        ("warmup_steps", steps // 20, "the first of them runs at rate 0" if steps >= 20 else "none: the run is short"),
        ("batch_size", 1, "window at a time"),
        ("gradient_accumulation_steps", shape.accumulation, f"about {tokens:,} tokens a step"),
        ("gradient_checkpointing", machine.gpu, "less memory, more time" if machine.gpu else "memory suffices without"),
        ("eval_steps", max(1, steps // 4), "validation loss while training"),
        ("save_steps", max(1, steps // 4), "checkpoints that --resume takes up"),
    ]
    return lines


def _render(lines: Sequence[Line], indent: str) -> list[str]:
    """Lines of YAML with comments in one column where they fit."""
    out = []
    for key, value, comment in lines:
        text = f"{indent}{key}: {dump_value(value)}"
        out.append(f"{text:<{_COMMENT_COLUMN}}  # {comment}" if comment else text)
    return out
