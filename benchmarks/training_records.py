"""Cells of benchmarks/training.py, one JSON line a turn, and the Records made of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.peers.peer import Setting, parse_method
from benchmarks.training_presets import FAMILY, Comparison, Group, presets
from lemo.errors import DataError
from lemo.measure.record import Record, config_hash, read_records
from lemo.measure.statistics import value_of

SCRIPT = "benchmarks/training.py"
FINAL = ("ok", "out of memory", "unsupported")  # what is not tried again
Cell = dict[str, Any]


def cell_key(setting: Setting, method: str, turn: int, steps: int) -> str:
    """Names a turn, for taking up an interrupted run."""
    return config_hash({**setting.described(), "method": method, "turn": turn, "steps": steps})


def read_cells(path: Path) -> dict[str, Cell]:
    """The newest line of each turn. A line cut off by an interruption is left out."""
    found: dict[str, Cell] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            cell = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[cell["key"]] = cell
    return found


@dataclass(frozen=True)
class Measured:
    """All turns of one method on one setting."""

    group: Group
    method: str
    turns: tuple[Cell, ...]

    @property
    def complete(self) -> bool:
        """Whether all turns ran to their end."""
        return len(self.turns) == self.group.turns and all(cell["status"] == "ok" for cell in self.turns)

    @property
    def out_of_memory(self) -> bool:
        """Whether a turn ran out of memory."""
        return any(cell["status"] == "out of memory" for cell in self.turns)

    def samples(self, name: str) -> list[float]:
        """Of all timed steps."""
        return [float(x) for cell in self.turns for x in cell.get(name, ())]

    @property
    def seconds(self) -> list[float]:
        """Of all timed steps."""
        return self.samples("seconds")

    @property
    def peaks(self) -> list[float]:
        """GiB, of each turn."""
        return [cell["peak_gib"] for cell in self.turns]

    def setting(self) -> dict[str, Any]:
        """For Records."""
        name, options = parse_method(self.method)
        last = self.turns[-1]
        described = {**self.group.setting.described(), **_shared(options)}
        found = {**described, "method": self.method, "peer": name, "timed_steps": len(self.seconds)}
        found |= {"options": last.get("options", options), "warmup": self.group.warmup, "order": "A-B-A-B"}
        found |= {"memory_source": last.get("memory_source"), "allocator": last.get("allocator", "")}
        # Notes are sentences; what they say is in the cells.
        found["method_says"] = {k: v for k, v in last.get("describe", {}).items() if k != "notes"}
        return found


def _shared(options: dict[str, str]) -> dict[str, Any]:
    """What a method overrides of the setting."""
    found: dict[str, Any] = {"supervised_share": float(options["share"])} if "share" in options else {}
    return found | ({"supervised_span": int(options["span"])} if "span" in options else {})


def collect(group: Group, cells: dict[str, Cell]) -> dict[str, Measured]:
    """What is known of each method of a group."""
    found = {}
    for method in group.methods:
        keys = [cell_key(group.setting, method, turn, group.steps) for turn in range(group.turns)]
        turns = tuple(cells[key] for key in keys if key in cells)
        if turns:
            found[method] = Measured(group, method, turns)
    return found


def meet(baseline: Measured, candidate: Measured) -> tuple[Measured, Measured] | None:
    """Both with the turns of those commands only in which both were measured; None where they never met."""
    commands = {cell["command"] for cell in baseline.turns} & {cell["command"] for cell in candidate.turns}
    if not commands:
        return None
    first, second = (
        replace(one, turns=tuple(cell for cell in one.turns if cell["command"] in commands))
        for one in (baseline, candidate)
    )
    return first, second


def make_records(groups: Sequence[Group], cells: dict[str, Cell]) -> tuple[list[Record], list[str]]:
    """All Records that the cells of these groups give, and remarks on those that they do not."""
    records: list[Record] = []
    remarks: list[str] = []
    averaged: dict[tuple[str, str], list[tuple[Measured, Measured]]] = {}
    for group in groups:
        measured = collect(group, cells)
        for one in measured.values():
            records += _of_method(one)
            if one.out_of_memory:
                remarks.append(f"{_where(group)} {one.method}: out of memory")
        for wanted in group.comparisons:
            candidate = measured.get(wanted.candidate)
            if candidate is None or not candidate.complete:
                remarks.append(f"{_where(group)} {wanted.bar or wanted.what}: {wanted.candidate} has no result")
                continue
            if wanted.what == "gib":
                records.append(_peak(candidate, wanted))
                continue
            pair = _strongest(wanted, candidate, measured)
            if pair is None:
                remarks.append(f"{_where(group)} {wanted.bar or wanted.what}: no baseline ran in the same command")
                continue
            baseline, candidate = pair
            if fewest := [one.method for one in pair if len(one.seconds) < group.steps]:
                remarks.append(
                    f"{_where(group)} {wanted.bar or wanted.what}: fewer steps than wanted of {' and '.join(fewest)}"
                )
            if wanted.what.startswith("paper_"):
                averaged.setdefault((wanted.what, wanted.bar or ""), []).append((baseline, candidate))
            else:
                records.append(_ratio(baseline, candidate, wanted))
    expected = len(presets()["paper"])  # also where only some of its groups were asked for
    for (what, bar), pairs in averaged.items():
        if len(pairs) < expected:
            remarks.append(f"{bar}: {len(pairs)} of {expected} shapes and lengths")
        else:
            records.append(_average(pairs, what, bar))
    return records, remarks


def _where(group: Group) -> str:
    return f"{group.setting.label} {group.setting.tokens} {group.setting.lora}"


def _name(one: Measured, what: str) -> str:
    setting = one.group.setting
    layers = "" if setting.layers is None else f"-{setting.layers}-layers"
    return f"training/{setting.label}{layers}/{setting.tokens}/{setting.lora}/{one.method}/{what}"


def _record(one: Measured, what: str, unit: str, samples: Any, statistic: str, **further: Any) -> Record:
    """A Record with the provenance of the turns, which may have run on another machine than this."""
    bar = further.pop("bar", None)
    setting = json.loads(json.dumps({**one.setting(), **further, "statistic": statistic}))
    last = one.turns[-1]
    return Record(
        name=_name(one, what),
        value=value_of(samples, statistic),
        unit=unit,
        samples=samples,
        setting=setting,
        seeds=(one.group.setting.seed,),
        script=SCRIPT,
        config_hash=config_hash(setting),
        bar=bar,
        **{name: last[name] for name in ("device", "versions", "commit", "time")},
    )


def _of_method(one: Measured) -> list[Record]:
    """Time, memory and phases of one method; or that it ran out of memory, or cannot run here."""
    status = one.turns[0]["status"]
    if status in ("out of memory", "unsupported"):
        return [_record(one, status.replace(" ", "_"), "turns", [1.0], "sum", reason=one.turns[0]["reason"])]
    if not one.complete:
        return []
    found = [
        _record(one, "step_time", "s", one.seconds, "median"),
        _record(one, "peak_memory", "GiB", one.peaks, "max"),
    ]
    if all("reserved_gib" in cell for cell in one.turns):
        found.append(_record(one, "reserved_memory", "GiB", [cell["reserved_gib"] for cell in one.turns], "max"))
    for phase in one.turns[0]["phases"]:
        samples = [x for cell in one.turns for x in cell["phases"][phase]]
        found.append(_record(one, f"{phase}_time", "s", samples, "median"))
    held = one.samples("held_bytes")
    if one.turns[-1].get("memory_source") == "cuda" and min(held) > 0:
        found.append(_record(one, "held_bytes", "bytes", held, "median"))
        found += _row_kib(one, held)
    for cell in one.turns:
        if spent := cell.get("probe", {}).get("selection_s"):
            share = spent / statistics.median(one.seconds)
            setting, says = one.group.setting, one.setting()["method_says"]
            skips = says.get("backward_share", 1) < 1 and one.setting()["options"]["engine"] != "generic"
            counts = setting.label in FAMILY and setting.layers is None and skips
            kept = round(100 * says.get("backward_share", 1))
            bar = f"C.selection_share/{setting.label}-{setting.tokens}-keep{kept}" if counts else None
            found.append(_record(one, "selection_share", "share", [share], "max", bar=bar))
    return found


def _row_kib(one: Measured, held: list[float]) -> list[Record]:
    """KiB held between forward and backward per kept row and layer; what is held outside the layers counts too."""
    says, level = one.setting()["method_says"], one.setting()["options"].get("recompute")
    setting = one.group.setting
    if "backward_share" not in says or says["backward_share"] == 1 or level not in ("none", "mlp", "lin"):
        return []
    layers = setting.layers or _layers(setting)
    rows = says["backward_share"] * layers * setting.tokens
    plain = setting.label == "llama2-7b" and setting.layers is None and one.setting()["options"]["engine"] != "generic"
    # Under exact forward rows that pass no gradient leave something, too.
    plain = plain and says.get("forward_share", says["backward_share"]) == says["backward_share"]
    bar = f"C.row_kib/{level}" if plain and setting.lora == "qkvo" else None
    return [_record(one, "row_kib", "KiB", [x / rows / 1024 for x in held], "median", bar=bar)]


def _layers(setting: Setting) -> int:
    from lemo.train.rehearsal import shape_config

    return shape_config(setting.shape, tokens=setting.tokens).get_text_config().num_hidden_layers


def _strongest(
    wanted: Comparison, candidate: Measured, measured: dict[str, Measured]
) -> tuple[Measured, Measured] | None:
    """The best baseline that ran to its end in the same commands, and the candidate there."""
    ran = [measured[name] for name in wanted.baselines if name in measured and measured[name].complete]
    pairs = [pair for one in ran if (pair := meet(one, candidate)) is not None]
    if "memory" in wanted.what:
        return min(pairs, key=lambda pair: max(pair[0].peaks), default=None)
    return min(pairs, key=lambda pair: statistics.median(pair[0].seconds), default=None)


def _bar_of(one: Measured, bar: str | None) -> str | None:
    """The bar with shape and adapter set behind it; none for a model cut short."""
    setting = one.group.setting
    if bar is None or setting.layers is not None or setting.label not in FAMILY:
        return None
    if bar == "C.dense_parity":
        return f"{bar}/{setting.tokens}"
    return f"{bar}/{FAMILY[setting.label]}/{setting.lora}"


def _ratio(baseline: Measured, candidate: Measured, wanted: Comparison) -> Record:
    time = wanted.what == "time"
    samples = {
        "baseline": baseline.seconds if time else baseline.peaks,
        "lemo": candidate.seconds if time else candidate.peaks,
    }
    return _record(
        candidate,
        "speedup" if time else "memory_ratio",
        "ratio",
        samples,
        "ratio_of_medians" if time else "ratio_of_max",
        bar=_bar_of(candidate, wanted.bar),
        **_about(baseline),
    )


def _about(baseline: Measured) -> dict[str, Any]:
    setting = baseline.setting()
    return {
        "baseline": baseline.method,
        "baseline_options": setting["options"],
        "baseline_says": setting["method_says"],
        "baseline_supervised_share": setting["supervised_share"],
    }


def _peak(candidate: Measured, wanted: Comparison) -> Record:
    bar = _bar_of(candidate, wanted.bar)
    return _record(candidate, "peak_memory_at_bar", "GiB", candidate.peaks, "max", bar=bar)


def _average(pairs: list[tuple[Measured, Measured]], what: str, bar: str) -> Record:
    """Geometric mean over shapes and lengths. Samples: a median time or peak of each."""

    def figure(one: Measured) -> float:
        return statistics.median(one.seconds) if what == "paper_time" else max(one.peaks)

    samples = {"baseline": [figure(b) for b, _ in pairs], "lemo": [figure(c) for _, c in pairs]}
    for baseline, candidate in pairs:
        raw = (lambda x: x.seconds) if what == "paper_time" else (lambda x: x.peaks)
        samples[f"baseline {_where(baseline.group)}"], samples[_where(candidate.group)] = raw(baseline), raw(candidate)
    names = [f"{_where(b.group)}: {b.method}" for b, _ in pairs]
    record = _record(pairs[0][1], what, "ratio", samples, "ratio_of_geometric_means", bar=bar, baselines=names)
    return replace(record, name=f"training/{what}")


def append_new(records: Iterable[Record], path: Path) -> int:
    """Appends those whose setting and samples the file does not hold yet. Returns how many."""
    known = {_identity(r) for r in read_records(path)} if path.exists() else set()
    fresh = [r for r in records if _identity(r) not in known]
    for record in fresh:
        if problems := record.problems():
            raise DataError(f"Record {record.name!r}: {'; '.join(problems)}")
        record.append(path)
    return len(fresh)


def _identity(record: Record) -> str:
    return json.dumps([record.name, record.bar, record.config_hash, record.samples], sort_keys=True)
