"""Retrieval after fine-tuning with and without skipped rows: does what a question needs survive selection?

    python -m benchmarks.retrieval --model FOLDER --tokenizer FOLDER --plans FOLDER [--length 8192] [--methods ...]

An adapter is trained on prompts of all tasks, several questions each where a task allows it, answers supervised. Then
it is asked paired prompts of another seed, one question each, dense and under its plan, and once without any context.
An answer counts when every token of it is right. Prompts, order and adapters depend on seeds only: methods are paired.
Cells whose Records are in --out are not run again. Bars count tasks where dense LoRA reaches 70 % and reading nothing
at most 20 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import lemo
from benchmarks.derived import DerivedRecords
from benchmarks.quality import dense_plan
from benchmarks.quality_specs import Method, PlanSpec
from benchmarks.quality_study import Protocol, QualityStudy
from benchmarks.quality_train import train
from lemo.eval.needle import Prompt, Riddle, exact_matches, make_prompt, multi_key
from lemo.eval.ruler import TASKS, paired_prompts
from lemo.measure.record import Record, config_hash, read_records
from lemo.measure.statistics import value_of
from lemo.train.collate import WindowDataset
from lemo.train.windows import Window

SCRIPT = "benchmarks/retrieval.py"
TRAIN_SEED, PAIRED_SEED = 1, 2
DENSE_REACHES, BLIND_AT_MOST = 0.7, 0.2
_SPARSE = PlanSpec(0.15, 0.15)
DEFAULT = "words_window_2048"  # what a recipe with answers does
_EXACT = PlanSpec(1.0, 0.12, gradient="keys", scorer="recent", dense_layers=())
_RECENT = PlanSpec(0.4, 0.4, kv="kept", scorer="recent", fitted_scorer="recent")
METHODS = {
    "untrained": Method("before any training"),
    "dense": Method("dense LoRA"),
    "skip": Method("15 % of rows", _SPARSE),
    "skip_kept": Method("15 % of rows, skipped rows offer nothing", replace(_SPARSE, kv="kept")),
    "skip_30": Method("30 % of rows", replace(_SPARSE, forward_ratio=0.3, backward_ratio=0.3)),
    "exact": Method("exact forward, gradient through 15 %", replace(_SPARSE, forward_ratio=1.0)),
    "keys": Method("exact forward, gradient through the answers and rows before them, 12 %, and all keys", _EXACT),
    "balanced": Method(
        "context rows see the last 1024 to 2048: the default until decision 20, as below",
        replace(_EXACT, context_window=1024),
    ),
    "balanced_30": Method(
        "the default with 30 % of the rows", replace(_EXACT, backward_ratio=0.3, context_window=1024)
    ),
    "attended": Method(
        "the default with the rows that answers attend to most, found by looking",
        replace(_EXACT, scorer="predictor", oracle="mass_loss_rows", context_window=1024),
    ),
    "gradient": Method(
        "the default with the rows of each layer whose dense gradient is largest, found by looking",
        replace(_EXACT, scorer="predictor", oracle="gradient", context_window=1024),
    ),
    "gradient_same": Method(
        "the default with the rows whose dense gradient is largest over all layers, found by looking",
        replace(_EXACT, scorer="predictor", oracle="gradient_same", context_window=1024),
    ),
    "words": Method(
        "the default: 12 % of the rows, those whose words the questions have, rare ones first",
        replace(_EXACT, scorer="words", context_window=1024),
    ),
    "words_window_2048": Method(
        "the default with a window of 2,048 for rows without gradient",
        replace(_EXACT, scorer="words", context_window=2048),
    ),
    "words_fast": Method(
        "the preset fast: 4 % of the rows, a window of 512",
        replace(_EXACT, backward_ratio=0.04, scorer="words", context_window=512),
    ),
    **{
        name: Method(about, replace(_EXACT, scorer="predictor", oracle=oracle, context_window=1024, **more))
        for name, about, oracle, more in (
            ("words_answered", "the same, and words of the answers", "words_answered", {}),
            ("words_answered_30", "the same with 30 % of the rows", "words_answered", {"backward_ratio": 0.3}),
            ("words_chained", "the default, and words that stand beside those, twice", "words_chained", {}),
            ("words_random", "half of the rows by words of the questions, half random ones", "words_random", {}),
        )
    },
    **{
        f"words_alone_{round(100 * k)}": Method(
            f"{k:.0%} of the rows, those whose words the questions have; all others left out",
            PlanSpec(k, k, kv="kept", scorer="words", dense_layers=(), strip_bypass=True),
        )
        for k in (0.12, 0.3)
    },
    "prompt": Method(
        "the default, and loss on 10 % of the rows of prompts",
        replace(_EXACT, backward_ratio=0.15, context_window=1024),
        prompt_rows=(0.1, 0.1),
    ),
    "balanced_50": Method(
        "the default with 50 % of the rows", replace(_EXACT, backward_ratio=0.5, context_window=1024)
    ),
    "recent_random": Method(
        "the default with some rows before the answers and random ones",
        replace(_EXACT, scorer="predictor", oracle="recent_random", context_window=1024),
    ),
    "dense_every_4": Method(
        "the default, and every fourth step dense", replace(_EXACT, context_window=1024), dense_every=4
    ),
    "prompt_twice": Method(
        "the default, and loss on local rows of prompts",
        replace(_EXACT, context_window=1024),
        prompt_rows=(0.1, 2.0),
        prompt_of="answers",
        prompt_local=True,
    ),
    **{
        f"corrected_{every}": Method(
            "the default, corrected by a dense step now and then",
            replace(_EXACT, context_window=1024),
            corrected=(every, 0.8),
        )
        for every in (4, 8)
    },
    "recent_40": Method("40 % of rows, those before the answers, others offer nothing", _RECENT),
    "recent_40_all": Method("40 % of rows, those before the answers", replace(_RECENT, kv="all")),
    "random": Method("15 % of rows, drawn at random", replace(_SPARSE, scorer="random")),
    "oracle": Method("15 % of rows, by what loss rows attend to", replace(_SPARSE, oracle="mass_loss_rows")),
}


FACTS = 8  # in a training prompt of the tasks with one fact


def many_keys(rng: random.Random, depth: float, facts: int) -> Riddle:
    """Training's form of the tasks with one fact: half of the facts are asked for."""
    return multi_key(rng, depth, keys=facts, questions=facts // 2)


class RetrievalStudy(QualityStudy):
    """A study whose domains are tasks and whose windows are prompts."""

    def __init__(self, options: argparse.Namespace, protocol: Protocol) -> None:
        """Loads the tokenizer; prompts are made when asked for."""
        from transformers import AutoTokenizer

        super().__init__(options.model, Path(), options.plans, protocol, options.device)
        self.tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        self.samples, self.facts = options.train_prompts, options.training_facts
        self.paired: dict[str, list[Prompt]] = {}

    def windows(self, domain: str, split: str, tokens: int, documents: bool = True) -> WindowDataset:
        """Training prompts of a task."""
        key = (domain, split, tokens)
        if key not in self._windows:
            many = partial(many_keys, facts=self.facts)
            riddle = many if domain in ("single", "multi_key") else TASKS[domain]
            made = []
            for number in range(self.samples):
                seed = 1_000_003 * TRAIN_SEED + number
                prompt = make_prompt(domain, riddle, self.tokenizer, tokens, seed=seed)
                name = f"{domain}#{number}"
                made.append(Window(name, prompt.tokens_T, prompt.labels_T >= 0, (tokens,)))
            self._windows[key] = WindowDataset(made)
        return self._windows[key]

    def prompts(self, task: str, count: int, depths: int) -> list[Prompt]:
        """The prompts that every method is asked."""
        if task not in self.paired:
            options = {"task": task, "count": count, "seed": PAIRED_SEED, "depths": depths}
            self.paired[task] = paired_prompts(self.tokenizer, self.protocol.window, **options)
        return self.paired[task]


class Runner:
    """Cells of one command."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Reads what has been measured already."""
        self.options = options
        sizes = {"window": options.length, "batch": options.batch, "rank": options.rank, "dtype": options.dtype}
        protocol = Protocol(data="answers", domains=tuple(options.tasks), held_out_windows=2, **sizes)
        protocol = replace(protocol, predictor_steps=options.predictor_steps)
        self.study = RetrievalStudy(options, protocol)
        self.records = read_records(options.out) if options.out.exists() else []
        self.blind: dict[str, list[float]] = {}

    def setting(self, name: str) -> dict[str, Any]:
        """Setting of a cell."""
        kept = ("steps", "learning_rate", "prompts", "depths", "train_prompts")
        found = {"method": name, **dataclasses.asdict(self.study.protocol), "model": self.study.folder.name}
        found |= {key: getattr(self.options, key) for key in kept} | {"choices": METHODS[name].setting()}
        if self.options.training_facts != FACTS:
            found["training_facts"] = self.options.training_facts
        return {**found, "cell": config_hash(found)}

    def done(self, name: str, seed: int) -> bool:
        """Whether the cell's last Record is there."""
        key, last = self.setting(name)["cell"], f"retrieval/{name}/cell_seconds"
        return any(r.name == last and r.setting["cell"] == key and list(r.seeds) == [seed] for r in self.records)

    def run(self) -> None:
        """Runs the cells that the budget allows."""
        start, longest = time.perf_counter(), 0.0
        for seed in self.options.seeds:
            for name in self.options.methods:
                if self.done(name, seed) or (name == "untrained" and seed != self.options.seeds[0]):
                    continue
                began = time.perf_counter()
                if began - start + longest > self.options.budget_seconds:
                    print(f"{name} seed {seed}: left for the next command", flush=True)
                    return
                self.run_cell(name, seed)
                longest = max(longest, time.perf_counter() - began)

    def run_cell(self, name: str, seed: int) -> None:
        """Trains, asks, writes."""
        began, study, method = time.perf_counter(), self.study, METHODS[name]
        setting = self.setting(name)
        plan = study.plan(method)
        model = study.fresh_adapter(seed)
        attached = dense_plan(model) if plan is None else plan
        with lemo.attach(model, attached, self_test=False, unsafe_no_bypass=True) as handle:
            if name != "untrained":
                trained = train(study, method, seed, setting, handle)
                self.write(name, setting, seed, "training_loss", trained.losses, "nats", "last")
                if trained.shares:
                    self.write(name, setting, seed, "forward_share", [f for f, _ in trained.shares], "share", "mean")
            spec = method.plan
            sparse = spec is not None and (spec.forward_ratio < 1 or spec.context_window is not None)
            forwards = self.options.forwards
            for task in self.options.asked or study.protocol.domains:
                prompts = study.prompts(task, self.options.prompts, self.options.depths)
                if "dense" in forwards or not sparse:
                    self.ask(name, setting, seed, f"{task}/dense", exact_matches(model, prompts))
                if sparse and "sparse" in forwards:
                    handle.sparse_evaluations = 0
                    found = exact_matches(model, prompts, handle=handle, sparse=True)
                    self.ask(name, setting, seed, f"{task}/sparse", found)
                if name == "dense":
                    alone = [p.without_context() for p in prompts]
                    self.ask(name, setting, seed, f"{task}/no_context", exact_matches(model, alone))
        self.write(name, setting, seed, "cell_seconds", [time.perf_counter() - began], "s", "last")

    def ask(self, name: str, setting: dict[str, Any], seed: int, what: str, found: Sequence[bool]) -> None:
        """One Record: 1 for each right answer, prompts depth bin after depth bin."""
        self.write(name, setting, seed, what, [float(x) for x in found], "share", "mean")

    def write(
        self, name: str, setting: dict[str, Any], seed: int, what: str, samples: list, unit: str, statistic: str
    ) -> None:
        """One Record of a cell."""
        setting = {**setting, "statistic": statistic}
        record = Record.measure(f"retrieval/{name}/{what}", unit, samples, setting, script=SCRIPT, seeds=[seed])
        record.append(self.options.out)
        self.records.append(record)
        if unit == "share" and "/" in what:
            depths = setting["depths"]
            size = len(samples) // depths
            by_depth = " ".join(f"{fmean(samples[i * size : (i + 1) * size]):.2f}" for i in range(depths) if size)
            print(f"{name} seed {seed} {what}: {record.value:.3f}, by depth {by_depth}", flush=True)


def compare(path: Path) -> None:
    """Misses of skipping methods over those of dense LoRA, in points, over the tasks that count."""
    records = read_records(path)
    derived = DerivedRecords(path, records, SCRIPT)
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        if record.name.startswith("retrieval/") and "cell" in record.setting:
            key = (record.setting["window"], record.setting["steps"], tuple(record.setting["domains"]))
            groups.setdefault(key, []).append(record)
    for (window, steps, tasks), same in sorted(groups.items(), key=lambda item: item[0]):
        counted = [t for t in tasks if _counts(same, t)]
        print(f"length {window}, {steps} steps: tasks that count: {', '.join(counted) or 'none'}", flush=True)
        for name in METHODS:
            for mode in ("dense", "sparse"):
                _compare(same, name, mode, counted, derived)


def _of(records: Sequence[Record], name: str) -> dict[int, Record]:
    """Newest Record of a name by seed."""
    return {r.seeds[0]: r for r in sorted(records, key=lambda r: r.time) if r.name == name}


def _counts(records: Sequence[Record], task: str) -> bool:
    dense, blind = (_of(records, f"retrieval/dense/{task}/{what}") for what in ("dense", "no_context"))
    if not dense or not blind:
        return False
    reached, guessed = (fmean(r.value for r in found.values()) for found in (dense, blind))
    return reached >= DENSE_REACHES and guessed <= BLIND_AT_MOST


def _compare(records: Sequence[Record], name: str, mode: str, tasks: Sequence[str], derived: DerivedRecords) -> None:
    """One Record of paired misses in points, over tasks and seeds; the error is over prompts."""
    baseline: list[float] = []
    candidate: list[float] = []
    sources: list[Record] = []
    for task in tasks:
        dense = _of(records, f"retrieval/dense/{task}/dense")
        ours = _of(records, f"retrieval/{name}/{task}/{mode}")
        for seed in sorted(dense.keys() & ours.keys()):
            baseline += [100 * (1 - x) for x in dense[seed].samples]
            candidate += [100 * (1 - x) for x in ours[seed].samples]
            sources += [dense[seed], ours[seed]]
    if not sources or (name == "dense" and mode == "dense"):
        return
    newest = max(sources, key=lambda r: r.time)
    samples = {"baseline": baseline, "lemo": candidate}
    setting = {key: newest.setting[key] for key in ("window", "steps", "model", "domains", "prompts", "learning_rate")}
    setting |= {"method": name, "mode": mode, "tasks": list(tasks), "statistic": "gap_plus_error"}
    setting["cells"] = sorted({r.setting["cell"] for r in sources})
    bar = f"B.retrieval_gap/{newest.setting['window']}-{mode}" if name == DEFAULT and len(candidate) >= 2000 else None
    title = f"retrieval/{name}/gap/{mode}"
    record = derived.write(title, "points", samples, setting, sources, bar)
    gap = value_of(samples, "difference_of_means")
    print(f"{title}: {gap:+.2f} points, with its error {record.value:+.2f} ({len(candidate)} prompts)", flush=True)


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True)
    add("--tokenizer", type=Path, required=True)
    add("--plans", type=Path, default=Path("runs/quality-plans"))
    add("--out", type=Path, default=Path(__file__).parent / "results" / "retrieval.jsonl")
    add("--tasks", type=lambda text: text.split(","), default=list(TASKS))
    add("--asked", type=lambda text: text.split(","), help="of the tasks trained on, those asked; all when not given")
    add(
        "--forwards", choices=("dense", "sparse", "dense,sparse"), default="dense,sparse", help="sparse: under the plan"
    )
    add("--methods", type=lambda text: text.split(","), default=["untrained", "dense", "balanced", "recent_40"])
    add("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0])
    add("--length", type=int, default=8192)
    add("--steps", type=int, default=300)
    add("--batch", type=int, default=4)
    add("--rank", type=int, default=16)
    add("--learning-rate", type=float, default=1e-3)
    add("--train-prompts", type=int, default=250, help="of each task; again from the start when used up")
    add("--training-facts", type=int, default=FACTS, help="in a training prompt of the tasks with one fact")
    add("--prompts", type=int, default=340, help="of each task, asked of every method")
    add("--depths", type=int, default=5)
    add("--predictor-steps", type=int, default=400)
    add("--budget-seconds", type=float, default=float("inf"))
    add("--dtype", default="bfloat16")
    add("--device", default="cuda")
    options = parser.parse_args(arguments)
    asked = options.asked or options.tasks
    for given, known in ((options.methods, METHODS), (options.tasks, TASKS), (asked, options.tasks)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    Runner(options).run()
    if options.out.exists():
        compare(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
