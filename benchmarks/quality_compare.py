"""Records of comparisons between cells: paired by seed, a domain at a time, with the bars that they answer.

The unit that repeats is the seed: a cell's losses are averaged over the windows of a domain first. Errors are those of
the paired differences over seeds. A cell counts only beside one with the same protocol, and a domain is void when dense
LoRA improves it by less than 0.2 nats; every seed that both methods have run is used, at the newest measurement.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.derived import DerivedRecords
from benchmarks.quality_corpus import corpus_of, is_published
from benchmarks.quality_costs import gain_at_64k
from benchmarks.quality_grids import STEPS
from benchmarks.quality_methods import INSTRUCT_DEFAULT, METHODS
from lemo.measure.record import Record, read_records
from lemo.measure.statistics import value_of

SCRIPT = "benchmarks/quality.py"
VOID_BELOW_NATS = 0.2
CLEAR_ERRORS = 5.0
_PROTOCOL = ("data", "domains", "window", "batch", "rank", "dtype", "model", "validation_windows", "corpus")


@dataclass(frozen=True)
class Comparison:
    """One gap between two methods.

    Attributes:
        bar: that it answers, or None.
        method: the candidate.
        baseline: what it is compared with.
        metric: of the cells.
        statistic: how the value follows.
        baseline_metric: another metric of the baseline's cells.
        pooled: pairs are (seed, domain) instead of one Record a domain.
        equal_flops: the candidate's steps followed from the baseline's FLOPs.
        unit: of the value.
        best: a third method, for the share of its advantage; void where that is below five standard errors.
    """

    bar: str | None
    method: str
    baseline: str
    metric: str = "dense"
    statistic: str = "gap_plus_error"
    baseline_metric: str | None = None
    pooled: bool = False
    equal_flops: bool = False
    unit: str = "nats"
    best: str | None = None


# Where selection decides: rows that skip in forward too, at equal ratios. A recipe calibrates predictors of what rows
# with loss read; until decision 21 they were of what all rows read.
PREDICTOR, RANDOM, FORMER = "predict_mass_loss_rows", "skip_30_all_random", "skip_30_all_predictor"
_SHARE = "share_of_best_less_error"
COMPARISONS = (
    Comparison("B.default_gap", "balanced", "dense_rows_balanced"),
    Comparison("B.default_total_gap", "balanced", "dense_all"),
    Comparison("B.equal_compute_gain", "balanced", "dense_all", statistic="gain_less_error", equal_flops=True),
    *(
        Comparison(None, f"balanced_batch_{n}", "dense_all", statistic="gain_less_error", equal_flops=True)
        for n in (4, 7)
    ),
    *(
        Comparison(None, f"repeats_12_{near}", "dense_all", statistic="gain_less_error", equal_flops=True)
        for near in (40, 85)
    ),
    Comparison("B.over_short_windows", "balanced", "dense_4k", "last_quarter", "gain_less_error"),
    Comparison("B.over_short_windows", "balanced", "dense_8k", "last_quarter", "gain_less_error"),
    Comparison("B.mha_gap", "balanced", "dense_rows_balanced"),
    Comparison("B.conservative_gap", "quality", "dense_rows_quality"),
    Comparison("B.aggressive_gap", "fast", "dense_rows_fast"),
    Comparison("B.over_random_nats", PREDICTOR, RANDOM, statistic="gain_less_error", pooled=True),
    Comparison("B.over_random_se", PREDICTOR, RANDOM, statistic="gain_in_errors", pooled=True, unit="standard errors"),
    *(
        Comparison(None, method, baseline, metric, "gain_less_error", pooled=True)
        for method, baseline in ((FORMER, RANDOM), ("skip_30_all_recent", RANDOM), (PREDICTOR, FORMER))
        for metric in ("dense", "sparse")
    ),
    Comparison(None, PREDICTOR, RANDOM, "sparse", "gain_less_error", pooled=True),
    *(
        Comparison(bar, method, RANDOM, statistic=_SHARE, pooled=True, unit="share", best=best)
        for bar, method, best in (("B.oracle_share", PREDICTOR, "oracle_mass_loss_rows"), (None, FORMER, "oracle_mass"))
    ),
    *(
        Comparison(bar, name, name, "recall_end", "kept_less_error", "recall_start", pooled=True, unit="share")
        for bar, name in (("B.recall_drift", PREDICTOR), (None, FORMER))
    ),
    Comparison("B.sparse_gap", "balanced", "balanced", "sparse", baseline_metric="loss_rows"),
    # What `lemo init` writes for documents with questions; the default without rows of prompts beside it.
    Comparison("B.instruct_gap", INSTRUCT_DEFAULT, "instruct_dense"),
    *(
        Comparison(None, f"instruct_{name}", "instruct_dense")
        for name in ("words_prompt_twice", "prompt_twice", "default", "words", "words_answered")
    ),
    Comparison(None, INSTRUCT_DEFAULT, "instruct_dense_twice"),
    Comparison("B.instruct_context_value", "instruct_dense", "instruct_no_document", statistic="gain_less_error"),
)
GAINS = (
    ("B.default_ideal_gain", "balanced", "llama-3-8b"),
    ("B.mha_ideal_gain", "balanced", "llama-2-7b"),
    ("B.conservative_ideal_gain", "quality", "llama-3-8b"),
    ("B.aggressive_ideal_gain", "fast", "llama-2-7b"),
)


class Cells:
    """Scored cells of a Records file, newest first.

    What was measured counts, not what it was called then: a cell goes by the name that its choices have now, and is
    left out when no method makes them any more.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        """Keeps Records that belong to a cell."""
        names = {_text(method.setting()): name for name, method in reversed(METHODS.items())}
        found = [(record, _name_now(record, names)) for record in records if "cell" in record.setting]
        kept = [_told(record, name) for record, name in found if name]
        self.records = sorted(kept, key=lambda r: r.time, reverse=True)

    def protocols(self) -> list[dict[str, Any]]:
        """Protocols that occur, those on the published data first."""
        found = {str({k: r.setting[k] for k in _PROTOCOL}): {k: r.setting[k] for k in _PROTOCOL} for r in self.records}
        return sorted(found.values(), key=lambda protocol: not is_published(protocol))

    def of(self, method: str, metric: str, protocol: dict[str, Any], **wanted: Any) -> list[Record]:
        """Newest Record of each seed, at each number of steps and rate, of a method that agrees with what is wanted.

        A method that was run under two names counts once.
        """
        found: dict[tuple, Record] = {}
        for record in self.records:
            setting = record.setting
            if record.name != f"quality/{method}/{metric}" or any(setting[k] != protocol[k] for k in _PROTOCOL):
                continue
            if any(setting[k] != v for k, v in wanted.items()):
                continue
            same = (record.seeds, *(setting[k] for k in ("asked_steps", "flops_steps", "learning_rate")))
            found.setdefault(same, record)
        return list(found.values())


