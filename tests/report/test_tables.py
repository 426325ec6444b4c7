"""Tables say what Records say, and the README's are those of the Records in the repository."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lemo.errors import DataError
from lemo.measure.record import Record, read_records
from lemo.report import html, tables

ROOT = Path(__file__).resolve().parents[2]


def record(name: str, samples, unit: str = "nats", statistic: str = "mean", **changes) -> Record:
    made = Record.measure(
        name, unit, samples, {"statistic": statistic, "x": changes.pop("x", 0)}, script="s.py", seeds=[0]
    )
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize("document", ["README.md", "docs/results.md", "docs/guide/estimate.md"])
def test_tables_are_those_of_the_records(document):
    text = (ROOT / document).read_text()
    records = read_records(sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")))
    assert tables.fill(text, records) == text, (
        f"run `python -m lemo.report.tables {document} benchmarks/results/*.jsonl` and commit the result"
    )
    assert "<!-- records:" in text


def test_estimates_are_listed_with_what_was_measured():
    keys = [
        "shape=a tokens=4096 keep=1.0 kv=all recompute=none engine=plain",
        "shape=b tokens=8 keep=0.3 kv=kept layers=2",
    ]
    keys[1] += " recompute=lin engine=fused offload=True"
    setting = {"statistic": "mean", "within": 0.1, "errors": dict(zip(keys, [0.01, -0.2], strict=True))}
    setting["peaks_bytes"] = dict.fromkeys(keys, 2**30)
    name = "estimate/within_ten_percent"
    made = Record.measure(name, "share", [1.0, 0.0], setting, script="s.py", seeds=[0])
    lines = tables.TABLES["estimate"]([made]).splitlines()
    assert lines[0] == "1 of 2 points within 10%."
    assert [part.strip() for part in lines[4].split("|")[1:-1]] == [
        "b, 2 layers", "8", "keep 0.3, kv kept", "fused", "lin, offload", "1.00", "-20.0%",
    ]  # fmt: skip
    assert "dense" in lines[5]


def test_a_study_has_one_line_per_variant():
    records = [
        record("demo/dense/validation_loss_after", [3.0, 4.0]),
        record("demo/skip/validation_loss_after", [3.25]),
    ]
    lines = tables.TABLES["demo"](records).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["dense", "skip"]
    assert "3.500" in lines[2] and "3.250" in lines[3] and "–" in lines[3]
    assert "`s.py`" in lines[-1]


def test_the_newest_setting_counts_and_its_seeds_are_averaged():
    old = record("a/b/c", [9.0], x=1, time="2020-01-01T00:00:00+00:00")
    first, second = record("a/b/c", [1.0]), record("a/b/c", [3.0], seeds=(1,))
    again = dataclasses.replace(record("a/b/c", [2.0]), time="2999-01-01T00:00:00+00:00")
    assert tables.mean_value([first, old, second], "a/b/c") == 2.0
    assert tables.mean_value([first, second, again], "a/b/c") == 2.5
    assert tables.mean_value([], "a/b/c") is None


@pytest.mark.parametrize("name", tables.TABLES)
def test_tables_without_records_say_so(name: str):
    assert tables.TABLES[name]([]) == tables.NOT_MEASURED


def test_bars_show_the_newest_value_of_each():
    old, new = (record("n", [v], bar="A.x", time=t) for v, t in ((1.0, "2020"), (2.0, "2021")))
    text = tables.TABLES["bars"]([new, old])
    assert "`A.x`" in text and " 2 " in text and " 1 " not in text


def test_fill_replaces_between_markers_only_and_is_idempotent():
    text = "a\n<!-- records:demo -->\nold\n<!-- /records -->\nb\n"
    once = tables.fill(text, [])
    assert once.startswith("a\n") and once.endswith("\nb\n") and "old" not in once and tables.NOT_MEASURED in once
    assert tables.fill(once, []) == once


@pytest.mark.parametrize(
    "text", ["<!-- records:demo -->\n", "<!-- /records -->", "<!-- records:nope -->\n<!-- /records -->"]
)
def test_bad_markers_are_refused(text: str):
    with pytest.raises(DataError):
        tables.fill(text, [])


def test_main_fills_a_file_and_refuses_bad_records(tmp_path: Path, capsys):
    document, records = tmp_path / "d.md", tmp_path / "r.jsonl"
    document.write_text("<!-- records:demo -->\n<!-- /records -->\n")
    record("demo/skip/peak_memory", [1.5], "GiB").append(records)
    assert tables.main([str(document), str(records)]) == 0
    assert "1.50" in document.read_text()
    records.write_text("{}\n")
    assert tables.main([str(document), str(records)]) == 2 and "r.jsonl:1" in capsys.readouterr().err
    assert tables.main([]) == 2


def test_html_keeps_the_table_and_escapes_text(tmp_path: Path):
    table = tables.markdown(["what", "n"], [["a<b", "1.5"]])
    page = html.page("T & U", [html.table(table + "\n\nbehind"), html.paragraph("x > y")])
    assert "<td>a&lt;b</td><td class=number>1.5</td>" in page
    assert "T &amp; U" in page and "x &gt; y" in page and "<p>behind</p>" in page


def test_training_has_one_line_a_shape_and_length():
    def speedup(what: str, method: str, value: float, tokens: int = 65536):
        samples = {"baseline": [8.0, 10.0, 12.0], "lemo": [2.0, 2.5, 3.0]}
        setting = {
            "shape": "a",
            "tokens": tokens,
            "method": method,
            "baseline": "liger",
            "statistic": "ratio_of_medians",
        }
        found = Record.measure(
            f"training/a/{tokens}/qkvo/{method}/speedup", "ratio", samples, setting,
            script="s.py", seeds=[0], bar=f"C.{tokens // 1024}k_{what}/a/qkvo",
        )  # fmt: skip
        return dataclasses.replace(found, value=value)

    peaks = [
        record(f"training/a/65536/qkvo/{m}/peak_memory", [g], "GiB") for m, g in (("liger", 40.0), ("lemo:d", 20.0))
    ]
    lines = tables.TABLES["training"]([speedup("time", "lemo:d", 4.0), speedup("k50", "lemo:k", 3.0, 8192), *peaks])
    cells = [[part.strip() for part in line.split("|")[1:-1]] for line in lines.splitlines()[2:4]]
    assert cells[0] == ["a", "8,192", "10,000", "–", "–", "–", "–", "3.00", "–"]
    assert cells[1] == ["a", "65,536", "10,000", "40.0", "2,500", "20.0", "4.00", "–", "–"]
