"""Quality of fine-tuning with skipped rows: runs a named grid of (method, seed) on one GPU and writes Records.

    python -m benchmarks.quality run pilot --model FOLDER --data FOLDER --plans FOLDER --budget-seconds 480
    python -m benchmarks.quality list [GRID]          # cells, predicted seconds, FLOPs, ideal gains
    python -m benchmarks.quality compare              # Records of gaps and bars, from the cells' Records

Several processes run one grid with the same --claims FOLDER, new for every run, and an --out of their own each; --known
names Records of cells that are done. Where several share one GPU, --untimed leaves out what that spoils.

FOLDERs of model and data are what `benchmarks/prepare_data.py` writes; the protocol stands in `quality_study.py`, the
methods in `quality_methods.py`, the grids in `quality_grids.py`. A cell is one trained adapter. Its Records share
`setting["cell"]`; cells whose Records are in the --out file are not run again, so a grid goes on where it stopped.
`python -m benchmarks.quality_report` draws figures and writes docs/quality.md from Records only.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

import lemo
from benchmarks.quality_compare import write_comparisons
from benchmarks.quality_costs import describe, sequence_flops
from benchmarks.quality_grids import GRIDS, START_SECONDS, WINDOWS, Cell, predicted_seconds
from benchmarks.quality_specs import Method
from benchmarks.quality_study import DOMAINS, Protocol, QualityStudy
from benchmarks.quality_train import in_force, recalls, train
from lemo.core.plan import Plan
from lemo.measure.flops import DecoderShape
from lemo.measure.record import Record, read_records
from lemo.report.tables import markdown
from lemo.runtime.model import causal_model

SCRIPT = "benchmarks/quality.py"
RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
SMOLLM2 = DecoderShape(30, 576, 1536, 9, 3, 64, 49152)
WARM_STEPS = 3


class Grid:
    """Cells of one command and the Records that they write."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Reads what has been measured already."""
        self.options = options
        self.protocol = make_protocol(options)
        self.study = QualityStudy(options.model, options.data, options.plans, self.protocol, options.device)
        self.shape = self.study.shape
        files = [*options.known, *([options.out] if options.out.exists() else [])]
        self.records = [record for file in files for record in read_records(file)]
        self.cells = [shortened(cell, options) for cell in GRIDS[options.grid]]
        self.cells = chosen(self.cells, options)
        self.claimed: set[str] = set()

    def claim(self, cell: Cell) -> bool:
        """Whether this process may run the cell: no other has claimed it, or one that needs the same calibration."""
        if self.options.claims is None:
            return True
        plan, setting = cell.spec.plan, self.setting(cell)
        fitted = plan is not None and plan.needs_fit
        key = self.study.plan_folder(plan, cell.spec).name if fitted else f"{setting['cell']}-{cell.seed}"
        if key not in self.claimed:
            self.options.claims.mkdir(parents=True, exist_ok=True)
            try:
                (self.options.claims / key).touch(exist_ok=False)
            except FileExistsError:
                return False
            self.claimed.add(key)
        return True

    def rate(self, cell: Cell) -> float:
        """The cell's learning rate: its own, the command's, or the best of the sweep with this protocol."""
        if cell.learning_rate is not None:
            return cell.learning_rate
        if self.options.learning_rate is not None:
            return self.options.learning_rate
        if cell.method in ("before", "instruct_before"):
            return 0.0
        found = swept_rate(self.records, self.protocol, self.study.folder.name)
        if found is None:
            # Cells of a sweep come first and have their own rates.
            raise LookupError("no learning rate: run the grid `sweep` (or `pilot`) first, or give --learning-rate")
        return found

    def setting(self, cell: Cell) -> dict[str, Any]:
        """Setting of a cell."""
        steps = cell.trained_steps(self.shape, self.protocol)
        return cell.setting(self.protocol, self.study.folder.name, self.study.corpus, self.rate(cell), steps)

    def done(self, cell: Cell) -> bool:
        """Whether the cell's last Record is there."""
        key = self.setting(cell)["cell"]
        return any(
            r.setting.get("cell") == key and list(r.seeds) == [cell.seed] and r.name.endswith("/cell_seconds")
            for r in self.records
        )

    def predicted(self, cell: Cell) -> float:
        """Seconds that a cell should take: as measured for another seed, else by arithmetic."""
        method = cell.spec
        fitted = method.plan is None or not method.plan.needs_fit
        fitted = fitted or (self.study.plan_folder(method.plan, method) / "plan" / "plan.json").exists()
        steps = cell.trained_steps(self.shape, self.protocol)
        same = [
            r.value * max(steps, 1) / max(r.setting["steps"], 1)
            for r in self.records
            if r.name == f"quality/{cell.method}/cell_seconds" and r.setting["window"] == self.protocol.window
        ]
        if same and fitted:
            return 1.05 * max(same)
        return predicted_seconds(cell, self.protocol, self.shape, fitted)

    def run(self) -> int:
        """Runs cells until all are done or the budget is spent; returns how many are left."""
        start = time.perf_counter()
        missing: list[Cell] = []
        for cell in self.cells:
            if self.done(cell):
                print(f"{cell.title}: done before", flush=True)
                continue
            needed = self.predicted(cell)
            spent = time.perf_counter() - start + self.options.started_seconds
            if spent + needed > self.options.budget_seconds:
                missing.append(cell)
                continue
            if not self.claim(cell):
                continue
            began = time.perf_counter()
            self.run_cell(cell)
            gc.collect()
            if self.study.device.type == "cuda":
                torch.cuda.empty_cache()
            took = time.perf_counter() - began
            print(f"{cell.title}: {took:.0f} s (predicted {needed:.0f})", flush=True)
        if missing:
            rest = sum(self.predicted(cell) for cell in missing)
            print(
                f"{len(missing)} cells left, about {rest:.0f} s; run again: {missing[0].title} comes next", flush=True
            )
        return len(missing)

    def run_cell(self, cell: Cell) -> None:
        """Trains, scores, writes."""
        began = time.perf_counter()
        setting, method = self.setting(cell), cell.spec
        plan = self.study.plan(method)
        fitted = time.perf_counter()
        model = self.study.fresh_adapter(cell.seed, method.trains)
        # Where a rival has its own way to skip, the plan only tells it what it needs.
        attached = plan if plan is not None and method.rival is None else dense_plan(model)
        with lemo.attach(model, attached, self_test=False, unsafe_no_bypass=True) as handle:
            found = {"recall_start": recalls(self.study, method, plan)}
            with in_force(model, method, plan):
                trained = train(self.study, method, cell.seed, setting, handle)
            found["recall_end"] = recalls(self.study, method, None if plan is None else handle.plan)
            score = self.study.score(model, method, handle)
            for note in handle.notes:
                print(f"note: {note}", flush=True)
        setting |= {"window_order": score.order}
        sequences = method.sequences or self.protocol.batch
        if self.protocol.data == "text":
            flops = sequence_flops(
                at_kept(method, trained.shares), self.shape, self.protocol.window, self.protocol.rank
            )
            setting |= {"flops": flops * setting["steps"] * sequences}
        for name, values in score.windows.items():
            self.write(cell, setting, name, "nats", values, "mean")
        for name, by_domain_now in found.items():
            if by_domain_now:
                order = {**setting, "window_order": list(by_domain_now)}
                self.write(cell, order, name, "share", list(by_domain_now.values()), "mean")
        if trained.losses:
            self.write(cell, setting, "training_loss", "nats", trained.losses, "last")
            rates = [sequences * self.protocol.window / s for s in trained.seconds]
            if not self.options.untimed:
                self.write(cell, setting, "tokens_per_second", "tokens/s", rates[WARM_STEPS:] or rates, "median")
            self.write(cell, setting, "peak_memory", "GiB", [trained.peak_gib], "max")
        if trained.shares:
            self.write(cell, setting, "forward_share", "share", [f for f, _ in trained.shares], "mean")
            self.write(cell, setting, "backward_share", "share", [b for _, b in trained.shares], "mean")
        seconds = time.perf_counter() - began - (fitted - began)
        self.write(cell, setting, "cell_seconds", "s", [seconds], "last")

    def write(self, cell: Cell, setting: dict[str, Any], what: str, unit: str, samples: list, statistic: str) -> None:
        """One Record of a cell."""
        record = Record.measure(
            f"quality/{cell.method}/{what}",
            unit,
            samples,
            {**setting, "statistic": statistic},
            script=SCRIPT,
            seeds=[cell.seed],
        )
        record.append(self.options.out)
        self.records.append(record)
        if what in ("dense", "last_quarter", "far_copy", "sparse"):
            print(f"{cell.title} {what}: {record.value:.4f} {by_domain(record)}", flush=True)


