"""Will it fit, how long will it take, and what to change: memory and time of a step held against a card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from lemo.measure.card import Card
from lemo.measure.ledger import Ledger
from lemo.measure.sizes import ModelSizes
from lemo.measure.step_memory import CONSTANTS, MemoryConstants, StepSetting, step_memory
from lemo.measure.step_time import StepTime, step_time

LEVELS = ("none", "mlp", "lin", "layer")
LENGTH_STEP, LENGTH_LIMIT = 1024, 1 << 23
FEWER_RATIOS = (0.5, 0.4, 0.3, 0.2)
FEWER_SEGMENT_ROWS = 512


@dataclass(frozen=True)
class Estimate:
    """Memory and time of one step on one card.

    Attributes:
        setting: the step.
        card: where it runs.
        peak_bytes: most that torch's allocator will hold.
        parts_bytes: of which, by part, at that moment.
        moment: when that is.
        needed_bytes: of the card: with holes between tensors, and what the driver takes.
        time: of the step.
        host_bytes: pinned host memory that it takes.
    """

    setting: StepSetting
    card: Card
    peak_bytes: float
    parts_bytes: dict[str, float]
    moment: str
    needed_bytes: float
    time: StepTime
    host_bytes: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether the card has that much."""
        return self.needed_bytes <= self.card.memory_bytes

    @property
    def tokens_per_s(self) -> float:
        """Of a step."""
        return self.setting.rows / self.time.total_s

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "setting": asdict(self.setting),
            "card": asdict(self.card),
            "peak_bytes": round(self.peak_bytes),
            "needed_bytes": round(self.needed_bytes),
            "parts_bytes": {name: round(size) for name, size in self.parts_bytes.items() if size},
            "host_bytes": round(self.host_bytes),
            "moment": self.moment,
            "fits": self.fits,
            "step_s": self.time.total_s,
            "step_parts_s": asdict(self.time),
            "tokens_per_s": self.tokens_per_s,
        }


def make_estimate(
    sizes: ModelSizes, setting: StepSetting, card: Card, constants: MemoryConstants = CONSTANTS
) -> Estimate:
    """Estimate of one step.

    Args:
        sizes: of model and adapter.
        setting: the step.
        card: where it would run.
        constants: what was fitted.
    """
    ledger = step_memory(sizes, setting, constants)
    return Estimate(
        setting=setting,
        card=card,
        peak_bytes=ledger.peak_bytes,
        parts_bytes=ledger.peak_parts,
        moment=ledger.peak_moment,
        needed_bytes=needed_bytes(ledger, constants),
        time=step_time(sizes, setting, card),
        host_bytes=ledger.host_bytes,
    )


def needed_bytes(ledger: Ledger, constants: MemoryConstants = CONSTANTS) -> float:
    """What a card must have for a step."""
    return ledger.peak_bytes * (1 + constants.reserve) + constants.context_bytes


def longest_tokens(sizes: ModelSizes, setting: StepSetting, card: Card) -> int:
    """Longest sequence of this kind that fits, in steps of 1,024 tokens; 0 when not even that does."""

    def fits(steps: int) -> bool:
        longer = replace(setting, tokens=steps * LENGTH_STEP)
        return needed_bytes(step_memory(sizes, longer)) <= card.memory_bytes

    low, high = 0, LENGTH_LIMIT // LENGTH_STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * LENGTH_STEP


def fit_setting(sizes: ModelSizes, setting: StepSetting, card: Card) -> Estimate | None:
    """The fastest setting of this length that fits the card.

    What is recomputed and the loss segment are free. Where nothing else fits, offload comes first, since nobody asked
    how much memory the host has; then keys of skipped rows are given up, and after that rows.

    Returns:
        Its estimate; None when nothing fits.
    """
    for ratios in _ratios(setting):
        found = [e for e in (make_estimate(sizes, s, card) for s in _free_choices(ratios)) if e.fits]
        if found:
            return min(found, key=lambda e: e.time.total_s)  # of equals the first, which changes least
    return None


def _free_choices(setting: StepSetting) -> Iterator[StepSetting]:
    """The setting under every level and segment."""
    levels = LEVELS if setting.engine == "fused" else ("none", "layer")
    for rows in dict.fromkeys((setting.segment_rows, min(setting.segment_rows, FEWER_SEGMENT_ROWS))):
        for level in levels:
            yield replace(setting, recompute=level, segment_rows=rows)  # type: ignore[arg-type]


