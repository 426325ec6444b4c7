"""Named grids: which methods run with which seeds, steps and lengths; and how long each cell should take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.quality_costs import equal_steps, sequence_flops
from benchmarks.quality_methods import (
    ABLATIONS,
    INSTRUCT,
    METHODS,
    NULLS,
    PREDICTED,
    PRESETS,
    RIVALS,
    TARGETS,
    THRESHOLDS,
    Method,
)
from benchmarks.quality_study import RATES, Protocol
from lemo.measure.flops import DecoderShape
from lemo.measure.record import config_hash

STEPS = 200
BASELINE_POINTS = (50, 100, 200)


@dataclass(frozen=True)
class Cell:
    """One trained and scored adapter.

    Attributes:
        method: name in METHODS.
        seed: of adapter, order of windows and loss rows.
        steps: optimizer steps before `flops_of` changes them; 0 trains nothing.
        learning_rate: peak; None takes the best of the sweep.
        flops_steps: dense steps whose FLOPs this cell may spend instead of `steps`.
    """

    method: str
    seed: int
    steps: int = STEPS
    learning_rate: float | None = None
    flops_steps: int | None = None

    @property
    def spec(self) -> Method:
        """The method."""
        return METHODS[self.method]

    @property
    def title(self) -> str:
        """For output."""
        rate = "" if self.learning_rate is None else f" at {self.learning_rate:g}"
        equal = "" if self.flops_steps is None else f" for the FLOPs of {self.flops_steps} dense steps"
        return f"{self.method} seed {self.seed}{rate}{equal}"

    def trained_steps(self, shape: DecoderShape, protocol: Protocol) -> int:
        """Steps that the cell trains."""
        if self.method in ("before", "instruct_before"):
            return 0
        sizes = (shape, protocol.window, protocol.rank)
        if self.flops_steps is not None:
            steps = equal_steps(self.spec, METHODS["dense_all"], self.flops_steps, *sizes)
            return max(1, round(steps * protocol.batch / (self.spec.sequences or protocol.batch)))
        if self.spec.flops_of is not None:
            return equal_steps(self.spec, METHODS[self.spec.flops_of], self.steps, *sizes)
        return self.steps

    def setting(self, protocol: Protocol, model: str, corpus: str, learning_rate: float, steps: int) -> dict[str, Any]:
        """Everything that decides the cell's numbers but its seed; `cell` is its hash."""
        found = {
            **asdict(protocol),
            "model": model,
            "corpus": corpus,
            "method": self.method,
            "steps": steps,
            "learning_rate": learning_rate,
            "asked_steps": self.steps,
            "flops_steps": self.flops_steps,
            "choices": self.spec.setting(),
        }
        return {**found, "cell": config_hash(found)}


def _cells(names: Sequence[str], seeds: Sequence[int], steps: int = STEPS) -> list[Cell]:
    return [Cell(name, seed, steps) for seed in seeds for name in names]


def _sweep(steps: int) -> list[Cell]:
    return [Cell("dense_all", 0, steps, rate) for rate in RATES]


