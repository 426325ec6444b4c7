"""What the quality grids compare: every method as one entry of a table, and what each costs in FLOPs."""

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
    target: str = CalibrationConfig.target
    fitted_scorer: str = "predictor"
    oracle: str | None = None
    strip_bypass: bool = False
    threshold: float | None = None
    allocate: bool = False
    ratio_of: str = "all"

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
        return found | ({"ratio_of": self.ratio_of} if self.ratio_of != "all" else {})


@dataclass(frozen=True)
class Ramp:
    """Ratios rise linearly to 1 between two shares of the steps: (0, 1) is random-LTD's schedule."""

    begin: float
    end: float

    def progress(self, step: int, steps: int) -> float:
        """0 before, 1 after; in twentieths, so that few plans are made."""
        if self.end <= self.begin:
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
        loss_block: rows of a drawn block of loss rows; None for the plan's blocks.
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
    loss_block: int | None = None

    @property
    def loss_block_size(self) -> int:
        """Rows of a drawn block."""
        if self.loss_block is not None:
            return self.loss_block
        return self.plan.block_size if self.plan is not None else 64

    def setting(self) -> dict[str, Any]:
        """Everything that decides what the method does, for the hash of a cell."""
        found = asdict(self)
        del found["about"]
        # Choices that came later: a cell that does not make them keeps its hash.
        for name, default in (("reweight", False), ("refit_every", None), ("loss_block", None)):
            if found[name] == default:
                del found[name]
        for name, default in (("threshold", None), ("allocate", False), ("ratio_of", "all")):
            if self.plan is not None and found["plan"][name] == default:
                del found["plan"][name]
        return found


LOSS_SHARE = 0.2
BALANCED = PlanSpec()
_PLAIN = PlanSpec(0.5, 0.5, kv="kept", strip_bypass=True)
_BARE = PlanSpec(1e-6, 1e-6, kv="kept", scorer="random", dense_layers=(), strip_bypass=True)


def lemo(about: str, loss_share: float = LOSS_SHARE, placement: str = "random", **changes: Any) -> Method:
    """A method of this library: the default with some choices changed."""
    return Method(about, replace(BALANCED, **changes), loss_share, placement)


def _both(ratio: float) -> dict[str, float]:
    return {"forward_ratio": ratio, "backward_ratio": ratio}


# No layer needs to stay dense where every row runs it.
_EXACT_20: dict[str, Any] = {
    "forward_ratio": 1.0,
    "backward_ratio": 0.2,
    "gradient": "pairs",
    "kv": "kept",
    "dense_layers": (),
}


def _keys(share: float, backward: float, **changes: Any) -> Method:
    """Exact forward with gradient into all keys."""
    about = f"exact forward, loss on {share:.0%}, gradient of {backward:.0%} into all keys"
    chosen = _EXACT_20 | {"gradient": "keys", "backward_ratio": backward, "scorer": "random"} | changes
    return lemo(about, share, **chosen)


