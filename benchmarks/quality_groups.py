"""Cells of the quality benchmark that may be compared, and their gaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.quality_compare import Cells, domain_means
from benchmarks.quality_corpus import is_published
from benchmarks.quality_methods import METHODS, dense_twin
from lemo.measure.record import Record
from lemo.measure.statistics import paired_standard_error


class Group:
    """Cells that may be compared: one protocol, one number of steps asked for, one learning rate.

    Attributes:
        methods: those that have run.
        dense: dense LoRA, which learns from every row, or from every answer.
    """

    def __init__(self, cells: Cells, protocol: Mapping[str, Any], steps: int, rate: float) -> None:
        """Finds which methods have run."""
        self.cells, self.protocol, self.steps, self.rate = cells, dict(protocol), steps, rate
        self.dense = "dense_all" if protocol["data"] == "text" else "instruct_dense"
        names = {r.name.split("/")[1] for r in cells.records if r.name.endswith("/dense")}
        self.methods = [m for m in METHODS if m in names and self.of(m, "dense")]

    def of(self, method: str, metric: str) -> dict[int, Record]:
        """Newest Record of each seed."""
        wanted = {"asked_steps": self.steps, "learning_rate": self.rate, "flops_steps": None}
        return {r.seeds[0]: r for r in self.cells.of(method, metric, self.protocol, **wanted)}

    def mean(self, method: str, metric: str) -> float | None:
        """Mean over seeds."""
        found = self.of(method, metric)
        return fmean(r.value for r in found.values()) if found else None

    def gap(
        self, method: str, baseline: str, metric: str = "dense", of: str | None = None
    ) -> tuple[float, float, str] | None:
        """(mean, standard error, what the error is over) of method minus baseline; None without a common seed."""
        theirs, ours = self.of(baseline, of or metric), self.of(method, metric)
        seeds = sorted(theirs.keys() & ours.keys())
        if not seeds or (method == baseline and of is None):
            return None
        if len(seeds) == 1:
            pair = theirs[seeds[0]].samples, ours[seeds[0]].samples
            kind = "w"
        else:
            pair, kind = ([theirs[s].value for s in seeds], [ours[s].value for s in seeds]), ""
        if len(pair[0]) != len(pair[1]) or len(pair[0]) < 2:
            return None
        return fmean(pair[1]) - fmean(pair[0]), paired_standard_error(*pair), kind

    def domain_gaps(self, method: str, baseline: str) -> dict[str, float]:
        """Mean gap of each domain."""
        theirs, ours = self.of(baseline, "dense"), self.of(method, "dense")
        seeds = theirs.keys() & ours.keys()
        if not seeds or method == baseline:
            return {}
        pairs = [(domain_means(theirs[s]), domain_means(ours[s])) for s in seeds]
        return {d: fmean(o[d] - t[d] for t, o in pairs) for d in pairs[0][0]}


def groups_of(records: Sequence[Record]) -> list[Group]:
    """Groups in the order: published data and steps first, then by steps; longest protocol last."""
    cells = Cells([r for r in records if r.name.startswith("quality/")])
    found = []
    for protocol in cells.protocols():
        keys = {
            (r.setting["asked_steps"], r.setting["learning_rate"])
            for r in cells.records
            if all(r.setting[k] == v for k, v in protocol.items()) and r.setting["learning_rate"] > 0
        }
        found += [Group(cells, protocol, steps, rate) for steps, rate in keys]

    def order(group: Group) -> tuple:
        protocol = group.protocol
        return not is_published(protocol), protocol["data"] != "text", protocol["window"], -group.steps, group.rate

    return sorted(found, key=order)


def twin_of(method: str) -> str | None:
    """Another method, dense, on the same loss rows."""
    twin = dense_twin(method)
    return None if twin == method else twin
