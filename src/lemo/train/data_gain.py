"""What the data of a recipe say of its steps: how many there are, which needs most memory, and what they gain."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lemo.config import RunConfig
from lemo.measure.card import Card
from lemo.measure.estimate import gain, make_estimate
from lemo.measure.step_memory import StepSetting
from lemo.measure.step_time import step_time
from lemo.train.collate import IGNORE
from lemo.train.data import load_windows
from lemo.train.forecast import ASSUMED, Forecast

GAINS = 1.05  # a step gains when it is so many times as fast
LONG_TOKENS = 65_536  # a window that does not gain is too short when one of this length would, of the same shares
SAMPLED_WINDOWS = 512


@dataclass(frozen=True)
class DataGain:
    """What a data set's steps will gain over dense ones.

    Attributes:
        windows: looked at.
        gaining: share of them that is at least 1.05 times as fast.
        gain: dense seconds over these, of all of them together.
        best: of one window.
        longest_tokens: of the longest window.
        supervised_share: of all rows.
        forced_share: of all blocks: those with loss, which never skip.
        short: share of windows that do not gain, but would if they were of 64K tokens. Others that do not gain leave
            too little out at any length.
        training_windows: of which an epoch consists, looked at or not.
        mean_tokens: of a window.
        mean_s: of the steps of single windows.
        largest: the step of the window that needs most memory, in batches as the recipe has them.
    """

    windows: int
    gaining: float
    gain: float
    best: float
    longest_tokens: int
    supervised_share: float
    forced_share: float
    short: float
    training_windows: int
    mean_tokens: float
    mean_s: float
    largest: StepSetting

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Looked:
    """Windows of a recipe that were looked at.

    Attributes:
        shares: of each its tokens, the share of its rows that carry loss, and that of its blocks that hold such rows.
        training_windows: of which an epoch consists, looked at or not.
    """

    shares: list[tuple[int, float, float]]
    training_windows: int


def look_at_data(run: RunConfig, found: Forecast, tokenizer: Any) -> Looked:
    """Looks at the windows of a recipe, at most 512 of them, spread evenly.

    Raises:
        DataError: the data cannot be read.
    """
    vocabulary = found.sizes.shape.vocabulary
    dataset, report = load_windows(run.data, tokenizer, "train", vocabulary=vocabulary, limit=SAMPLED_WINDOWS)
    shares = [window_shares(dataset[i]["labels"], found.setting.block_size) for i in range(len(dataset))]
    return Looked(shares, min(report.windows + report.unused_windows, run.data.max_windows or sys.maxsize))


def data_gain(run: RunConfig, found: Forecast, looked: Looked, card: Card) -> DataGain:
    """What the windows of a recipe gain. A window of several documents counts as one of its length."""
    shares = looked.shares
    # Rows of prompts are drawn among the blocks without answers, as long as there are any.
    prompts = [min(run.loss_rows.prompt_share, 1.0 - blocks) for _, _, blocks in shares]
    shares = [(t, r + more, b + more) for (t, r, b), more in zip(shares, prompts, strict=True)]
    drawn = not run.data.answer_only and run.loss_rows.share < 1
    all_loss = run.loss_rows.share + run.local_share
    cache: dict[tuple[int, float], tuple[float, float, bool]] = {}
    steps: dict[tuple[int, float], StepSetting] = {}
    near, costs = found.setting.local_share, []
    for (tokens, rows, blocks), more in zip(shares, prompts, strict=True):
        local = near if drawn or not near else more
        forced = found.setting.loss_share if drawn else blocks - local
        # Windows that are alike to a few percent cost alike.
        key = (max(256, round(tokens / 256) * 256), round(forced, 2))
        if key not in cache:
            # Rounded up, a share of nearly all blocks would leave less than the local share.
            loss = max(0.01, min(1.0 - local, key[1] if drawn else rows - local))
            far = {"loss_share": loss, "forced_share": key[1]}
            step = replace(found.setting, tokens=key[0], **far, local_share=min(local, 1.0 - loss), batch=1)
            gained = gain(found.sizes, step, card)
            short = gained < GAINS <= gain(found.sizes, replace(step, tokens=LONG_TOKENS), card)
            cache[key] = gained, step_time(found.sizes, step, card).total_s, short
            steps[key] = replace(step, tokens=2, batch=found.setting.batch)
        steps[key] = replace(steps[key], tokens=max(steps[key].tokens, tokens))
        costs.append(cache[key])
    gains, seconds, shorts = zip(*costs, strict=True)
    dense = sum(g * s for g, s in zip(gains, seconds, strict=True))
    tokens = sum(t for t, _, _ in shares)
    forced_shares = [all_loss if drawn else b for _, _, b in shares]
    return DataGain(
        windows=len(shares),
        gaining=sum(g >= GAINS for g in gains) / len(gains),
        gain=dense / sum(seconds),
        best=max(gains),
        longest_tokens=max(t for t, _, _ in shares),
        supervised_share=sum(t * (all_loss if drawn else r) for t, r, _ in shares) / tokens,
        forced_share=sum(t * f for (t, _, _), f in zip(shares, forced_shares, strict=True)) / tokens,
        short=sum(shorts) / len(shorts),
        training_windows=looked.training_windows,
        mean_tokens=tokens / len(shares),
        mean_s=sum(seconds) / len(seconds),
        largest=max(steps.values(), key=lambda step: make_estimate(found.sizes, step, card).needed_bytes),
    )


def with_data(found: Forecast, data: DataGain) -> Forecast:
    """The forecast of the step that needs most memory among those of the data, instead of one that was assumed."""
    largest = data.largest
    loss = largest.loss_share + largest.local_share
    note = f"the step is that of the most demanding window seen, {largest.tokens:,} tokens with loss on {loss:.0%}"
    notes = (*(x for x in found.notes if not x.startswith(ASSUMED)), note)
    return replace(found, setting=largest, notes=notes)


def window_shares(labels: Sequence[int], block_size: int) -> tuple[int, float, float]:
    """Tokens of a window, share of its rows that carry loss, and share of its blocks that hold such rows."""
    carries_T = np.append(np.asarray(labels)[1:] != IGNORE, False)
    blocks_K = np.add.reduceat(carries_T, np.arange(0, len(carries_T), block_size)) > 0
    return len(carries_T), float(carries_T.mean()), float(blocks_K.mean())