PRESETS = {
    "balanced": lemo("default for grouped-query models: 30 % of rows, all offer keys"),
    "balanced_mha": lemo("default for multi-head models: 40 % of rows, others offer no keys", kv="kept", **_both(0.4)),
    "quality": lemo("exact forward, gradient through 35 % of rows", forward_ratio=1.0, backward_ratio=0.35),
    "fast": lemo("20 % of rows, skipped rows offer nothing, loss on 10 %", 0.1, kv="kept", **_both(0.2)),
}
NULLS = {
    "before": Method("the model before any training"),
    "dense_all": Method("dense LoRA, loss on all rows"),
    "dense_rows": Method("dense LoRA, loss on the default's rows", loss_share=LOSS_SHARE),
    "dense_rows_10": Method("dense LoRA, loss on 10 % of rows", loss_share=0.1),
    "dense_rows_40": Method("dense LoRA, loss on 40 % of rows", loss_share=0.4),
    "dense_4k": Method("dense LoRA on 4K windows, FLOPs of the default", pieces=4, flops_of="balanced"),
    "dense_8k": Method("dense LoRA on 8K windows, FLOPs of the default", pieces=2, flops_of="balanced"),
    "no_context": Method("loss rows with all other context removed", _BARE, LOSS_SHARE),
    "random": lemo("the default with blocks drawn at random", scorer="random"),
    "random_refit": lemo("the same, bypass fitted on random blocks too", scorer="random", fitted_scorer="random"),
}
RIVALS = {
    "random_ltd": Method(
        "random-LTD: random rows of each layer, no bypass, loss everywhere, ramp to dense",
        replace(_PLAIN, scorer="random", block_size=1, **_both(0.3)),
        forced=False,
        ramp=Ramp(0.0, 1.0),
    ),
    "random_ltd_no_ramp": Method(
        "random-LTD without its ramp",
        replace(_PLAIN, scorer="random", block_size=1, **_both(0.3)),
        forced=False,
    ),
    "longlora": Method("LongLoRA: attention in shifted groups while training", rival="shifted_groups"),
    "fixed_rule": Method(
        "the artifact's rule: upper half keeps 40 %, attention only, loss everywhere",
        replace(_PLAIN, **_both(0.4)),
        forced=False,
        rival="attention_only",
    ),
    "plain": Method("the plain method: half of the rows, loss everywhere, no bypass", _PLAIN, forced=False),
    "tokentune": Method(
        "TokenTune: all rows forward, gradient and loss through random rows",
        replace(_BARE, forward_ratio=1.0, block_size=1),
        LOSS_SHARE,
    ),
}
ABLATIONS = {
    # one step at a time from dense towards the default
    "step_backward": lemo("exact forward, gradient through 30 %", forward_ratio=1.0),
    "step_backward_random": lemo("the same, random blocks", forward_ratio=1.0, scorer="random"),
    "pairs": lemo("exact forward, `pairs` gradient through 30 %", forward_ratio=1.0, gradient="pairs"),
    "exact_20": lemo("exact forward, `pairs` gradient through 20 %, loss on 10 %", 0.1, **_EXACT_20),
    "exact_20_random": lemo("the same, random blocks", 0.1, scorer="random", **_EXACT_20),
    "exact_20_rows_random": lemo(
        "the same, random blocks, `rows` gradient", 0.1, scorer="random", **(_EXACT_20 | {"gradient": "rows"})
    ),
    "exact_loss_rows": lemo("exact forward, gradient through loss rows alone", scorer="random", **_EXACT_20),
    "rows_loss_rows": lemo(
        "exact forward, `rows` gradient through loss rows alone", scorer="random", **(_EXACT_20 | {"gradient": "rows"})
    ),
    "keys_loss_rows": lemo(
        "the same, gradient also into all keys and values", scorer="random", **(_EXACT_20 | {"gradient": "keys"})
    ),
    "keys_loss_rows_10": lemo(
        "the same, loss on 10 %",
        0.1,
        scorer="random",
        **(_EXACT_20 | {"gradient": "keys", "backward_ratio": 0.1}),
    ),
    **{
        f"dense_10_blocks_{n}": Method(f"dense LoRA, loss on 10 %, in blocks of {n}", loss_share=0.1, loss_block=n)
        for n in (16, 256, 1024)
    },
    **{f"keys_10_blocks_{n}": replace(_keys(0.1, 0.1), loss_block=n) for n in (256, 1024)},
    "keys_10_blocks_16": _keys(0.1, 0.1, block_size=16),
    "keys_10_before": _keys(0.1, 0.2, scorer="predictor", oracle="before_loss"),
    "keys_10_before_blocks_256": replace(_keys(0.1, 0.15, scorer="predictor", oracle="before_loss"), loss_block=256),
    "keys_20_before": _keys(0.2, 0.35, scorer="predictor", oracle="before_loss"),
    "keys_10_random": _keys(0.1, 0.2),
    "rows_10_blocks_256": replace(_keys(0.1, 0.1, gradient="rows"), loss_block=256),
    "skip_20_blocks_256": replace(lemo("20 % of rows, loss on 10 %", 0.1, **_both(0.2)), loss_block=256),
    "skip_30_blocks_256": replace(lemo("30 % of rows, loss on 10 %", 0.1, **_both(0.3)), loss_block=256),
    "keys_60_blocks_256": replace(
        lemo(
            "forward 60 %, gradient of 12 % into all keys, loss on 10 %",
            0.1,
            forward_ratio=0.6,
            backward_ratio=0.12,
            gradient="keys",
        ),
        loss_block=256,
    ),
    "both_20": lemo(
        "forward 60 %, `pairs` gradient through 20 %, loss on 10 %", 0.1, **(_EXACT_20 | {"forward_ratio": 0.6})
    ),
    "both_budgets": lemo("forward 50 %, backward 30 %", forward_ratio=0.5),
    "both_budgets_low": lemo("forward 30 %, backward 22 %", backward_ratio=0.22),
    **{f"keep_{round(100 * k)}": lemo(f"{k:.0%} of rows", **_both(k)) for k in (0.22, 0.25, 0.4, 0.5, 0.7)},
    **{
        f"kept_{round(100 * k)}": lemo(f"{k:.0%} of rows, skipped rows offer nothing", kv="kept", **_both(k))
        for k in (0.22, 0.3, 0.5)
    },
    "no_bypass": lemo("no bypass", strip_bypass=True),
    **{f"bypass_{r}": lemo(f"bypass of rank {r}", bypass_rank=r) for r in (16, 256)},
    "bypass_update": lemo("bypass fitted on the layer's own update", bypass_target="update"),
    **{f"block_{c}": lemo(f"blocks of {c} rows", block_size=c) for c in (16, 32, 128)},
    "dense_none": lemo("no dense layers", dense_layers=()),
    "dense_four": lemo("two dense layers at each end", dense_layers=(0, 1, -2, -1)),
    "dense_first_two": lemo("two dense layers at the start, none at the end", dense_layers=(0, 1)),
    **{
        f"loss_{round(100 * s)}": lemo(f"loss on {s:.0%} of rows, context kept alike", s, **_both(round(s + 0.1, 2)))
        for s in (0.1, 0.4)
    },
    "spread": lemo("loss rows spread evenly", placement="spread"),
    "tail": lemo("loss rows at the end", placement="tail"),
    "spread_weighted": replace(lemo("spread, weighted", placement="spread"), reweight=True),
    "random_weighted": replace(lemo("loss rows weighted by their block's chance"), reweight=True),
    "hardest": lemo("loss rows where the base model's loss is highest", placement="hardest"),
    "hardest_weighted": replace(
        lemo("loss rows drawn in proportion to the base model's loss, weighted", placement="hardest"), reweight=True
    ),
    **{f"refit_{n}": replace(lemo(f"bypass fitted anew every {n} steps"), refit_every=n) for n in (10, 50)},
    # The cost of 28 layers at 30 % and two dense ones, on 30 layers that may all skip.
    "allocated": lemo("ratios and dense layers under one budget", dense_layers=(), allocate=True, **_both(0.347)),
    "allocated_exact": lemo(
        "the same for exact forward", dense_layers=(), allocate=True, forward_ratio=1.0, backward_ratio=0.347
    ),
    "interaction": lemo("predictors of the paper's score", target="interaction"),
    "dense_at_end": replace(lemo("the last 15 % of the steps dense"), ramp=Ramp(0.85, 0.85)),
    "ramp_end": replace(lemo("ratio rises to 1 over the last 30 %"), ramp=Ramp(0.7, 1.0)),
}
ANSWER_SHARE = 0.08  # of rows of an instruction sample, for FLOPs only: the data decides which rows carry loss
ORACLES = ("mass", "mass_loss_rows", "mass_detrended", "mass_times_value", "mass_peak", "interaction")
TARGETS = {f"oracle_{name}": lemo(f"oracle, {name.replace('_', ' ')}", oracle=name) for name in ORACLES}
PREDICTED = {
    f"predict_{name}": lemo(f"predictors of {name.replace('_', ' ')}", target=name)
    for name in ("mass_loss_rows", "mass_detrended", "mass_times_value", "mass_peak")
}
THRESHOLDS = {
    f"threshold_{t:+.1f}": lemo(f"blocks above {t:+.1f} standard deviations", 0.1, threshold=t)
    for t in (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
}
_CONTEXT = {"loss_share": ANSWER_SHARE, **_both(0.2)}
INSTRUCT = {
    "instruct_before": Method("before any training"),
    "instruct_dense": Method("dense LoRA, answers supervised"),
    "instruct_no_document": Method("dense LoRA, questions and answers alone", documents=False),
    "instruct_skip": lemo("20 % of rows, answers included", **_CONTEXT),
    "instruct_skip_kept": lemo("20 % of rows, answers included, skipped rows offer nothing", kv="kept", **_CONTEXT),
    **{
        f"instruct_context_{round(100 * k)}": lemo(
            f"{k:.0%} of the context, all answers", ANSWER_SHARE, ratio_of="context", **_both(k)
        )
        for k in (0.08, 0.15)
    },
    "instruct_exact": lemo("exact forward, gradient through 20 %", ANSWER_SHARE, forward_ratio=1.0, backward_ratio=0.2),
    "instruct_random": lemo("20 % of rows, answers included, random", scorer="random", **_CONTEXT),
}
METHODS: dict[str, Method]
METHODS = NULLS | PRESETS | RIVALS | ABLATIONS | TARGETS | PREDICTED | THRESHOLDS | INSTRUCT
