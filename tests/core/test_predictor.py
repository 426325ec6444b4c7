"""Laws of pattern predictors: no map is formed but the result is the map's, documents stay apart, sizes are kept."""

import json

import pytest
import torch

from lemo.core.layout import Layout
from lemo.core.predictor import PatternPredictor, loss_distances, pool_rows
from lemo.errors import ConfigError

WIDTH = 16


def _layout(*lengths, padding=0, block_size=8):
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((padding,), -1)])
    return Layout.build(ids[None], None, block_size=block_size)


def _predictor(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"pooled_features": 8, "query_widths": (6, 5), "key_widths": (7, 6), "rank": 4}
    return PatternPredictor(WIDTH, **{**sizes, **changes})


@pytest.mark.parametrize("lengths", [(64,), (37, 20), (8, 3, 50)])
def test_scores_are_the_mean_of_the_explicit_map(lengths):
    layout, predictor = _layout(*lengths, padding=5), _predictor()
    x = torch.randn(sum(lengths) + 5, WIDTH)
    pairs = predictor.pair_scores(predictor.pool_blocks(x, layout))
    document, index = layout.block_document_K, torch.arange(len(layout.block_document_K))
    allowed = (document[:, None] == document) & (index[:, None] >= index)
    expected = (pairs * allowed).sum(0) / allowed.sum(0)
    torch.testing.assert_close(predictor.scores(x, layout), expected, rtol=1e-5, atol=1e-6)


def test_a_packed_document_scores_as_it_does_alone():
    predictor, lengths = _predictor(), (41, 16, 9)
    x = torch.randn(sum(lengths), WIDTH)
    packed = predictor.scores(x, _layout(*lengths))
    alone = [predictor.scores(part, _layout(len(part))) for part in x.split(lengths)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_padding_rows_do_not_matter():
    predictor, x = _predictor(), torch.randn(40, WIDTH)
    layout = _layout(30, padding=10)
    poisoned = x.clone()
    poisoned[30:] = 1e6
    assert torch.equal(predictor.scores(x, layout), predictor.scores(poisoned, layout))


def test_scale_of_a_row_does_not_matter():
    predictor, x, layout = _predictor(), torch.randn(32, WIDTH), _layout(32)
    torch.testing.assert_close(predictor.scores(x, layout), predictor.scores(100 * x, layout), rtol=1e-3, atol=1e-4)


def test_pooling_equals_a_loop():
    layout, value = _layout(21, 9, padding=2), torch.randn(32, 3)
    for pool, reduce in (("mean", lambda rows: rows.mean(0)), ("max", lambda rows: rows.amax(0))):
        starts, lengths = layout.block_start_K.tolist(), layout.block_length_K.tolist()
        expected = torch.stack([reduce(value[s : s + n]) for s, n in zip(starts, lengths, strict=True)])
        torch.testing.assert_close(pool_rows(value, layout, pool), expected)


def test_config_and_state_rebuild_the_predictor():
    predictor, x, layout = _predictor(), torch.randn(32, WIDTH), _layout(32)
    rebuilt = PatternPredictor(**json.loads(json.dumps(predictor.config())))
    rebuilt.load_state_dict(predictor.state_dict())
    assert torch.equal(rebuilt.scores(x, layout), predictor.scores(x, layout))


def test_low_precision_input_is_scored_in_fp32():
    predictor, x, layout = _predictor(), torch.randn(32, WIDTH).bfloat16(), _layout(32)
    scores = predictor.scores(x, layout)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    assert torch.equal(scores, predictor.scores(x.float(), layout))


def test_rounding_the_projection_to_bf16_does_not_move_scores():
    """The kernel multiplies bf16 rows by a bf16 projection and adds up in fp32: products of bf16 numbers are exact."""
    torch.manual_seed(1)
    predictor, x = PatternPredictor(256), torch.randn(1024, 256).bfloat16()
    # Nets that were not trained give scores that hardly differ from block to block.
    for parameter in (*predictor.query_net.parameters(), *predictor.key_net.parameters()):
        parameter.mul_(3)
    layout = _layout(700, 324, block_size=16)
    exact = predictor.scores(x, layout)
    predictor.projection_MF.copy_(predictor.projection_MF.bfloat16())
    rounded = predictor.scores(x, layout)
    assert not torch.equal(exact, rounded)
    assert torch.corrcoef(torch.stack([exact, rounded]))[0, 1] > 0.9999
    kept = [set(scores.topk(20).indices.tolist()) for scores in (exact, rounded)]
    assert len(kept[0] & kept[1]) >= 19


def test_scores_are_those_of_the_differentiable_path():
    """Training goes through `scores_of_features`; what it learns is what `scores` ranks by."""
    predictor, layout, x = _predictor(), _layout(37, 20), torch.randn(57, WIDTH)
    predictor.feature_mean.normal_()
    predictor.feature_scale.uniform_(0.5, 2)
    expected = predictor.scores_of_features(predictor.pool_blocks(x, layout), layout)
    torch.testing.assert_close(predictor.scores(x, layout), expected, rtol=1e-6, atol=1e-7)


def test_default_sizes_meet_the_share_bars():
    # Models' own parameters: SmolLM2-135M has 134.5 M in 30 layers, Llama-3-8B 8.03 G in 32.
    assert PatternPredictor(576).parameter_count() * 30 <= 0.05 * 134.5e6
    with torch.device("meta"):
        assert PatternPredictor(4096).parameter_count() * 32 <= 0.005 * 8.03e9


def test_bad_sizes_are_refused():
    with pytest.raises(ConfigError, match="pools"):
        _predictor(pools=("median",))
    with pytest.raises(ConfigError, match="each once"):
        _predictor(pools=("mean", "mean"))
    with pytest.raises(ConfigError, match="positive"):
        _predictor(rank=0)


def _with_loss(*lengths, rows):
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    supervised = torch.zeros(1, len(ids), dtype=torch.bool)
    supervised[0, rows] = True
    return Layout.build(ids[None], supervised, block_size=8)


def test_loss_distances_stay_in_their_document():
    """Blocks to the next one with loss; a block behind the last one is as far as its document is long."""
    layout = _with_loss(40, 24, rows=[17, 42])
    found = loss_distances(layout, torch.device("cpu"))
    distances = [2, 1, 0, 5, 5, 0, 3, 3]
    torch.testing.assert_close(found[:, 0], torch.tensor(distances).float().log1p())
    assert found[:, 1].tolist() == [1, 1, 1, 0, 0, 1, 0, 0]


def test_a_predictor_that_is_told_where_the_loss_is():
    """Its scores depend on it, those of a packed document do not depend on others, and plans keep what it reads."""
    predictor, x = _predictor(loss_distance=True), torch.randn(64, WIDTH)
    near, far = (predictor.scores(x, _with_loss(64, rows=rows)) for rows in ([20], [60]))
    assert not torch.equal(near, far)
    packed = predictor.scores(x, _with_loss(40, 24, rows=[20, 50]))
    alone = [predictor.scores(x[:40], _with_loss(40, rows=[20])), predictor.scores(x[40:], _with_loss(24, rows=[10]))]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-6)
    again = PatternPredictor(**json.loads(json.dumps(predictor.config())))
    again.load_state_dict(predictor.state_dict())
    assert torch.equal(again.scores(x, _with_loss(64, rows=[20])), near)
    assert "loss_distance" not in _predictor().config()
