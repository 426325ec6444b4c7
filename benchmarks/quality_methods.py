"""What the quality grids compare: every method as one entry of a table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.quality_ablations import ABLATIONS
from benchmarks.quality_specs import LOSS_SHARE, SPAN, Method, PlanSpec, Ramp, both, exact, skip

_PLAIN = PlanSpec(0.5, 0.5, kv="kept", strip_bypass=True)
_WORDS = PlanSpec(kv="kept", scorer="words", dense_layers=(), strip_bypass=True)
_BARE = PlanSpec(1e-6, 1e-6, kv="kept", scorer="random", dense_layers=(), strip_bypass=True)


def _preset(far: float, local: float, window: int) -> Method:
    about = f"exact forward; loss on {far:.0%} of rows that see all"
    about += f", on {local:.0%} that see chunks of {window} rows" if local else f"; others see chunks of {window} rows"
    by = "repeats" if local else "random"
    return replace(exact(about, far, context_window=window), local_share=local, far=by)


PRESETS = {
    "balanced": _preset(0.12, 0.25, 1024),
    "quality": _preset(0.5, 0.0, 1024),
    "fast": _preset(0.04, 0.15, 512),
}


def _twin(preset: str) -> Method:
    """Dense LoRA, the loss on a preset's rows."""
    method = PRESETS[preset]
    rows = {name: getattr(method, name) for name in ("loss_share", "local_share", "span")}
    return Method(f"dense LoRA, loss on the rows of {preset}", **rows)