def _name_now(record: Record, names: dict[str, str]) -> str | None:
    """The method of a cell: that of its name where the name still means its choices, else the first that makes them."""
    name, choices = record.name.split("/")[1], _text(record.setting["choices"])
    return name if name in METHODS and _text(METHODS[name].setting()) == choices else names.get(choices)


def _told(record: Record, name: str) -> Record:
    """The Record under a method's name, with the data that it was measured on."""
    setting = {**record.setting, "corpus": corpus_of(record.setting)}
    return dataclasses.replace(record, name=f"quality/{name}/{record.name.split('/', 2)[2]}", setting=setting)


def _text(choices: dict[str, Any]) -> str:
    return json.dumps(choices, sort_keys=True)


def domain_means(record: Record) -> dict[str, float]:
    """Mean loss of each domain."""
    order = record.setting["window_order"]
    return {
        domain: fmean(x for x, o in zip(record.samples, order, strict=True) if o == domain)
        for domain in dict.fromkeys(order)
    }


def void_domains(cells: Cells, protocol: dict[str, Any], dense: Sequence[Record]) -> dict[str, float]:
    """Domains that dense LoRA improves by less than 0.2 nats, with by how much."""
    name = "before" if protocol["data"] == "text" else "instruct_before"
    before = cells.of(name, "dense", protocol)
    if not before or not dense:
        return {}
    start = domain_means(before[0])
    ends = [domain_means(r) for r in dense]
    gains = {d: start[d] - fmean(e[d] for e in ends) for d in start}
    return {d: gain for d, gain in gains.items() if gain < VOID_BELOW_NATS}