_MAIN = ["dense_all", "dense_rows_balanced", "balanced"]
_OTHERS = ["dense_rows_quality", "quality", "dense_rows_fast", "fast"]
_RANKED = ["skip_30_all_recent", "skip_30_all_predictor", "skip_30_all_random"]
GRIDS: dict[str, list[Cell]] = {
    "pilot": [*_sweep(100), *_cells(["before", "dense_rows_balanced", "balanced", *_RANKED], [0], 100)],
    "sweep": _sweep(STEPS),
    "main": [Cell("before", 0), *_cells(_MAIN, range(5))],
    "presets": _cells(_OTHERS, range(3)),
    "nulls": _cells(["dense_4k", "dense_8k", "no_context"], range(3)),
    "rivals": _cells(list(RIVALS), range(3)),
    "ranked": _cells(_RANKED, range(5)),
    "equal_compute": [
        cell
        for seed in range(3)
        for points in BASELINE_POINTS
        for cell in ([Cell("dense_all", seed, points)] if points != STEPS else [])
        + [Cell("balanced", seed, flops_steps=points)]
    ],
    "equal_200": [Cell("balanced", seed, flops_steps=STEPS) for seed in range(3)],
    # How to spend the FLOPs of 200 dense steps, and what as many steps do to dense LoRA.
    "equal_batch": [
        *(
            Cell(name, seed, flops_steps=STEPS)
            for seed in range(3)
            for name in ("balanced_batch_7", "balanced_batch_4")
        ),
        *(Cell("dense_all", seed, 623) for seed in range(3)),
    ],
    # At 16K more local rows buy more rows to learn from for the same FLOPs, at a smaller gain where windows are long.
    "equal_local": [
        Cell(name, seed, flops_steps=flops)
        for seed in range(3)
        for name in ("repeats_12_85", "repeats_12_40")
        for flops in (STEPS, None)
    ],
    "ablations": _cells(list(ABLATIONS), [0]),
    "explore": _cells([*NULLS, *PRESETS, *ABLATIONS], [0], 100),
    "targets": _cells([*_RANKED, *TARGETS], range(2), 100),
    "predictors": _cells([*_RANKED, "interaction", *PREDICTED], range(2), 100),
    "oracle": _cells(["oracle_mass"], range(5)),
    "asked": _cells(
        ["skip_30_all_recent", "predict_mass_loss_rows", "predict_mass_loss_rows_same", "oracle_mass_loss_rows"],
        range(5),
    ),
    "break_point": _cells(["dense_rows_10", *THRESHOLDS], range(2), 100),
    "loss_rows": _cells(["far_12", "blocks", "spread_runs", "hardest_weighted"], range(2)),
    "allocate": _cells(["skip_30_all_predictor", "allocated"], range(2), 100),
    "far": _cells(["far_drawn", "balanced"], range(5)),
    "refit": _cells(["skip_30_all_predictor", "refit_10", "refit_50"], range(3)),
    "long": _cells([*_MAIN, "skip_30_all_random"], range(3)),
    # Processes that share cells know no Records of each other: the sweep runs before, by itself.
    "instruct_sweep": [Cell("instruct_dense", 0, STEPS, rate) for rate in RATES[1:]],
    "instruct": [
        *(Cell("instruct_dense", 0, STEPS, rate) for rate in RATES[1:]),
        *_cells(list(INSTRUCT)[:1], [0]),
        *_cells(list(INSTRUCT)[1:], range(3)),
    ],
}
# What the bars need, once each, those first that answer most.
GRIDS["bars"] = list(
    dict.fromkeys(
        cell
        for name in ("main", "presets", "equal_compute", "nulls", "ranked", "oracle", "refit")
        for cell in GRIDS[name]
    )
)
# A grid may need another protocol than the published one.
WINDOWS = {"long": 32768}
PUBLISHED = (*NULLS, *PRESETS, *RIVALS, *ABLATIONS)

# Seconds on one H200 for one million tokens of training at 16,384 tokens, from the Records of benchmarks/extension.py;
# a guess until a cell of the method has been measured.
_SECONDS = {"dense": 10.0, "exact": 12.5, "skip": 15.0, "oracle": 60.0}
EVALUATION_SECONDS, CALIBRATION_SECONDS, START_SECONDS = 10.0, 60.0, 25.0


def predicted_seconds(cell: Cell, protocol: Protocol, shape: DecoderShape, fitted: bool) -> float:
    """Seconds that a cell should take, calibration included unless its plan is there (`fitted`)."""
    method = cell.spec
    kind = "dense"
    if method.plan is not None and method.rival is None:
        kind = "exact" if method.plan.forward_ratio == 1 else "skip"
        kind = "oracle" if method.plan.oracle else kind
    window = protocol.window // method.pieces
    dense = METHODS["dense_all"]
    longer = sequence_flops(dense, shape, window, protocol.rank) / window
    longer /= sequence_flops(dense, shape, 16384, protocol.rank) / 16384
    tokens = cell.trained_steps(shape, protocol) * (method.sequences or protocol.batch) * protocol.window
    calibration = 0.0 if fitted or method.plan is None or not method.plan.needs_fit else CALIBRATION_SECONDS
    scored = len(protocol.domains) * protocol.validation_windows / 40 * protocol.window / 16384
    return tokens / 1e6 * _SECONDS[kind] * longer + EVALUATION_SECONDS * scored + calibration
