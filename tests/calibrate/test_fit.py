"""Laws of fitting: predictors learn what can be learnt, projections find the directions that tell, ratios are met."""

import dataclasses

import pytest
import torch

from lemo.calibrate.collect import PartStatistics, ProjectionFit, blank_predictor, skip_weights
from lemo.calibrate.fit import fit_part, merge_layouts
from lemo.calibrate.report import curves, print_report, recall, recall_row, summarise
from lemo.calibrate.tune import ScoreProfile, project, tune_thresholds, window_labels
from lemo.calibrate.windows import Window
from lemo.config import CalibrationConfig
from lemo.core.layout import Layout
from lemo.errors import ConfigError

WIDTH, BLOCK = 16, 4
CONFIG = CalibrationConfig(pooled_features=6, predictor_width=12, predictor_rank=4, predictor_steps=200)


def _layout(*lengths, supervised=None):
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    return Layout.build(ids, supervised, block_size=BLOCK)


def _learnable(windows=6, blocks=40):
    """Windows whose blocks score by how far their rows lie along one hidden direction."""
    torch.manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(WIDTH), dim=0)
    layouts, streams, targets = [], [], []
    projection = ProjectionFit(WIDTH, 1, torch.device("cpu"))
    for _ in range(windows):
        layout = _layout(blocks * BLOCK)
        strength = torch.randn(blocks).repeat_interleave(BLOCK)
        x = torch.randn(blocks * BLOCK, WIDTH) * 0.3 + strength[:, None] * direction
        layouts.append(layout)
        streams.append(x)
        targets.append(torch.exp(strength[::BLOCK]))
        projection.add(x, strength[:, None])
    return layouts, streams, targets, projection


def test_a_predictor_learns_a_learnable_target_and_keeps_it_when_pruned():
    layouts, streams, targets, projection = _learnable()
    statistics = PartStatistics(projection.solve(6), targets, None)
    shape = blank_predictor(statistics.projection_MF, CONFIG)
    statistics.features = [shape.raw_features(x, layout) for x, layout in zip(streams, layouts, strict=True)]
    held = 5
    for prune_to in (1.0, 0.65):
        fit = fit_part(statistics, layouts, range(5), dataclasses.replace(CONFIG, prune_to=prune_to))
        scores = fit.predictor.scores(streams[held], layouts[held])
        row = recall_row(scores, targets[held], layouts[held], 0, 0)
        assert row["recall_0.3"] > 0.8 and row["mass_0.3"] > 0.9
        assert max(row["random_recall_0.3"], row["position_recall_0.3"]) < 0.6
        assert fit.predictor.parameter_count() <= prune_to * fit.unpruned.parameter_count()
        assert not any(p.requires_grad for p in fit.predictor.parameters())
        assert fit.bypass is None and fit.explained is None


def test_the_projection_finds_the_direction_that_predicts_the_row_score():
    *_, projection = _learnable()
    first = projection.solve(3)
    torch.manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(WIDTH), dim=0)
    assert first.shape == (WIDTH, 1)
    assert float(torch.nn.functional.cosine_similarity(first[:, 0], direction, dim=0)) > 0.95


def test_fewer_directions_than_heads_keep_what_explains_most():
    torch.manual_seed(0)
    x, mixing = torch.randn(400, WIDTH), torch.randn(WIDTH, 2) @ torch.randn(2, 5)
    projection = ProjectionFit(WIDTH, 5, torch.device("cpu"))
    projection.add(x, x @ mixing)
    two, scores = projection.solve(2), x @ mixing
    rebuilt = (x @ two) @ torch.linalg.lstsq(x @ two, scores).solution
    assert float((scores - rebuilt).square().sum() / scores.square().sum()) < 0.05


def test_merged_layouts_score_like_their_parts():
    layouts = [_layout(20, 13), _layout(32)]
    predictor = blank_predictor(torch.randn(WIDTH, 6), CONFIG)
    features = [predictor.pool_blocks(torch.randn(layout.tokens, WIDTH), layout) for layout in layouts]
    merged = predictor.scores_of_features(torch.cat(features), merge_layouts(layouts))
    parts = [predictor.scores_of_features(f, layout) for f, layout in zip(features, layouts, strict=True)]
    torch.testing.assert_close(merged, torch.cat(parts), rtol=1e-5, atol=1e-6)


def test_bypass_weights_follow_the_oracle():
    layout = _layout(40)
    target = torch.arange(10.0)
    weight = skip_weights(layout, target, 0.5).reshape(10, BLOCK)[:, 0]
    # Guards 0 and 9 run always; of the rest the best three fill the budget of five.
    assert weight.tolist() == pytest.approx([0, 1, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0])