def at_kept(method: Method, shares: Sequence[tuple[float, float]]) -> Method:
    """The method with the share of rows that its layers kept, mean over those that may skip, for its FLOPs."""
    if method.plan is None or not method.plan.ratios_follow or not shares:
        return method
    skipping = len(shares) - len(method.plan.dense_layers)
    forward, backward = (1 - sum(1 - pair[i] for pair in shares) / skipping for i in (0, 1))
    return replace(method, plan=replace(method.plan, forward_ratio=forward, backward_ratio=min(backward, forward)))


def by_domain(record: Record) -> str:
    """Means of a scored Record by domain."""
    order = record.setting["window_order"]
    means = {d: fmean(x for x, o in zip(record.samples, order, strict=True) if o == d) for d in dict.fromkeys(order)}
    return " ".join(f"{domain} {value:.4f}" for domain, value in means.items())


def dense_plan(model: Any) -> Plan:
    """Every row runs every layer."""
    return Plan.uniform(causal_model(model), forward_ratio=1.0, backward_ratio=1.0)


def swept_rate(records: Sequence[Record], protocol: Protocol, model: str) -> float | None:
    """Rate of the dense run with the least validation loss, among the longest runs of the sweep.

    A length without a sweep of its own takes the rate of the published one.
    """
    found = _swept_at(records, protocol, model, protocol.window)
    return found if found is not None else _swept_at(records, protocol, model, Protocol().window)


