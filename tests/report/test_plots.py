"""Figures show the numbers of the Records; nothing drawn is invented."""

from __future__ import annotations

from pathlib import Path

import pytest

from lemo.errors import DataError
from lemo.measure.record import Record
from lemo.report import html, plots


def _records() -> list[Record]:
    found = []
    for variant, loss, rate, peak in (("dense", 3.1, 70.0, 2.5), ("skip", 3.2, 120.0, 1.8)):
        for what, unit, samples in (
            ("training_loss", "nats", [4.0, 3.5, loss]),
            ("validation_loss_before", "nats", [3.9, 4.1]),
            ("validation_loss_after", "nats", [loss]),
            ("tokens_per_second", "tokens/s", [rate]),
            ("peak_memory", "GiB", [peak]),
            ("forward_share", "share", [1.0, 0.5, 0.5, 1.0]),
        ):
            statistic = {"statistic": "mean"}
            found.append(Record.measure(f"demo/{variant}/{what}", unit, samples, statistic, script="s.py"))
    return found


def _axes():
    pyplot = plots._pyplot()
    figure, axes = pyplot.subplots()
    return pyplot, figure, axes


def test_a_study_becomes_a_png(tmp_path: Path):
    path = plots.plot_study(_records(), tmp_path / "new" / "r.png", study="demo", title="t")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "base64," in html.image(path, "a figure")


def test_bars_carry_their_numbers_and_start_at_zero():
    pyplot, figure, axes = _axes()
    plots.draw_bars(axes, {"dense": 70.0, "skip": 120.0}, "Speed", "tokens/s")
    assert [bar.get_width() for bar in axes.patches] == [70.0, 120.0]
    assert {"70", "120"} <= {text.get_text() for text in axes.texts} and axes.get_xlim()[0] == 0
    pyplot.close(figure)


def test_losses_show_every_stage_and_value():
    pyplot, figure, axes = _axes()
    plots.draw_losses(axes, plots._stages(_records(), "demo", ["dense", "skip"]))
    assert {text.get_text() for text in axes.texts} == {"4.000", "3.100", "3.200"}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["before", "after"]
    pyplot.close(figure)


def test_the_keep_map_is_drawn_as_given(tmp_path: Path):
    pyplot, figure, axes = _axes()
    plots.draw_keep_map(axes, [[1.0, 0.0], [1.0, 1.0]], 64, [True, False])
    assert axes.images[0].get_array().tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert axes.lines[0].get_xdata().tolist() == [0]
    pyplot.close(figure)
    assert plots.plot_keep_map([[1.0, 0.0]], tmp_path / "k.png", block_size=64, title="t").exists()


@pytest.mark.parametrize(("rows", "says"), [("forward", "run each layer"), ("backward", "pass gradient")])
def test_a_map_says_which_rows_it_shows(rows, says, tmp_path: Path, monkeypatch):
    titles = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: titles.append(figure.axes[0].get_title(loc="left")))
    plots.plot_keep_map([[1.0, 0.0]], tmp_path / "k.png", block_size=64, supervised_K=[True, False], rows=rows)
    assert len(titles) == 1 and f"Blocks that {says}" in titles[0]


def test_nothing_to_draw_is_an_error(tmp_path: Path):
    with pytest.raises(DataError):
        plots.plot_study([], tmp_path / "r.png", study="demo", title="t")
    with pytest.raises(DataError):
        plots.plot_keep_map([], tmp_path / "r.png", block_size=64)