def _ratios(setting: StepSetting) -> Iterator[StepSetting]:
    """The setting itself, with offload, then ever smaller ones."""
    yield setting
    if not setting.skips:
        return
    if setting.engine == "fused" and not setting.offload:
        offloaded = replace(setting, offload=True)
        yield offloaded
        # Frames of exact forward stay as large as they are, whatever the ratio.
        setting = offloaded if setting.forward_ratio > setting.backward_ratio else setting
    if setting.kv == "all":
        yield replace(setting, kv="kept")
    for ratio in FEWER_RATIOS:
        forward = min(setting.forward_ratio, max(ratio, setting.backward_ratio))
        if ratio < setting.backward_ratio:
            forward = ratio if setting.forward_ratio < 1 else 1.0
            yield replace(setting, kv="kept", forward_ratio=forward, backward_ratio=ratio)


@dataclass(frozen=True)
class Change:
    """One change to a setting: what to write into the recipe, and the estimate with it."""

    text: str
    estimate: Estimate


def changes(sizes: ModelSizes, setting: StepSetting, card: Card) -> list[Change]:
    """Single changes that save memory, the fastest first.

    Args:
        sizes: of model and adapter.
        setting: the step.
        card: where it would run.
    """
    now = make_estimate(sizes, setting, card)
    tried: list[tuple[str, Callable[[], StepSetting]]] = []
    levels = LEVELS[LEVELS.index(setting.recompute) + 1 :]
    if setting.engine == "fused":
        tried += [(f"training.recompute: {x}", lambda x=x: replace(setting, recompute=x)) for x in levels]
        if setting.offload in (False, "keys"):
            tried.append(("training.offload: true", lambda: replace(setting, offload=True)))
    elif setting.recompute == "none":
        tried.append(("training.gradient_checkpointing: true", lambda: replace(setting, recompute="layer")))
    if setting.batch > 1:
        tried.append(("training.batch_size: 1", lambda: replace(setting, batch=1)))
    if setting.skips and setting.kv == "all" and setting.forward_ratio < 1:
        tried.append(("sparsity.kv: kept", lambda: replace(setting, kv="kept")))
    if setting.engine != "plain" and setting.backward_ratio > 0.3:
        tried.append(("sparsity.backward_ratio: 0.3", lambda: replace(setting, backward_ratio=0.3)))
        if setting.forward_ratio < 1:
            both = "sparsity.forward_ratio: 0.3, sparsity.backward_ratio: 0.3"
            tried.append((both, lambda: replace(setting, forward_ratio=0.3, backward_ratio=0.3)))
    if not setting.segmented:
        tried.append(("training.loss: segmented", lambda: replace(setting, segmented=True)))
    elif setting.segment_rows > FEWER_SEGMENT_ROWS:
        less = f"training.segment_rows: {FEWER_SEGMENT_ROWS}"
        tried.append((less, lambda: replace(setting, segment_rows=FEWER_SEGMENT_ROWS)))
    if setting.tokens >= 2 * LENGTH_STEP:
        half = setting.tokens // 2
        tried.append((f"data.window_tokens: {half}", lambda: replace(setting, tokens=half)))
    found = [Change(text, make_estimate(sizes, make(), card)) for text, make in tried]
    if not sizes.packed:
        found.append(Change("model.load_in_4bit: true", make_estimate(replace(sizes, packed=True), setting, card)))
    found = [change for change in found if change.estimate.peak_bytes < 0.99 * now.peak_bytes]
    return sorted(found, key=lambda change: (not change.estimate.fits, change.estimate.time.total_s))


def dense_setting(setting: StepSetting) -> StepSetting:
    """The same step with every row in every layer, under the same engine."""
    loss = setting.loss_share + setting.local_share
    return replace(setting, forward_ratio=1.0, backward_ratio=1.0, kv="kept", loss_share=loss, local_share=0.0)


def gain(sizes: ModelSizes, setting: StepSetting, card: Card) -> float:
    """Time of the dense step over that of this one, each with the least recomputation that fits the card.

    Where not even full recomputation fits, both are taken with it.
    """
    return _fastest(sizes, dense_setting(setting), card) / _fastest(sizes, setting, card)


def _fastest(sizes: ModelSizes, setting: StepSetting, card: Card) -> float:
    levels = LEVELS if setting.engine == "fused" else ("none", "layer")
    for level in levels:
        tried = replace(setting, recompute=level)  # type: ignore[arg-type]
        if level == levels[-1] or needed_bytes(step_memory(sizes, tried)) <= card.memory_bytes:
            return step_time(sizes, tried, card).total_s
    raise AssertionError("the last level always returns")
