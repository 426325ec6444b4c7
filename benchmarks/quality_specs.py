"""What a method of the quality grids is: which rows layers run and which rows carry loss. And how most are built."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from lemo.config import CalibrationConfig


@dataclass(frozen=True)
class PlanSpec:
    """Which rows layers run. Fields up to `bypass_rank` are the plan's own; the others say how it is made.

    Attributes:
        scorer: `predictor` or `random` while training.
        fitted_scorer: what ranks blocks while bypass and predictors are fitted.
        oracle: name of a target of `benchmarks.rivals.oracle` that ranks blocks by looking, instead of a predictor.
        strip_bypass: rows that skip a layer pass it unchanged.
        threshold: one for all layers, in standard deviations of the target's logarithm; blocks that score less are
            skipped, whatever the ratios, at which the bypass was fitted.
        allocate: calibration chooses each layer's ratio at the cost of these.
        ratio_of: `all` rows, or rows of the `context`, to which loss rows are added.
        context_window: rows of a chunk, which with the chunk before is what rows without gradient see; None for all.
        far_share: share of the far keys that attention's backward reads.
        local_forward: what local loss rows see in forward, `near` keys or `all`.
    """

    forward_ratio: float = 0.3
    backward_ratio: float = 0.3
    kv: str = "all"
    gradient: str = "rows"
    scorer: str = "predictor"
    dense_layers: tuple[int, ...] = (0, -1)
    block_size: int = 64
    bypass_rank: int = 64
    bypass_target: str = CalibrationConfig.bypass_target
    target: str = "attention_mass"  # what cells were made with that name none
    fitted_scorer: str = "predictor"
    oracle: str | None = None
    strip_bypass: bool = False
    threshold: float | None = None
    allocate: bool = False
    ratio_of: str = "all"
    context_window: int | None = None
    far_share: float = 1.0
    local_forward: str = "near"

    @property
    def ratios_follow(self) -> bool:
        """Whether the share of rows that layers keep is known only afterwards."""
        return self.threshold is not None or self.allocate

    @property
    def needs_fit(self) -> bool:
        """Whether a calibration has to come first."""
        bypassed = self.forward_ratio < 1 and not self.strip_bypass
        return bypassed or (self.scorer == "predictor" and self.oracle is None)

    @property
    def fit(self) -> dict[str, Any]:
        """What the calibrated plan depends on: cells that agree in it share one plan."""
        names = ("forward_ratio", "kv", "dense_layers", "block_size", "bypass_rank", "bypass_target", "target")
        found = {name: getattr(self, name) for name in (*names, "fitted_scorer")}
        # A choice that came later: plans that do not make it keep their folder.
        found |= {"allocate": self.backward_ratio} if self.allocate else {}
        found |= {"ratio_of": self.ratio_of} if self.ratio_of != "all" else {}
        return found | ({} if self.context_window is None else {"context_window": self.context_window})


@dataclass(frozen=True)
class Ramp:
    """Ratios rise linearly to 1 between two shares of the steps: (0, 1) is random-LTD's schedule.

    Where `end` comes before `begin` they fall from 1 to the plan's: (0.2, 0) starts dense.
    """

    begin: float
    end: float

    def progress(self, step: int, steps: int) -> float:
        """0 before, 1 after; in twentieths, so that few plans are made."""
        if self.end == self.begin:
            return float(step >= self.begin * steps)
        return min(1.0, max(0.0, round(20 * (step / steps - self.begin) / (self.end - self.begin)) / 20))


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        about: for tables.
        plan: rows of layers; None runs every row.
        loss_share: share of blocks that carry loss; 1.0 all rows.
        placement: of loss rows.
        forced: loss rows never skip. Methods of others do not know the rule.
        pieces: training windows that make up one sequence of the protocol; 1 for whole ones.
        flops_of: trains for as many steps as this method's FLOPs buy.
        ramp: towards dense.
        rival: a context manager of `benchmarks.rivals` that is in force while training.
        documents: instruction data: whether samples keep their document.
        reweight: loss rows are weighed so that they estimate the loss of all rows without bias.
        refit_every: steps between fits of the bypass to the weights as they are.
        span: rows of a run of drawn blocks of loss rows; None draws single blocks.
        local_share: share of blocks that carry loss besides, and attend within the plan's `context_window`.
        far: which of the drawn loss rows are far, as in `loss_rows.far`: `random` ones, or by `repeats`.
        prompt_rows: share and weight of rows of the prompt that carry loss beside answers; None for no such rows.
        prompt_of: what the weight is of: a `row`, or all of a sample's together, where its `answers` are 1.
        prompt_local: these rows attend within the plan's `context_window`.
        dense_every: one step of so many is dense; None for no such steps.
        corrected: one step of so many is dense and says what the others' gradients lack, which is added to them as a
            running mean that keeps this share of itself; None for no such steps.
        trains: ends of names of modules that are trained whole beside the adapter; an embedding that the head shares
            is trained as both.
        sequences: of the protocol's length in a step, where they are not the protocol's; more of them make fewer steps.
        rising_share: share of loss rows in the first and in the last step, on a line between them; `loss_share` is
            its mean.
    """

    about: str
    plan: PlanSpec | None = None
    loss_share: float = 1.0
    placement: str = "random"
    forced: bool = True
    pieces: int = 1
    flops_of: str | None = None
    ramp: Ramp | None = None
    rival: str | None = None
    documents: bool = True
    reweight: bool = False
    refit_every: int | None = None
    span: int | None = None
    rising_share: tuple[float, float] | None = None
    local_share: float = 0.0
    far: str = "random"
    prompt_rows: tuple[float, float] | None = None
    prompt_local: bool = False
    prompt_of: str = "row"
    dense_every: int | None = None
    corrected: tuple[int, float] | None = None
    sequences: int | None = None
    trains: tuple[str, ...] = ()

    @property
    def loss_block_size(self) -> int:
        """Rows of a drawn block."""
        return self.plan.block_size if self.plan is not None else 64

    @property
    def marks_local(self) -> bool:
        """Whether the method tells local loss rows from far ones."""
        return self.plan is not None and self.plan.context_window is not None

    @property
    def repeats_beyond(self) -> int | None:
        """The window beyond which repeats make a drawn row far; None where far rows are those drawn first."""
        return self.plan.context_window if self.plan is not None and self.far == "repeats" else None

    def set_share(self, collator: Any, progress: float) -> None:
        """Share of loss rows at a progress of 0 to 1, where it moves."""
        if self.rising_share is not None:
            first, last = self.rising_share
            collator.share = first + (last - first) * progress

    def setting(self) -> dict[str, Any]:
        """Everything that decides what the method does, for the hash of a cell."""
        found = asdict(self)
        del found["about"]
        # Choices that came later: a cell that does not make them keeps its hash.
        mine = {"reweight": False, "refit_every": None, "span": None, "rising_share": None, "local_share": 0.0}
        mine |= {"far": "random", "prompt_rows": None, "prompt_local": False, "dense_every": None}
        mine |= {"corrected": None, "sequences": None, "prompt_of": "row", "trains": ()}
        for name, default in mine.items():
            if found[name] == default:
                del found[name]
        later = {"threshold": None, "allocate": False, "ratio_of": "all", "context_window": None, "far_share": 1.0}
        later |= {"local_forward": "near"}
        for name, default in later.items():
            if self.plan is not None and found["plan"][name] == default:
                del found["plan"][name]
        return found


LOSS_SHARE, SPAN = 0.12, 1024
EXACT = PlanSpec(1.0, LOSS_SHARE, gradient="keys", scorer="random", dense_layers=())
SKIP = PlanSpec(0.3, 0.3)


def exact(about: str, loss_share: float = LOSS_SHARE, span: int | None = SPAN, **changes: Any) -> Method:
    """The default, exact forward with gradient through the loss rows, with some choices changed."""
    changes = {"backward_ratio": loss_share} | changes
    return Method(about, replace(EXACT, **changes), loss_share, span=span)


def skip(
    about: str, loss_share: float = 0.1, span: int | None = SPAN, placement: str = "random", **changes: Any
) -> Method:
    """Rows skip layers in forward too; a bypass stands in for them."""
    if changes.get("scorer") == "recent":
        changes = {"fitted_scorer": "recent"} | changes
    return Method(about, replace(SKIP, **changes), loss_share, placement, span=span)


def both(ratio: float) -> dict[str, float]:
    """One ratio forward and backward."""
    return {"forward_ratio": ratio, "backward_ratio": ratio}
