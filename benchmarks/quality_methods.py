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
        context_window: rows of a chunk, which with the chunk before is what rows without gradient see; None for all.
        far_share: share of the far keys that attention's backward reads.
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
    context_window: int | None = None
    far_share: float = 1.0

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
        span: rows of a run of drawn blocks of loss rows; None draws single blocks.
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

    @property
    def loss_block_size(self) -> int:
        """Rows of a drawn block."""
        return self.plan.block_size if self.plan is not None else 64

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
        for name, default in (("reweight", False), ("refit_every", None), ("span", None), ("rising_share", None)):
            if found[name] == default:
                del found[name]
        later = {"threshold": None, "allocate": False, "ratio_of": "all", "context_window": None, "far_share": 1.0}
        for name, default in later.items():
            if self.plan is not None and found["plan"][name] == default:
                del found["plan"][name]
        return found


LOSS_SHARE, SPAN = 0.12, 1024
EXACT = PlanSpec(1.0, LOSS_SHARE, gradient="keys", scorer="random", dense_layers=())
SKIP = PlanSpec(0.3, 0.3)
_PLAIN = PlanSpec(0.5, 0.5, kv="kept", strip_bypass=True)
_BARE = PlanSpec(1e-6, 1e-6, kv="kept", scorer="random", dense_layers=(), strip_bypass=True)


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


def _both(ratio: float) -> dict[str, float]:
    return {"forward_ratio": ratio, "backward_ratio": ratio}