def pairs_of(
    cells: Cells, item: Comparison, protocol: dict[str, Any]
) -> Iterator[tuple[str, int, list[tuple[Record, Record]]]]:
    """(label, steps, pairs of baseline and candidate, one a seed) of every number of steps that both have run."""
    flops = {"flops_steps": None}
    baselines = cells.of(item.baseline, item.baseline_metric or item.metric, protocol, **flops)
    candidates = cells.of(item.method, item.metric, protocol, **({} if item.equal_flops else flops))
    groups: dict[tuple[int, float], list[tuple[Record, Record]]] = {}
    for baseline in baselines:
        for candidate in candidates:
            key = "flops_steps" if item.equal_flops else "asked_steps"
            same = baseline.setting["asked_steps"] == candidate.setting[key]
            same = same and baseline.setting["learning_rate"] == candidate.setting["learning_rate"]
            if same and baseline.seeds == candidate.seeds:
                steps = candidate.setting[key]
                groups.setdefault((steps, candidate.setting["learning_rate"]), []).append((baseline, candidate))
    for (steps, rate), pairs in sorted(groups.items()):
        yield f"{steps} steps at {rate:g}", steps, sorted(pairs, key=lambda p: p[0].seeds)


def write_comparisons(path: Path) -> int:
    """Appends Records of every comparison that at least two seeds allow; prints all. Returns 0."""
    if not path.exists():
        print(f"{path}: no Records yet")
        return 0
    records = read_records(path)
    cells = Cells(records)
    derived = DerivedRecords(path, records, SCRIPT)
    for protocol in cells.protocols():
        for item in COMPARISONS:
            for label, steps, pairs in pairs_of(cells, item, protocol):
                if item.best is not None:
                    _compare_share(item, protocol, (label, steps, pairs), cells, derived)
                    continue
                _compare(item, protocol, (label, steps, pairs), cells, derived)
    _write_gains(cells, derived)
    return 0


def _compare(
    item: Comparison,
    protocol: dict[str, Any],
    group: tuple[str, int, list[tuple[Record, Record]]],
    cells: Cells,
    derived: DerivedRecords,
) -> None:
    """One comparison: a Record a domain, or one of all pairs of seed and domain."""
    label, steps, pairs = group
    void = void_domains(cells, protocol, [b for b, _ in pairs]) if item.baseline.startswith("dense") else {}
    means = [(domain_means(b), domain_means(c)) for b, c in pairs]
    domains = list(means[0][0])
    lists = {d: ([b[d] for b, _ in means], [c[d] for _, c in means]) for d in domains}
    if item.pooled:
        lists = {"": tuple([x for d in domains for x in lists[d][i]] for i in (0, 1))}
    for domain, (baseline, candidate) in lists.items():
        gap = fmean(candidate) - fmean(baseline)
        name = f"quality/{item.method}/gap/{item.baseline}/{item.metric}" + (f"/{domain}" if domain else "")
        note = f" (void: dense gains {void[domain]:.2f} nats)" if domain in void else ""
        unit = "nats" if item.unit == "standard errors" else item.unit
        print(f"{name}, {label}: {gap:+.4f} {unit} over {len(pairs)} seeds{note}", flush=True)
        if len(pairs) < 2:
            continue
        if item.statistic == "gain_in_errors" and len({c - b for b, c in zip(baseline, candidate, strict=True)}) == 1:
            print(f"{name}, {label}: all pairs differ alike, which has no error to count in", flush=True)
            continue
        published = steps == STEPS and domain not in void and protocol["window"] == 16384 and is_published(protocol)
        at = f"{domain}/{item.baseline}" if item.bar == "B.over_short_windows" else domain
        bar = None if item.bar is None or not published else item.bar + (f"/{at}" if at else "")
        setting = {**_setting_of(item, protocol, steps, pairs), "domain": domain}
        samples = {"baseline": baseline, "lemo": candidate}
        derived.write(name, item.unit, samples, setting, [r for p in pairs for r in p], bar)


