"""Methods of the quality grids that change one choice of the default or of the methods that skip, and explored ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.quality_specs import LOSS_SHARE, Method, Ramp, both, exact, skip


def recent(what: str, loss_share: float = 0.1, **changes: Any) -> Method:
    """30 % of the rows, those before rows with loss, in every layer; with one choice changed."""
    return skip(f"30 % of rows, recent, {what}", loss_share, **{"scorer": "recent"} | changes)


ABLATIONS = {
    # one step at a time from dense to the default: few loss rows, gradient through them alone, context rows that see
    # their chunk and the one before, loss rows that see no more than these
    "all_far": exact("exact forward, gradient through 37 % of rows, which carry the loss and see all", 0.37),
    "all_far_window": exact("the same, other rows see the last 1024 to 2048", 0.37, context_window=1024),
    "far_12": exact("exact forward, gradient through 12 % of rows, which carry the loss and see all"),
    "far_30": exact("exact forward, gradient through 30 % of rows, which carry the loss and see all", 0.3),
    # choices beside far_12
    "dense_blocks": Method("dense LoRA, loss on 12 % of rows, in single blocks", loss_share=LOSS_SHARE),
    "blocks": exact("far_12 with single blocks of loss rows", span=None),
    "spread_runs": replace(exact("far_12 with runs spread evenly"), placement="spread"),
    **{f"span_{n}": exact(f"far_12 with runs of {n} rows", span=n) for n in (256, 512, 2048)},
    "rows": exact("far_12, keys of other rows constant", gradient="rows"),
    "pairs": exact("far_12, scores with other rows constant", gradient="pairs"),
    **{
        f"pairs_{round(100 * s)}_span_{n}": exact(
            f"exact forward, pairs through {s:.0%} of rows, in runs of {n}", s, n, gradient="pairs"
        )
        for s, n in ((0.1, 1024), (0.22, 1024), (0.22, 2048))
    },
    **{f"loss_{round(100 * s)}": exact(f"far_12 with {s:.0%} of rows", s) for s in (0.06, 0.2)},
    "recent_context": exact(
        "loss on 9 %, gradient also through 3 % of rows before them", 0.09, backward_ratio=0.12, scorer="recent"
    ),
    "random_context": exact("loss on 9 %, gradient also through 3 % of random rows", 0.09, backward_ratio=0.12),
    **{
        f"window_{w}{tail}": exact(
            f"far_12{of}, context rows see the last {w} to {2 * w} rows", share, context_window=w
        )
        for w in (512, 1024, 2048, 4096)
        for tail, of, share in (("", "", LOSS_SHARE), ("_30", " with 30 % of rows", 0.3))
    },
    **{
        f"far_{round(100 * far)}_rows_{round(100 * s)}" + (f"_window_{w}" if w else ""): exact(
            f"far_12 with {s:.0%} of rows, {far:.1%} of the far keys in backward"
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
    **{
        f"local_{round(100 * far)}_{round(100 * near)}{'' if window == 1024 else f'_window_{window}'}": replace(
            exact(
                f"{far:.0%} of rows, loss on {near:.0%} more, which attend as context rows do, within {window}",
                far,
                context_window=window,
            ),
            local_share=near,
        )
        for far, near, window in (
            (0.12, 0.4, 1024),
            (0.2, 0.3, 1024),
            (0.06, 0.3, 1024),
            (0.12, 0.85, 1024),
            (0.1, 0.3, 1024),
            (0.1, 0.25, 2048),
            (0.12, 0.25, 2048),
            (0.12, 0.23, 2048),
            (0.12, 0.25, 4096),
            (0.15, 0.2, 2048),
            (0.2, 0.15, 1024),
        )
    },
    **{
        f"near_grad_{round(100 * far)}_{round(100 * near)}": replace(
            exact(
                f"{far:.0%} of rows, loss on {near:.0%} more, which see all, but pass gradient to keys within 1024",
                far,
                context_window=1024,
                local_forward="all",
            ),
            local_share=near,
        )
        for far, near in ((0.12, 0.25), (0.06, 0.3), (0.08, 0.3), (0.04, 0.33))
    },
    **{
        f"repeats_12_{round(100 * near)}": replace(
            exact(f"the default with {near:.0%} of local loss rows", 0.12, context_window=1024),
            local_share=near,
            far="repeats",
        )
        for near in (0.4, 0.85)
    },
    "far_drawn": replace(
        exact("the default, far rows drawn at random", 0.12, context_window=1024),
        local_share=0.25,
    ),
    "fast_far_drawn": replace(
        exact("preset fast, far rows drawn at random", 0.04, context_window=512), local_share=0.15
    ),
    "rows_far_12_30": exact(
        "30 % of rows, keys of other rows constant, an eighth of the far keys", 0.3, far_share=0.125, gradient="rows"
    ),
    "pairs_30_span_4096": exact(
        "exact forward, pairs through 30 % of rows, in runs of 4096", 0.3, 4096, gradient="pairs"
    ),
    "rising": replace(
        exact("far_12, share of loss rows rising from 4 % to 20 %", backward_ratio=0.04), rising_share=(0.04, 0.2)
    ),
    "falling": replace(
        exact("far_12, share of loss rows falling from 20 % to 4 %", backward_ratio=0.04), rising_share=(0.2, 0.04)
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
            f"{k:.0%} of rows, kv {kv}, {scorer}", kv=kv, scorer=scorer, **both(k)
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
            f"{k:.0%} of rows, loss on {s:.0%}, kv {kv}, {scorer}", s, kv=kv, scorer=scorer, **both(k)
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
    # one choice of skipping at a time, beside skip_30_all_recent
    "skip_blocks": recent("loss on 20 % in single blocks", 0.2, span=None),
    "no_bypass": recent("no bypass", strip_bypass=True),
    **{f"bypass_{r}": recent(f"bypass of rank {r}", bypass_rank=r) for r in (16, 128, 256)},
    "bypass_update": recent("bypass fitted on the layer's own update", bypass_target="update"),
    **{f"block_{c}": recent(f"blocks of {c} rows", block_size=c) for c in (16, 128)},
    "dense_none": recent("no dense layers", dense_layers=()),
    "dense_four": recent("two dense layers at each end", dense_layers=(0, 1, -2, -1)),
    **{f"refit_{n}": replace(recent(f"bypass fitted anew every {n} steps"), refit_every=n) for n in (10, 50)},
    # The cost of 28 layers at 30 % and two dense ones, on 30 layers that may all skip.
    "allocated": recent("ratios and dense layers under one budget", dense_layers=(), allocate=True, **both(0.347)),
    "hardest_weighted": replace(
        exact("far_12, single blocks drawn in proportion to the base model's loss, weighted", span=None),
        placement="hardest",
        reweight=True,
    ),
    "tails": replace(exact("far_12, the last rows of every document", span=None), placement="tail"),
    "interaction": skip("30 % of rows, predictors of the paper's score", target="interaction"),
    # context extension with more than an adapter
    **{
        f"{name}_{'_'.join(trains)}": replace(
            method, about=f"{method.about}; {' and '.join(trains)} trained whole", trains=trains
        )
        for name, method in (("dense_all", Method("dense LoRA, loss on all rows")), ("far_12", exact("far_12")))
        for trains in (("norm",), ("norm", "embed_tokens"))
    },
    "dense_at_end": replace(exact("far_12, the last 15 % of the steps dense"), ramp=Ramp(0.85, 0.85)),
    "ramp_end": replace(exact("far_12, ratio rises to 1 over the last 30 %"), ramp=Ramp(0.7, 1.0)),
}