NULLS = {
    **{
        f"balanced_batch_{n}": replace(PRESETS["balanced"], about=f"the default, {n} sequences a step", sequences=n)
        for n in (4, 7)
    },
    "before": Method("the model before any training"),
    "dense_all": Method("dense LoRA, loss on all rows"),
    **{f"dense_rows_{preset}": _twin(preset) for preset in PRESETS},
    "dense_rows_12": Method("dense LoRA, loss on 12 % of rows, in runs", loss_share=LOSS_SHARE, span=SPAN),
    "dense_rows_22": Method("dense LoRA, loss on 22 % of rows, in runs", loss_share=0.22, span=SPAN),
    "dense_rows_30": Method("dense LoRA, loss on 30 % of rows, in runs", loss_share=0.3, span=SPAN),
    "dense_rows_42": Method("dense LoRA, loss on 42 % of rows, in runs", loss_share=0.42, span=SPAN),
    "dense_rows_10": Method("dense LoRA, loss on 10 % of rows, in runs", loss_share=0.1, span=SPAN),
    "dense_4k": Method("dense LoRA on 4K windows, FLOPs of the default", pieces=4, flops_of="balanced"),
    "dense_8k": Method("dense LoRA on 8K windows, FLOPs of the default", pieces=2, flops_of="balanced"),
    # As positional skip-wise training (PoSE, arXiv 2309.10400) does it: pieces of a text, at their places in the whole.
    **{
        f"alone_{round(100 * s)}": Method(f"loss on {s:.0%} of rows, all others left out", _BARE, s, span=SPAN)
        for s in (0.3, 0.35, 0.42)
    },
    "no_context": replace(_twin("balanced"), about="the default's loss rows, all other context removed", plan=_BARE),
}
RIVALS = {
    "random_ltd": Method(
        "random-LTD: random rows of each layer, no bypass, loss everywhere, ramp to dense",
        replace(_PLAIN, scorer="random", block_size=1, **both(0.3)),
        forced=False,
        ramp=Ramp(0.0, 1.0),
    ),
    "random_ltd_no_ramp": Method(
        "random-LTD without its ramp",
        replace(_PLAIN, scorer="random", block_size=1, **both(0.3)),
        forced=False,
    ),
    "longlora": Method("LongLoRA: attention in shifted groups while training", rival="shifted_groups"),
    "fixed_rule": Method(
        "the artifact's rule: upper half keeps 40 %, attention only, loss everywhere",
        replace(_PLAIN, **both(0.4)),
        forced=False,
        rival="attention_only",
    ),
    "plain": Method("the plain method: half of the rows, loss everywhere, no bypass", _PLAIN, forced=False),
    "tokentune": Method(
        "TokenTune: all rows forward, gradient and loss through random rows",
        replace(_BARE, forward_ratio=1.0, block_size=1),
        PRESETS["balanced"].loss_share + PRESETS["balanced"].local_share,
    ),
}
ANSWER_SHARE = 0.08  # of rows of an instruction sample, for FLOPs only: the data decides which rows carry loss
ORACLES = ("mass", "mass_loss_rows", "mass_detrended", "mass_times_value", "mass_peak", "interaction")
TARGETS = {f"oracle_{name}": skip(f"30 % of rows, oracle, {name.replace('_', ' ')}", oracle=name) for name in ORACLES}
PREDICTED = {
    f"predict_{name}": skip(f"30 % of rows, predictors of {name.replace('_', ' ')}", target=name)
    for name in ("mass_loss_rows", "mass_detrended", "mass_times_value", "mass_peak")
}
PREDICTED["predict_mass_loss_rows_same"] = skip(
    "the same rows in all layers, by the first one's predictor of mass loss rows",
    target="mass_loss_rows",
    oracle="first_layer",
)
THRESHOLDS = {
    f"threshold_{t:+.1f}": skip(f"blocks above {t:+.1f} standard deviations", threshold=t)
    for t in (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
}


def _answers(about: str, backward: float, **changes: Any) -> Method:
    """Exact forward on instruction data: answers carry the loss, some of the context passes gradient too."""
    return exact(about, ANSWER_SHARE, None, backward_ratio=backward, **changes)


_CONTEXT: dict[str, Any] = {"loss_share": ANSWER_SHARE, "span": None}
_WORDS_ABOUT = "rows by words of the questions, and loss on local rows of the prompt"
# What `lemo init` writes for documents with questions.
INSTRUCT_DEFAULT = "instruct_words_prompt_twice_window_2048"
INSTRUCT = {
    "instruct_before": Method("before any training"),
    "instruct_dense": Method("dense LoRA, answers supervised"),
    "instruct_no_document": Method("dense LoRA, questions and answers alone", documents=False),
    "instruct_exact": _answers("exact forward, gradient through the answers", ANSWER_SHARE),
    "instruct_default": _answers(
        "12 % of the rows, the answers and those before them; others see chunks of 1024: the default until decision 20",
        0.12,
        scorer="recent",
        context_window=1024,
    ),
    "instruct_window_4096": _answers("the default with chunks of 4096", 0.12, scorer="recent", context_window=4096),
    "instruct_no_window": _answers("the default, all rows see all", 0.12, scorer="recent"),
    "instruct_exact_recent": _answers("and through 15 % of the rows, those before them", 0.15, scorer="recent"),
    **{
        f"instruct_prompt_{round(100 * share)}_weight_{weight:g}": replace(
            _answers("the default, and loss on rows of the prompt", 0.15, scorer="recent", context_window=1024),
            prompt_rows=(share, weight),
        )
        for share, weight in ((0.08, 0.1), (0.08, 0.3), (0.08, 1.0), (0.1, 1.0))
    },
    "instruct_attended": _answers(
        "15 % of the rows, the answers and what they attend to most, found by looking",
        0.15,
        scorer="predictor",
        oracle="mass_loss_rows",
        context_window=1024,
    ),
    **{
        f"instruct_{which}": _answers(
            "15 % of the rows, those whose dense gradient is largest, found by looking",
            0.15,
            scorer="predictor",
            oracle=which,
            context_window=1024,
        )
        for which in ("gradient", "gradient_same")
    },
    "instruct_words": _answers(
        "the default: 12 % of the rows, those whose words the questions have, rare ones first",
        0.12,
        scorer="words",
        context_window=1024,
    ),
    **{
        f"instruct_{oracle}": _answers(about, 0.12, scorer="predictor", oracle=oracle, context_window=1024)
        for oracle, about in (
            ("words_answered", "the same, and words of the answers"),
            ("words_chained", "the default, and words that stand beside those, twice"),
            ("words_random", "12 % of the rows, half of them by words of the questions, half random ones"),
        )
    },
    "instruct_recent_random": _answers(
        "15 % of the rows, some before the answers and random ones",
        0.15,
        scorer="predictor",
        oracle="recent_random",
        context_window=1024,
    ),
    "instruct_dense_every_4": replace(
        _answers("the default, and every fourth step dense", 0.12, scorer="recent", context_window=1024),
        dense_every=4,
    ),
    **{
        f"instruct_corrected_{every}": replace(
            _answers("the default, corrected by a dense step now and then", 0.12, scorer="recent", context_window=1024),
            corrected=(every, decay),
        )
        for every, decay in ((4, 0.8), (8, 0.8), (16, 0.7))
    },
    "instruct_recent_30": _answers("the default with 30 % of the rows", 0.3, scorer="recent", context_window=1024),
    **{
        f"instruct_prompt_local_{round(100 * share)}": replace(
            _answers("the default, and loss on local rows of the prompt", 0.12, scorer="recent", context_window=1024),
            prompt_rows=(share, 1.0),
            prompt_local=True,
        )
        for share in (0.1, 0.25)
    },
    **{
        f"instruct_{name}": replace(
            _answers(about, share, scorer="words", context_window=window),
            prompt_rows=(0.1, 2.0),
            prompt_of="answers",
            prompt_local=True,
        )
        for name, about, share, window in (
            ("words_prompt_twice", _WORDS_ABOUT, 0.12, 1024),
            ("words_prompt_twice_window_2048", _WORDS_ABOUT, 0.12, 2048),
            ("fast", "the preset fast: answers, 4 % of the rows in all, chunks of 512", 0.04, 512),
        )
    },
    "instruct_quality": _answers(
        "the preset quality: half of the rows, no loss on the prompt", 0.5, scorer="words", context_window=2048
    ),
    **{
        f"instruct_prompt_twice{'' if share == 0.1 else f'_{round(100 * share)}'}": replace(
            _answers("the default, and loss on local rows of the prompt", 0.12, scorer="recent", context_window=1024),
            prompt_rows=(share, 2.0),
            prompt_of="answers",
            prompt_local=True,
        )
        for share in (0.1, 0.2)
    },
    **{
        f"instruct_words_alone_{round(100 * k)}": replace(
            Method(f"{k:.0%} of the rows, by words of the questions, all others left out", replace(_WORDS, **both(k))),
            loss_share=ANSWER_SHARE,
            prompt_rows=(0.1, 2.0),
            prompt_of="answers",
        )
        for k in (0.15, 0.3)
    },
    "instruct_dense_twice": Method(
        "dense LoRA, and loss on rows of the prompt", prompt_rows=(0.1, 2.0), prompt_of="answers"
    ),
    **{
        name: Method("dense LoRA, and loss on rows of the prompt", prompt_rows=rows)
        for name, rows in (("instruct_dense_prompt", (0.08, 0.3)), ("instruct_dense_prompt_10_weight_1", (0.1, 1.0)))
    },
    "instruct_warm": replace(
        _answers("the default, from dense within a fifth of the steps", 0.12, scorer="recent", context_window=1024),
        ramp=Ramp(0.2, 0.0),
    ),
    "instruct_skip": skip("20 % of rows, those before the answers", scorer="recent", **_CONTEXT, **both(0.2)),
    "instruct_skip_predictor": skip("20 % of rows, predictors", **_CONTEXT, **both(0.2)),
    "instruct_skip_random": skip("20 % of rows, random", scorer="random", **_CONTEXT, **both(0.2)),
    **{
        f"instruct_context_{round(100 * k)}": skip(
            f"{k:.0%} of the context, all answers", ratio_of="context", **_CONTEXT, **both(k)
        )
        for k in (0.08, 0.15)
    },
}
METHODS: dict[str, Method]
METHODS = NULLS | PRESETS | RIVALS | ABLATIONS | TARGETS | PREDICTED | THRESHOLDS | INSTRUCT


def dense_twin(name: str) -> str | None:
    """The dense method on whole windows whose loss rows are drawn alike; None where no such method is defined."""
    method = METHODS[name]
    if name in INSTRUCT:
        dense = (m for m in INSTRUCT if INSTRUCT[m].plan is None and INSTRUCT[m].documents and m != "instruct_before")
        rows = (method.prompt_rows, method.prompt_of)
        return next((m for m in dense if (INSTRUCT[m].prompt_rows, INSTRUCT[m].prompt_of) == rows), None)
    rows = (method.loss_share, method.local_share, method.placement, method.span)
    for other, found in METHODS.items():
        whole = found.plan is None and found.rival is None and found.pieces == 1 and other not in ("before", *INSTRUCT)
        if whole and (found.loss_share, found.local_share, found.placement, found.span) == rows:
            return other
    return None
