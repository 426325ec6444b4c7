"""What the quality page says first: presets and what they are measured against; and every method in words."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from benchmarks.quality_compare import domain_means
from benchmarks.quality_corpus import is_published
from benchmarks.quality_costs import gain_at_64k
from benchmarks.quality_groups import Group, twin_of
from benchmarks.quality_methods import INSTRUCT_DEFAULT, METHODS, PRESETS, RIVALS
from lemo.report.tables import markdown

NOTHING = "–"
# Presets, nulls and rivals of each kind of data, in the order in which they are shown.
FEATURED = {
    "text": (
        "dense_all",
        *(f"dense_rows_{preset}" for preset in PRESETS),
        *PRESETS,
        "no_context",
        "dense_4k",
        "dense_8k",
        *RIVALS,
        "predict_mass_loss_rows",
        "skip_30_all_predictor",
        "skip_30_all_recent",
        "skip_30_all_random",
        "oracle_mass",
    ),
    "answers": (
        "instruct_dense",
        "instruct_no_document",
        "instruct_default",
        "instruct_words",
        "instruct_words_prompt_twice",
        INSTRUCT_DEFAULT,
        "instruct_dense_twice",
    ),
}


def number(value: float | None, form: str = ".4f") -> str:
    """A number, or a dash."""
    return NOTHING if value is None else format(value, form)


def with_error(found: tuple[float, float, str] | None) -> str:
    """`+0.0123 ± 0.0012`, or a dash."""
    return NOTHING if found is None else f"{found[0]:+.4f} ± {found[1]:.4f}{found[2]}"


def shown(method: str) -> str:
    """A method's name as tables have it."""
    return method.replace("_", " ")


def main_group(groups: Sequence[Group], data: str) -> Group | None:
    """Of a kind of data, the published group in which most featured adapters were trained."""

    def cells(group: Group) -> int:
        return sum(len(group.of(m, "dense")) for m in group.methods if m in FEATURED[data])

    mine = (g for g in groups if g.protocol["data"] == data and is_published(g.protocol))
    return max(mine, key=cells, default=None)


def featured_table(group: Group) -> str:
    """One line for each preset, null and rival that was measured."""
    head = ["method", "what", "seeds", "ideal gain", "loss", "over dense, same loss rows", f"over {shown(group.dense)}"]
    rows = []
    for method in FEATURED[group.protocol["data"]]:
        if method not in group.methods:
            continue
        twin = twin_of(method)
        name = f"**{shown(method)}**" if method in PRESETS else shown(method)
        rows.append(
            [
                name,
                METHODS[method].about,
                str(len(group.of(method, "dense"))),
                number(gain_at_64k(METHODS[method]).get("llama-3-8b"), ".2f"),
                number(group.mean(method, "dense")),
                with_error(None if twin is None else group.gap(method, twin)),
                with_error(group.gap(method, group.dense)),
            ]
        )
    return markdown(head, rows)


def domain_table(group: Group, methods: Sequence[str] | None = None) -> str:
    """Loss of each domain; of those of `methods` that were measured, or of all."""
    chosen = [m for m in methods or group.methods if m in group.methods]
    found = {m: [domain_means(r) for r in group.of(m, "dense").values()] for m in chosen}
    domains = list(next(iter(found.values()))[0])
    rows = [[shown(m), *(number(fmean(x[d] for x in means)) for d in domains)] for m, means in found.items()]
    return markdown(["method", *domains], rows)


def far_table(group: Group) -> str:
    """How well a text near the start of a window is copied at its end; empty where nothing was asked so."""
    rows = [
        [
            shown(m),
            str(len(found)),
            number(group.mean(m, "far_copy")),
            with_error(group.gap(m, group.dense, "far_copy")),
        ]
        for m in group.methods
        if (found := group.of(m, "far_copy"))
    ]
    return markdown(["method", "seeds", "loss of the copy", f"over {shown(group.dense)}"], rows) if rows else ""


def method_table(groups: Sequence[Group]) -> str:
    """Every method of the page in words."""
    measured = {m for group in groups for m in group.methods}
    return markdown(["method", "what"], [[shown(m), METHODS[m].about] for m in METHODS if m in measured])