PRESETS = {
    "balanced": exact("default: exact forward, gradient through 12 % of rows, which carry the loss in runs of 1,024"),
    "balanced_mha": skip(
        "for multi-head models: 60 % of rows forward, 11 % backward",
        forward_ratio=0.6,
        backward_ratio=0.11,
        gradient="keys",
        scorer="recent",
    ),
    "quality": exact("the default with 30 % of rows", 0.3),
    "fast": skip("30 % of rows, others offer no keys, loss on 10 %", scorer="recent", kv="kept", **_both(0.3)),
}
NULLS = {
    "before": Method("the model before any training"),
    "dense_all": Method("dense LoRA, loss on all rows"),
    "dense_rows": Method("dense LoRA, loss on the default's rows", loss_share=LOSS_SHARE, span=SPAN),
    "dense_rows_22": Method("dense LoRA, loss on 22 % of rows, in runs", loss_share=0.22, span=SPAN),
    "dense_rows_30": Method("dense LoRA, loss on 30 % of rows, in runs", loss_share=0.3, span=SPAN),
    "dense_rows_42": Method("dense LoRA, loss on 42 % of rows, in runs", loss_share=0.42, span=SPAN),
    "dense_rows_10": Method("dense LoRA, loss on 10 % of rows, in runs", loss_share=0.1, span=SPAN),
    "dense_4k": Method("dense LoRA on 4K windows, FLOPs of the default", pieces=4, flops_of="balanced"),
    "dense_8k": Method("dense LoRA on 8K windows, FLOPs of the default", pieces=2, flops_of="balanced"),
    "no_context": Method("loss rows with all other context removed", _BARE, LOSS_SHARE, span=SPAN),
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
    # one step at a time from dense to the default, and past it
    "dense_blocks": Method("dense LoRA, loss on 12 % of rows, in single blocks", loss_share=LOSS_SHARE),
    "blocks": exact("the default with single blocks of loss rows", span=None),
    "spread_runs": replace(exact("the default with runs spread evenly"), placement="spread"),
    **{f"span_{n}": exact(f"the default with runs of {n} rows", span=n) for n in (256, 512, 2048)},
    "rows": exact("the default, keys of other rows constant", gradient="rows"),
    "pairs": exact("the default, scores with other rows constant", gradient="pairs"),
    **{
        f"pairs_{round(100 * s)}_span_{n}": exact(
            f"exact forward, pairs through {s:.0%} of rows, in runs of {n}", s, n, gradient="pairs"
        )
        for s, n in ((0.1, 1024), (0.22, 1024), (0.22, 2048))
    },
    **{f"loss_{round(100 * s)}": exact(f"the default with {s:.0%} of rows", s) for s in (0.06, 0.2)},
    "recent_context": exact(
        "loss on 9 %, gradient also through 3 % of rows before them", 0.09, backward_ratio=0.12, scorer="recent"
    ),
    "random_context": exact("loss on 9 %, gradient also through 3 % of random rows", 0.09, backward_ratio=0.12),
    **{
        f"window_{w}{tail}": exact(
            f"the default{of}, context rows see the last {w} to {2 * w} rows", share, context_window=w
        )
        for w in (512, 1024, 2048, 4096)
        for tail, of, share in (("", "", LOSS_SHARE), ("_30", " with 30 % of rows", 0.3))
    },
    **{
        f"far_{round(100 * far)}_rows_{round(100 * s)}" + (f"_window_{w}" if w else ""): exact(
            f"the default with {s:.0%} of rows, {far:.1%} of the far keys in backward"
            + (f", context rows see the last {w} to {2 * w} rows" if w else ""),
            s,
            far_share=far,
            context_window=w,
        )
        for far, s, w in (
            (0.25, 0.12, None),
            (0.25, 0.2, None),
            (0.25, 0.3, None),
            (0.125, 0.3, None),
            (0.25, 0.12, 1024),
            (0.25, 0.25, 2048),
            (0.25, 0.3, 2048),
            (0.25, 0.42, 2048),
            (0.125, 0.42, 2048),
            (0.125, 0.5, 2048),
        )
    },
    "rows_far_12_30": exact(
        "30 % of rows, keys of other rows constant, an eighth of the far keys", 0.3, far_share=0.125, gradient="rows"
    ),
    "pairs_30_span_4096": exact(
        "exact forward, pairs through 30 % of rows, in runs of 4096", 0.3, 4096, gradient="pairs"
    ),
    "rising": replace(
        exact("the default, share of loss rows rising from 4 % to 20 %", backward_ratio=0.04), rising_share=(0.04, 0.2)
    ),
    "falling": replace(
        exact("the default, share of loss rows falling from 20 % to 4 %", backward_ratio=0.04), rising_share=(0.2, 0.04)
    ),
    # skipping in forward as well
    **{
        f"both_{round(100 * f)}_{kv}": skip(
            f"forward {f:.0%}, backward 11 %, kv {kv}",
            forward_ratio=f,
            backward_ratio=0.11,
            gradient="keys",
            scorer="recent",
            kv=kv,
        )
        for f, kv in ((0.6, "all"), (0.7, "all"), (0.6, "kept"), (0.7, "kept"))
    },
    **{
        f"skip_{round(100 * k)}_{kv}_{scorer}": skip(
            f"{k:.0%} of rows, kv {kv}, {scorer}", kv=kv, scorer=scorer, **_both(k)
        )
        for k, kv, scorer in (
            (0.3, "all", "recent"),
            (0.3, "all", "predictor"),
            (0.3, "all", "random"),
            (0.2, "all", "recent"),
            (0.2, "all", "predictor"),
            (0.2, "all", "random"),
            (0.3, "kept", "recent"),
            (0.3, "kept", "predictor"),
            (0.2, "kept", "recent"),
        )
    },
    **{
        f"skip_{round(100 * k)}_{kv}_loss_{round(100 * s)}{'' if scorer == 'recent' else '_' + scorer}": skip(
            f"{k:.0%} of rows, loss on {s:.0%}, kv {kv}, {scorer}", s, kv=kv, scorer=scorer, **_both(k)
        )
        for k, s, kv, scorer in (
            (0.3, 0.25, "kept", "recent"),
            (0.4, 0.3, "kept", "recent"),
            (0.5, 0.4, "kept", "recent"),
            (0.6, 0.5, "kept", "recent"),
            (0.5, 0.4, "all", "recent"),
            (0.5, 0.4, "kept", "random"),
        )
    },
    **{
        f"window_1024_30_span_{n}": exact(
            f"30 % of rows, in runs of {n}, context rows see the last 1024 to 2048 rows", 0.3, n, context_window=1024
        )
        for n in (512, 2048)
    },
    "window_1024_30_spread": replace(
        exact("30 % of rows, runs spread evenly, context rows see the last 1024 to 2048", 0.3, context_window=1024),
        placement="spread",
    ),
    "skip_blocks": skip("30 % of rows, loss on 20 % in single blocks", 0.2, span=None),
    "no_bypass": skip("30 % of rows, no bypass", strip_bypass=True),
    **{f"bypass_{r}": skip(f"30 % of rows, bypass of rank {r}", bypass_rank=r) for r in (16, 256)},
    "bypass_update": skip("30 % of rows, bypass fitted on the layer's own update", bypass_target="update"),
    **{f"block_{c}": skip(f"30 % of rows, blocks of {c} rows", block_size=c) for c in (16, 128)},
    "dense_none": skip("30 % of rows, no dense layers", dense_layers=()),
    "dense_four": skip("30 % of rows, two dense layers at each end", dense_layers=(0, 1, -2, -1)),
    **{
        f"refit_{n}": replace(skip(f"30 % of rows, bypass fitted anew every {n} steps"), refit_every=n)
        for n in (10, 50)
    },
    "hardest_weighted": replace(
        exact("the default, single blocks drawn in proportion to the base model's loss, weighted", span=None),
        placement="hardest",
        reweight=True,
    ),
    # The cost of 28 layers at 30 % and two dense ones, on 30 layers that may all skip.
    "allocated": skip("ratios and dense layers under one budget", dense_layers=(), allocate=True, **_both(0.347)),
    "interaction": skip("30 % of rows, predictors of the paper's score", target="interaction"),
    "dense_at_end": replace(exact("the default, the last 15 % of the steps dense"), ramp=Ramp(0.85, 0.85)),
    "ramp_end": replace(exact("the default, ratio rises to 1 over the last 30 %"), ramp=Ramp(0.7, 1.0)),
}
ANSWER_SHARE = 0.08  # of rows of an instruction sample, for FLOPs only: the data decides which rows carry loss
ORACLES = ("mass", "mass_loss_rows", "mass_detrended", "mass_times_value", "mass_peak", "interaction")
TARGETS = {f"oracle_{name}": skip(f"30 % of rows, oracle, {name.replace('_', ' ')}", oracle=name) for name in ORACLES}
PREDICTED = {
    f"predict_{name}": skip(f"30 % of rows, predictors of {name.replace('_', ' ')}", target=name)
    for name in ("mass_loss_rows", "mass_detrended", "mass_times_value", "mass_peak")
}
THRESHOLDS = {
    f"threshold_{t:+.1f}": skip(f"blocks above {t:+.1f} standard deviations", threshold=t)
    for t in (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
}


def _answers(about: str, backward: float, **changes: Any) -> Method:
    """Exact forward on instruction data: answers carry the loss, some of the context passes gradient too."""
    return exact(about, ANSWER_SHARE, None, backward_ratio=backward, **changes)


_CONTEXT: dict[str, Any] = {"loss_share": ANSWER_SHARE, "span": None}
INSTRUCT = {
    "instruct_before": Method("before any training"),
    "instruct_dense": Method("dense LoRA, answers supervised"),
    "instruct_no_document": Method("dense LoRA, questions and answers alone", documents=False),
    "instruct_exact": _answers("exact forward, gradient through the answers", ANSWER_SHARE),
    "instruct_exact_recent": _answers("and through 15 % of the rows, those before them", 0.15, scorer="recent"),
    "instruct_skip": skip("20 % of rows, those before the answers", scorer="recent", **_CONTEXT, **_both(0.2)),
    "instruct_skip_predictor": skip("20 % of rows, predictors", **_CONTEXT, **_both(0.2)),
    "instruct_skip_random": skip("20 % of rows, random", scorer="random", **_CONTEXT, **_both(0.2)),
    **{
        f"instruct_context_{round(100 * k)}": skip(
            f"{k:.0%} of the context, all answers", ratio_of="context", **_CONTEXT, **_both(k)
        )
        for k in (0.08, 0.15)
    },
}
METHODS: dict[str, Method]
METHODS = NULLS | PRESETS | RIVALS | ABLATIONS | TARGETS | PREDICTED | THRESHOLDS | INSTRUCT


def dense_twin(name: str) -> str | None:
    """The dense method on whole windows whose loss rows are drawn alike; None where no such method is defined."""
    if name in INSTRUCT:
        return "instruct_dense"
    method = METHODS[name]
    rows = (method.loss_share, method.placement, method.span)
    for other, found in METHODS.items():
        whole = found.plan is None and found.rival is None and found.pieces == 1 and other not in ("before", *INSTRUCT)
        if whole and (found.loss_share, found.placement, found.span) == rows:
            return other
    return None