def _swept_at(records: Sequence[Record], protocol: Protocol, model: str, window: int) -> float | None:
    runs: dict[int, dict[float, float]] = {}
    for record in records:
        setting = record.setting
        same = setting.get("model") == model and setting.get("window") == window
        name = "quality/dense_all/dense" if protocol.data == "text" else "quality/instruct_dense/dense"
        if record.name == name and same and list(record.seeds) == [0] and setting["flops_steps"] is None:
            runs.setdefault(setting["steps"], {})[setting["learning_rate"]] = record.value
    swept = {steps: found for steps, found in runs.items() if len(found) >= 3}
    if not swept:
        return None
    losses = swept[max(swept)]
    best = min(losses, key=lambda rate: losses[rate])
    return best


def chosen(cells: Sequence[Cell], options: argparse.Namespace) -> list[Cell]:
    """The cells of the command line's methods, with its seeds, whichever the grid has; no sweep where it has a rate.

    Raises:
        LookupError: no cell is left.
    """
    found = [cell for cell in cells if not options.only or cell.method in options.only]
    if options.learning_rate is not None:
        found = [cell for cell in found if cell.learning_rate is None]
    if options.seeds:
        found = list(dict.fromkeys(replace(cell, seed=seed) for seed in options.seeds for cell in found))
    if not found:
        raise LookupError(f"grid {options.grid} has none of the methods {', '.join(options.only)}")
    return found


def shortened(cell: Cell, options: argparse.Namespace) -> Cell:
    """The cell with the steps of the command line, if any."""
    if options.steps is None:
        return cell
    flops = None if cell.flops_steps is None else min(cell.flops_steps, options.steps)
    return replace(cell, steps=options.steps, flops_steps=flops)


