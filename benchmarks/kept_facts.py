"""Which share of the facts that a question needs lies in rows that pass gradient, by what ranks the blocks.

    python -m benchmarks.kept_facts --tokenizer FOLDER [--length 8192] [--ratio 0.12] [--prompts 50] [--out FILE]

Prompts are those of `lemo.eval.ruler`, answers carry loss, every row runs forward. No model is needed: scorers `words`,
`recent` and `random` know their scores from the batch alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lemo.core.policy import select
from lemo.core.score import ScoreInputs, scorer_named
from lemo.eval.needle import Prompt, make_prompt
from lemo.eval.ruler import TASKS
from lemo.measure.record import Record
from lemo.runtime.batch import read_layout

SCRIPT = "benchmarks/kept_facts.py"
SCORERS = ("words", "recent", "random")


def kept_share(prompt: Prompt, scorer: str, ratio: float, block_size: int, seed: int) -> float:
    """Share of the rows of a prompt's facts that pass gradient."""
    ids_1T = torch.from_numpy(prompt.tokens_T.astype("int64"))[None]
    batch = {"input_ids": ids_1T, "labels": torch.from_numpy(prompt.labels_T)[None]}
    layout = read_layout(batch, None, block_size)
    scores_K = scorer_named(scorer, seed=seed).scores(ScoreInputs(layout))
    selection = select(layout, scores_K, forward_ratio=1.0, backward_ratio=ratio)
    if selection.backward is None:
        return 1.0
    kept = set(selection.backward.rows_N.tolist())
    facts = [row for start, end in prompt.facts for row in range(start, end)]
    return sum(row in kept for row in facts) / len(facts)


def measure(tokenizer: Any, options: argparse.Namespace) -> None:
    """One Record a task and scorer, a sample for each prompt."""
    for task, riddle in TASKS.items():
        prompts = [make_prompt(task, riddle, tokenizer, options.length, seed=seed) for seed in range(options.prompts)]
        for scorer in SCORERS:
            shares = [kept_share(p, scorer, options.ratio, options.block, seed) for seed, p in enumerate(prompts)]
            setting = {"statistic": "mean", "task": task, "scorer": scorer, "tokens": options.length}
            setting |= {"ratio": options.ratio, "block": options.block, "tokenizer": Path(options.tokenizer).name}
            record = Record.measure(f"kept_facts/{scorer}/{task}", "share", shares, setting, script=SCRIPT, seeds=[0])
            record.append(options.out)
            print(f"{task} {scorer}: {record.value:.3f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokenizer", required=True)
    add("--length", type=int, default=8192)
    add("--ratio", type=float, default=0.12, help="of the rows that pass gradient")
    add("--prompts", type=int, default=50, help="of each task")
    add("--block", type=int, default=64)
    add("--out", type=Path, default=Path(__file__).parent / "results" / "kept_facts.jsonl")
    options = parser.parse_args(arguments)
    from transformers import AutoTokenizer

    measure(AutoTokenizer.from_pretrained(options.tokenizer), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