def _compare_share(
    item: Comparison,
    protocol: dict[str, Any],
    group: tuple[str, int, list[tuple[Record, Record]]],
    cells: Cells,
    derived: DerivedRecords,
) -> None:
    """How much of the best method's advantage over the baseline the candidate has: one Record of all (seed, domain)."""
    label, steps, pairs = group
    rate = pairs[0][1].setting["learning_rate"]
    wanted = {"flops_steps": None, "asked_steps": steps, "learning_rate": rate}
    bests = {r.seeds: r for r in cells.of(str(item.best), item.metric, protocol, **wanted)}
    threes = [(b, c, bests[b.seeds]) for b, c in pairs if b.seeds in bests]
    if not threes:
        return
    domains = list(domain_means(threes[0][0]))
    lists = [[domain_means(three[i])[d] for d in domains for three in threes] for i in range(3)]
    samples = dict(zip(("baseline", "lemo", "best"), lists, strict=True))
    if len(lists[0]) < 2:
        return
    clear = value_of({"baseline": lists[0], "lemo": lists[2]}, "gain_in_errors")
    share = value_of(samples, item.statistic)
    name = f"quality/{item.method}/share/{item.best}/{item.metric}"
    note = "" if clear >= CLEAR_ERRORS else f" (void: {item.best} is {clear:.1f} standard errors better)"
    print(f"{name}, {label}: {share:.3f} over {len(threes)} seeds{note}", flush=True)
    if len(threes) < 2:
        return
    published = steps == STEPS and clear >= CLEAR_ERRORS and protocol["window"] == 16384 and is_published(protocol)
    setting = _setting_of(item, protocol, steps, threes) | {"best": item.best, "advantage_in_errors": clear}
    bar = item.bar if published else None
    derived.write(name, item.unit, samples, setting, [r for three in threes for r in three], bar)


def _setting_of(
    item: Comparison, protocol: dict[str, Any], steps: int, groups: Sequence[Sequence[Record]]
) -> dict[str, Any]:
    """What a comparison was made of. `groups`: Records of one seed each, the baseline's first, then the candidate's."""
    choices = {name: getattr(item, name) for name in ("method", "baseline", "metric", "statistic")}
    named = {k: v for k, v in protocol.items() if k != "corpus" or not is_published(protocol)}
    return {
        **named,
        **choices,
        "steps": steps,
        "learning_rate": groups[0][1].setting["learning_rate"],
        "cells": sorted({record.setting["cell"] for group in groups for record in group}),
        "seeds": [group[0].seeds[0] for group in groups],
    }


def _write_gains(cells: Cells, derived: DerivedRecords) -> None:
    """Ideal gains of presets that have been measured: arithmetic, beside the gaps that they belong to."""
    for bar, method, shape in GAINS:
        sources = [r for r in cells.records if r.name == f"quality/{method}/dense"]
        if sources:
            setting = {"method": method, "shape": shape, "tokens": 65536, "recompute": "lin", "statistic": "min"}
            setting["choices"] = METHODS[method].setting()
            gain = gain_at_64k(METHODS[method])[shape]
            derived.write(f"quality/{method}/ideal_gain", "times", [gain], setting, sources[:1], bar)
