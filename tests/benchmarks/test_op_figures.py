"""The table of ops has every Record; points of the roofline are what the Records say, and lie under it."""

from __future__ import annotations

import re
from statistics import median

import pytest

from benchmarks.op_figures import FIGURE, draw_roofline, newest, op_section, read_points
from benchmarks.performance import RESULTS
from lemo.measure.record import Record, read_records

SHAPE = "16384 of 32768 x 4096, rank 64"


def share(ms: float, copy_ms: float) -> Record:
    """A bypass that takes `ms` for 256 MiB, which a copy takes `copy_ms` for."""
    setting = {"op": "bypass_rows_", "shape": SHAPE, "statistic": "ratio_of_medians", "bytes_moved": 1 << 28}
    samples = {"baseline": [copy_ms], "lemo": [ms]}
    name = f"ops/bypass_rows_/share_of_copy_rate/{SHAPE}"
    return Record.measure(name, "share", samples, setting, script="benchmarks/ops.py")


def attention(ours: float, vendor: float) -> Record:
    setting = {"keys": 65536, "heads": 32, "key_heads": 8, "head_dim": 128, "keep": 0.5, "pass": "forward"}
    samples = {"baseline": [vendor], "lemo": [ours]}
    setting["statistic"] = "overhead_of_medians"
    name = "attention/kept_on_all/forward/65536/0.5/32_8"
    return Record.measure(name, "ratio", samples, setting, script="benchmarks/attention.py")


def test_a_point_is_its_record():
    (bypass, queries), copy_tb, vendor = read_points([share(0.2, 0.1), attention(600.0, 650.0)])
    flops = 4 * 16384 * 4096 * 64
    assert bypass.intensity == flops / (1 << 28) and bypass.rate == pytest.approx(flops / 0.2e-3 / 1e12)
    assert copy_tb == pytest.approx((1 << 28) / 0.1e-3 / 1e12) and bypass.rate == bypass.intensity * copy_tb / 2
    assert (queries.rate, vendor) == (600.0, 650.0)
    # q, o of half of the rows and k, v of all, against half of all pairs.
    moved = 2 * 128 * (2 * 32768 * 32 + 2 * 65536 * 8)
    assert queries.intensity == 4 * 128 * 32 * 32768 * 65536 / 2 / moved


def test_without_records_nothing_is_drawn(tmp_path):
    assert draw_roofline([], tmp_path) == [] and draw_roofline([share(0.2, 0.1)], tmp_path) == []
    assert draw_roofline([share(0.2, 0.1), attention(600.0, 650.0)], tmp_path) == [FIGURE]
    assert (tmp_path / FIGURE).stat().st_size > 10_000


def test_the_page_has_every_op():
    records = read_records(RESULTS / "ops.jsonl")
    section = "\n".join(op_section(records, [FIGURE]))
    for name, record in newest(records, "ops/").items():
        op, shape = name.split("/")[1], record.setting.get("shape")
        assert f"`{op}" in section and (shape is None or shape in section), name
    assert FIGURE in section


def test_measured_ops_lie_under_the_roofline():
    """A figure above a ceiling would be a wrong count of bytes or operations, but for the copy's own scatter."""
    records = [*read_records(RESULTS / "ops.jsonl"), *read_records(RESULTS / "attention.jsonl")]
    points, copy_tb, vendor = read_points(records)
    assert len(points) >= 15 and {re.split(r"[, ]", p.label)[0] for p in points} >= {"norm_rows", "attention"}
    assert all(p.rate <= 1.03 * min(vendor, copy_tb * p.intensity) for p in points)
    shares = [r for n, r in newest(records, "ops/").items() if "share_of_copy_rate" in n]
    assert max(median(r.samples["baseline"]) / median(r.samples["lemo"]) for r in shares) < 1.05