def make_protocol(options: argparse.Namespace) -> Protocol:
    """The published protocol with what the command line changes."""
    answers = options.grid.startswith("instruct")
    own = {"data": "answers", "domains": ("answers",), "validation_windows": 48} if answers else {}
    own |= {"window": WINDOWS[options.grid]} if options.grid in WINDOWS else {}
    names = ("window", "batch", "rank", "validation_windows", "calibration_windows", "predictor_steps", "dtype")
    given = {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}
    if options.domains:
        given["domains"] = tuple(options.domains)
    return replace(Protocol(), **{**own, **given})


def list_grids(options: argparse.Namespace) -> int:
    """Prints what grids hold and what they should cost, for the published protocol on SmolLM2-135M."""
    names = [options.grid] if options.grid else list(GRIDS)
    methods: list[str] = []
    for name in names:
        protocol = make_protocol(argparse.Namespace(grid=name, domains=None))
        cells, fits, seconds = GRIDS[name], set(), START_SECONDS
        for cell in cells:
            spec = cell.spec.plan
            fit = None if spec is None else (str(spec.fit), cell.spec.loss_share, cell.spec.placement)
            seconds += predicted_seconds(cell, protocol, SMOLLM2, fit in fits)
            fits.add(fit)
        print(f"{name}: {len(cells)} cells, about {seconds:.0f} s of one H200 (guess until measured)")
        methods += [c.method for c in cells]
        if options.grid:
            for cell in cells:
                steps = cell.trained_steps(SMOLLM2, protocol)
                print(f"  {cell.title}: {steps} steps, {predicted_seconds(cell, protocol, SMOLLM2, True):.0f} s")
    heads = ["method", "what", "ideal gain at 64K, Llama-3-8B shape", "Llama-2-7B shape"]
    print("\n" + markdown(heads, describe(list(dict.fromkeys(methods)))))
    return 0


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run")
    add = run.add_argument
    add("grid", choices=list(GRIDS))
    add("--model", type=Path, required=True)
    add("--data", type=Path, required=True)
    add("--plans", type=Path, default=Path("runs/quality-plans"), help="folder of calibrated plans")
    add("--out", type=Path, default=RESULTS)
    add("--device", default="cuda")
    add("--budget-seconds", type=float, default=float("inf"), help="start no cell that would end later than this")
    add("--started-seconds", type=float, default=START_SECONDS, help="seconds of the budget that the start takes")
    add("--only", type=lambda text: text.split(","), help="methods, separated by commas")
    add("--seeds", type=lambda text: [int(s) for s in text.split(",")], help="instead of the grid's")
    add("--learning-rate", type=float, help="instead of the best of the sweep")
    add("--domains", type=lambda text: text.split(","), help=f"instead of {','.join(DOMAINS)}")
    add("--known", type=lambda text: [Path(name) for name in text.split(",")], default=[], help="Records of done cells")
    add("--claims", type=Path, help="folder in which processes that run one grid say which cells they took")
    add("--untimed", action="store_true", help="write no times: other processes use the GPU")
    for name in ("steps", "window", "batch", "rank", "validation-windows", "calibration-windows", "predictor-steps"):
        add(f"--{name}", type=int, help="instead of the protocol's")
    add("--dtype", choices=("float32", "bfloat16"))
    listing = verbs.add_parser("list")
    listing.add_argument("grid", nargs="?", choices=list(GRIDS))
    listing.set_defaults(domains=None)
    compare = verbs.add_parser("compare")
    compare.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    if options.verb == "list":
        return list_grids(options)
    if options.verb == "compare":
        return write_comparisons(options.out)
    try:
        grid = Grid(options)
        grid.run()
    except LookupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    measured = [r.value for r in grid.records if r.name.endswith("/cell_seconds")]
    if measured:
        print(f"median cell: {median(measured):.0f} s over {len(measured)} cells", flush=True)
    return write_comparisons(options.out)


if __name__ == "__main__":
    sys.exit(main())
