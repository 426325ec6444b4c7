"""The performance page says what the Records say, and nothing else."""

from __future__ import annotations

import re

from benchmarks import performance
from benchmarks.performance import bar_table, draw, page, read_scenes
from benchmarks.training_records import make_records
from lemo.measure.record import read_records
from tests.architecture.rules import ROOT
from tests.benchmarks.test_training import GROUP, cell, cells_of
from tests.benchmarks.test_training import training as training_module


def records(**changes):
    cells = cells_of(GROUP, fp32=(4.0, 40.0, "c"), bf16=(3.0, 44.0, "c"), lemo=(1.0, 20.0, "c"))
    for method, changed in changes.items():
        for turn in (0, 1):
            key = training_module.Turn(GROUP, method, turn).key
            cells[key] = cell(1.0, 1.0, options={}, **changed)
    return make_records([GROUP], cells)[0]


def test_times_memory_and_gains_are_on_the_page():
    text = page(records(), [])
    assert re.search(r"lemo, 50 % of rows, kv kept +\| 1,000 ms, 20.0 GiB", text)
    assert re.search(r"`C.8k_k50/llama2/qkvo`.*>= 1.85 +\| +3 +\| ratio +\| met", text)
    assert re.search(r"`C.64k_k30` .*not measured", text)
    assert re.search(r"speedup +\| +3.00 +\| Liger +\|", text)


def test_a_missed_bar_is_shown_as_missed():
    cells = cells_of(GROUP, fp32=(1.1, 40.0, "c"), bf16=(1.2, 44.0, "c"), lemo=(1.0, 30.0, "c"))
    found = bar_table(make_records([GROUP], cells)[0])
    assert re.search(r"C.8k_k50/llama2/qkvo.*1.1.*missed", found)
    assert re.search(r"C.8k_gib/llama2/qkvo.*30.*missed", found)


def test_a_narrow_miss_is_not_rounded_to_the_goal():
    cells = cells_of(GROUP, fp32=(1.8496, 40.0, "c"), bf16=(1.8496, 44.0, "c"), lemo=(1.0, 20.0, "c"))
    found = bar_table(make_records([GROUP], cells)[0])
    assert re.search(r"C.8k_k50/llama2/qkvo.*>= 1.85 +\| +1.8496 .*missed", found)


def test_out_of_memory_and_refusals_are_results():
    text = page(records(liger={"status": "out of memory", "reason": "tried"}), [])
    assert re.search(r"Liger, fp32 adapters +\| out of memory", text)
    text = page(records(liger={"status": "unsupported", "reason": "is not installed"}), [])
    assert "- Liger, fp32 adapters: is not installed" in text


def test_figures_are_drawn_where_there_is_something_to_draw(tmp_path):
    names = draw(read_scenes(records()), tmp_path)
    assert set(names) == {f"performance-llama2-7b-qkvo-{what}.png" for what in ("phases", "held")}
    assert all((tmp_path / name).stat().st_size > 0 for name in names)
    assert all(name in page(records(), names) for name in names)


def test_the_published_page_is_made_from_the_published_records():
    shown = (ROOT / "docs" / "performance.md").read_text()
    figures = sorted(path.name for path in (ROOT / "docs").glob("performance-*.png"))
    made = page(read_records(performance.default_files()), figures)
    order = re.compile(r"^!\[.*\n\n?", re.MULTILINE)
    assert order.sub("", shown) == order.sub("", made), "run python -m benchmarks.performance"
    assert set(re.findall(r"\((performance-[\w.-]+png)\)", shown)) == set(figures)
