"""The benchmark of row ops on small shapes: its Records are sound and say what was timed."""

from __future__ import annotations

import argparse
import dataclasses

import pytest
import torch

from benchmarks import row_ops
from benchmarks.check_bars import BARS, find_problems
from lemo.measure.record import read_records
from lemo.ops.norm_rows.cases import SPECS as NORM_SPECS
from lemo.ops.stream_rows import cases as stream_rows
from lemo.testing import OpSpec

SPECS = {spec.name: spec for spec in (*NORM_SPECS, *stream_rows.SPECS)}
# In place of milliseconds, which no test may depend on.
CLOCK = {"copy": 4.0, "lemo": 2.0, "reference": 10.0, "naive": 6.0, "compiled": 3.0}


def _calls_once(functions, device, repeats, queued):
    for function in functions.values():
        function()
    return {name: [CLOCK.get(name, 1.0)] * repeats for name in functions}


def _small(spec: OpSpec) -> OpSpec:
    wanted = {"norm_rows_backward": "written to rows", "write_rows_": "residual"}.get(spec.name, "rows")
    case = next(c for c in spec.cases if c.name == wanted)
    return dataclasses.replace(spec, benchmark_shapes=(case,))


@pytest.fixture
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(row_ops, "COPY_BYTES", 64)
    monkeypatch.setattr(row_ops, "DEVICE_NEEDED", False)
    monkeypatch.setattr(row_ops, "alternating", _calls_once)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(row_ops, "_print_tilings", lambda *_: None)
    layers = {name: dataclasses.replace(layer, shape=(20, 16), rank=3) for name, layer in stream_rows.LAYERS.items()}
    monkeypatch.setattr(stream_rows, "LAYERS", layers)
    return argparse.Namespace(out=tmp_path, repeats=2)


@pytest.mark.parametrize("op", ["norm_rows", "norm_rows_backward", "write_rows_", "bypass_rows_"])
def test_records_are_sound(op, quick):
    spec = _small(SPECS[op])
    row_ops.benchmark_row_op(spec, "cpu", quick)
    records = read_records(quick.out / "ops.jsonl")
    bars = {bar.id: bar for bar in BARS}
    assert not [problem for record in records for problem in find_problems(record, bars)]
    answered = {record.bar: record.value for record in records if record.bar}
    share = answered[f"C.ops_bandwidth/{op.rstrip('_')}"]
    inputs = spec.benchmark_shapes[0].inputs(0, torch.bfloat16)
    assert share == pytest.approx(spec.bytes_moved(inputs) / 128 * CLOCK["copy"] / CLOCK["lemo"])
    if op == "norm_rows":
        assert answered["C.gather_norm_vs_naive"] == CLOCK["naive"] / CLOCK["lemo"]
    if op == "write_rows_":
        assert {f"C.scatter_vs_naive/keep-{keep}" for keep in (0.3, 0.5)} < set(answered)


def test_naive_ways_give_what_the_ops_give():
    """But for the residual of written rows, which the naive side takes for a part of the update."""
    for name in ("norm_rows", "bypass_rows_", "bypass_rows_backward_"):
        spec = SPECS[name]
        case = next(c for c in spec.cases if c.name == "rows")
        wanted, found = spec.run(**case.inputs(0, torch.float64)), spec.naive(**case.inputs(0, torch.float64))
        wanted = wanted[0] if isinstance(wanted, tuple) else wanted
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
