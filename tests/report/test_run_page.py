"""The run page shows what the logs say, needs nothing beside it, and charts are where the numbers are."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lemo.cli.main import app
from lemo.cli.report import name_runs
from lemo.errors import DataError
from lemo.report import charts
from lemo.report.run_page import RunLog, flatten, read_run, run_page

VOID = {"meta", "line", "circle", "path", "img", "br"}


class Page(HTMLParser):
    """Elements, text and attributes; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def check_alone(text):
    """No script, nothing loaded from elsewhere."""
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith(("data:", "#"))
    assert "url(" not in text and "@import" not in text
    return page


def write_run(folder, steps=3, finished=True, **entry):
    folder.mkdir(parents=True)
    lines = [
        {
            "step": step,
            "loss": 4.0 - step / 10,
            "learning_rate": 1e-4,
            "tokens_per_s": 1000.0 + step,
            "memory_bytes": 2**30,
            "peak_memory_bytes": 2**31,
            "forward_ratio": 0.5,
            "backward_ratio": 0.25,
            "layer_ratios": {"1": [0.4, 0.2], "2": [0.6, 0.3]},
            **entry,
        }
        for step in range(1, steps + 1)
    ]
    lines.append({"step": steps, "eval_loss": 3.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.yaml").write_text("output: o\nlora: {rank: 8}\n")
    losses = {"dense before": 4.25, "dense after": 3.125, "sparse, loss rows after": 3.0625}
    summary = {"steps": steps, "losses": losses, "tokens_per_s": 1234.0, "peak_memory_bytes": 3 * 2**30}
    if finished:
        (folder / "summary.json").write_text(json.dumps({**summary, "notes": ["<b>once</b>"], "device": "card"}))
    return folder


def test_page_shows_the_figures_of_each_run_side_by_side(tmp_path):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", finished=False)
    (second / "recipe.yaml").write_text("output: o\nlora: {rank: 16}\n")
    done = CliRunner().invoke(app, ["report", str(first), str(second), "--out", str(tmp_path / "deep" / "r.html")])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "deep" / "r.html").read_text()
    page = check_alone(text)
    for value in ("3.1250", "1,234", "3.00", "not finished, 3 steps", "50% / 25%", "look-ahead", "card"):
        assert value in page.text
    assert "<b>once</b>" not in text and "<b>once</b>" in page.text
    assert text.count("<figure>") == 9  # six over steps, one by layer, one by groups and run
    assert re.search(r"<td>lora.rank</td><td>8</td><td>16</td>", text) and "<td>output</td>" not in text
    assert "prefers-color-scheme: dark" in text


def test_empty_panels_are_left_out_and_one_run_shows_its_recipe(tmp_path):
    run = read_run(write_run(tmp_path / "a", layer_ratios={}, tokens_per_s=None), {"lora": {"rank": 8}}, "a")
    text = run_page([run])
    page = check_alone(text)
    assert "Throughput" not in page.text and "Rows by layer" not in page.text and "Calibration" not in page.text
    assert "Training loss" in page.text and "lora.rank" in page.text


def test_calibration_is_drawn_by_layer():
    rows = [{"part": "rows", "domain": "books", "layer": layer, "recall_0.3": 0.9} for layer in (1, 2)]
    report = {"fits": {"sequential": {"rows": rows, "explained": {"1": 0.5, "2": 0.75}}}}
    text = run_page([RunLog("a", ({"step": 1, "loss": 1.0},), {}, calibration=report)])
    assert "books, sequential: 0.9 at 2" in text and "sequential: 0.75 at 2" in text


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    folder = write_run(tmp_path / "a")
    whole = read_run(folder, {}, "a").entries
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert read_run(folder, {}, "a").entries == whole


def test_figures_that_are_not_finite_are_not_drawn():
    run = RunLog("a", ({"step": 1, "loss": 1.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 2.0}), {})
    assert run.points("loss") == [(1, 1.0), (3, 2.0)]
    assert "nan" not in run_page([run]).lower()


def test_bad_logs_are_named(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, row 2: no log entry"):
        read_run(folder, {}, "a")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "summary.json").write_text("{")
    with pytest.raises(DataError, match=r"summary\.json: cannot be read"):
        read_run(folder, {}, "a")
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 2 and "no output folder of a run" in done.stderr


@example(low=0.0, span=5e-324)
@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_ticks_are_round_and_enclose(low, span):
    found = charts.ticks(low, low + span)
    assert 2 <= len(found) <= 8 and found == sorted(set(found))
    room = 1e-6 * max(1.0, abs(low), abs(low + span))
    assert found[0] <= low + room and found[-1] >= low + span - room


def test_points_are_drawn_where_they_belong():
    text = charts.line_chart("t", {"s": [(0, 0), (5, 5), (10, 10)]}, x_label="x", y_label="y", from_zero=True)
    places = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', text)]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1) and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert x0 < x2 and y0 > y2
    assert charts.line_chart("t", {"s": [(0, float("nan"))]}, x_label="x", y_label="y") == ""


def test_long_series_are_smoothed_without_lag_of_sums():
    points = [(i, float(i % 2)) for i in range(100)]
    mean = charts.running_mean(points, 10)
    assert mean[0] == (0, 0.0) and all(y == 0.5 for _, y in mean[9:])


def test_names_tell_folders_apart(tmp_path):
    assert name_runs([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]
    assert name_runs([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert name_runs([tmp_path / "a"]) == ["a"]


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}