def test_recall_counts_competing_blocks_only():
    supervised = torch.zeros(1, 48, dtype=torch.bool)
    supervised[0, 20] = True
    layout = _layout(48, supervised=supervised)
    target = torch.arange(12.0)
    target[5] = 100.0  # supervised: whoever finds it gains nothing
    assert recall(target, target, layout, 0.3) == (1.0, 1.0)
    scores = target.clone()
    scores[10] = -1.0  # competing blocks 1-4, 6-10; three are chosen: 10, 9, 8 against 9, 8, 7
    hits, mass = recall(scores, target, layout, 0.3)
    assert hits == pytest.approx(2 / 3) and mass == pytest.approx(24 / 27)
    assert recall(scores, target, _layout(8), 0.3) is None


def test_summary_names_the_worst_layer():
    layout, target = _layout(80), torch.rand(20)
    rows = []
    for layer, scores in enumerate((target, -target)):
        rows.append({"layer": layer, "part": "rows", "domain": "a", "window": 0})
        rows[-1] |= recall_row(scores, target, layout, layer, 0)
    summary = summarise(rows)["a"]
    assert summary["worst_layer_0.3"] == 1 and summary["worst_recall_0.3"] < 0.5
    assert summary["recall_0.3"] == pytest.approx((1 + summary["worst_recall_0.3"]) / 2)
    panels = curves({"fits": {"dense": {"rows": rows, "explained": {0: 0.5, 1: None}}}})
    assert panels["recall"]["a, dense"][0] == 1.0 and panels["explained"]["dense"] == {0: 0.5}


def _profiles():
    generator = torch.Generator().manual_seed(0)
    return {i: ScoreProfile(torch.randn(500, generator=generator) * (i + 1), 0.1) for i in range(3)}


@pytest.mark.parametrize("ratio", [0.15, 0.5, 0.9])
def test_projection_meets_the_mean_ratio_by_one_shift(ratio):
    profiles = _profiles()
    start = {0: 0.3, 1: -1.0, 2: 0.7}
    moved = project(start, profiles, ratio)
    assert sum(profiles[i].ratio(t) for i, t in moved.items()) / 3 == pytest.approx(ratio, abs=0.003)
    shifts = {round(moved[i] - start[i], 9) for i in start}
    assert len(shifts) == 1
    with pytest.raises(ConfigError, match="guards"):
        project(start, profiles, 0.05)


def test_algorithm_1_gives_rows_to_the_layer_where_they_matter():
    profiles = _profiles()
    worth = {0: 4.0, 1: 1.0, 2: 0.2}

    def quality(thresholds):
        return sum(worth[i] * profiles[i].ratio(t) ** 0.5 for i, t in thresholds.items())

    start = project({i: p.mean() for i, p in profiles.items()}, profiles, 0.5)
    tuned = tune_thresholds(quality, profiles, 0.5, 6)
    assert quality(tuned) > quality(start)
    assert profiles[0].ratio(tuned[0]) > profiles[0].ratio(start[0])
    assert sum(profiles[i].ratio(t) for i, t in tuned.items()) / 3 == pytest.approx(0.5, abs=0.003)


def test_algorithm_1_never_returns_less_than_its_start():
    profiles = _profiles()
    draws = iter([0.0, *(-float(i % 7) for i in range(100))])
    history = []
    tuned = tune_thresholds(
        lambda thresholds: next(draws), profiles, 0.5, 3, lambda step, t, value: history.append((value, dict(t)))
    )
    assert tuned == max(history, key=lambda entry: entry[0])[1]


def test_labels_supervise_the_rows_of_the_mask():
    ids = torch.arange(10)[None]
    supervised = torch.zeros(1, 10, dtype=torch.bool)
    supervised[0, [2, 5, 9]] = True  # the last row predicts nothing
    labels = window_labels(Window(ids, supervised, None, None, "a", True))
    assert labels[0].tolist() == [-100, -100, -100, 3, -100, -100, 6, -100, -100, -100]
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6]])
    labels = window_labels(Window(ids, supervised, None, packed, "a", True))
    assert labels[0].tolist() == [-100] * 6 + [6, -100, -100, -100]


def test_recall_stands_beside_ranks_that_need_no_predictor(capsys):
    supervised = torch.zeros(1, 96, dtype=torch.bool)
    supervised[:, 40:48] = True  # block 5 of 12
    layout = Layout.build(torch.zeros(1, 96, dtype=torch.int64), supervised, block_size=8)
    nearest = torch.tensor([0.0, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0])  # what a target may be: blocks right before the loss
    row = {"domain": "a", "layer": 0} | recall_row(-nearest, nearest, layout, 0, 0)
    assert row["recent_recall_0.3"] == 1.0 > max(row["recall_0.3"], row["position_recall_0.3"])
    stage = {"recall": summarise([row])}
    print_report({"fits": {"sequential": stage}, "losses": {}})
    assert "before" in (shown := capsys.readouterr().out) and "1.000" in shown
    stage["recall"]["a"].pop("recent_recall_0.3")  # a calibration of an earlier version is only read
    print_report({"fits": {"sequential": stage}, "losses": {}})
    assert "–" in capsys.readouterr().out
