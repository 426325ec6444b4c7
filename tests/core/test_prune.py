"""Laws of elastic size transformation: dead neurons go first, the goal is met, the given net is not changed."""

import pytest
import torch

from lemo.core.layout import Layout
from lemo.core.predictor import PatternPredictor
from lemo.core.prune import NeuronCensus, prune, size_share
from lemo.errors import ConfigError

LAYOUT = Layout.build(torch.zeros(1, 160, dtype=torch.int64), None, block_size=8)


def _counted(seed=0, **options):
    torch.manual_seed(seed)
    predictor = PatternPredictor(16, pooled_features=12, query_widths=(16, 12), key_widths=(16, 12), rank=4, **options)
    x = torch.randn(160, 16)
    census = NeuronCensus(predictor)
    return predictor, census, x


@pytest.mark.parametrize("options", [{}, {"loss_distance": True}, {"position": False}])
def test_keeping_all_changes_nothing(options):
    predictor, census, x = _counted(**options)
    census.add(predictor, predictor.pool_blocks(x, LAYOUT))
    pruned = prune(predictor, census, 1.0)
    assert torch.equal(pruned.scores(x, LAYOUT), predictor.scores(x, LAYOUT))


def test_dead_parts_are_pruned_without_a_trace():
    predictor, census, x = _counted()
    with torch.no_grad():
        for net in (predictor.query_net, predictor.key_net):
            for index in (0, 2):
                dead = net[index].out_features // 2
                net[index].weight[:dead] = 0
                net[index].bias[:dead] = -1
            for pool in range(3):
                net[0].weight[:, pool * 12 : pool * 12 + 6] = 0
    census.add(predictor, predictor.pool_blocks(x, LAYOUT))
    before = {name: value.clone() for name, value in predictor.state_dict().items()}
    pruned = prune(predictor, census, 0.65)
    assert size_share(pruned, predictor) <= 0.65
    torch.testing.assert_close(pruned.scores(x, LAYOUT), predictor.scores(x, LAYOUT))
    assert all(torch.equal(before[name], value) for name, value in predictor.state_dict().items())


@pytest.mark.parametrize("target", [0.2, 0.5, 0.9])
def test_the_goal_is_met_closely(target):
    predictor, census, x = _counted()
    census.add(predictor, predictor.pool_blocks(x, LAYOUT))
    share = size_share(prune(predictor, census, target), predictor)
    assert target - 0.15 <= share <= target


def test_census_counts_zeros_over_batches():
    predictor, census, x = _counted()
    features = predictor.pool_blocks(x, LAYOUT)
    census.add(predictor, features[:5])
    census.add(predictor, features[5:])
    hidden = torch.relu(predictor.key_net[0](features))
    torch.testing.assert_close(census.zero_share()["key_net", 0], (hidden == 0).double().mean(0))


def test_bad_input_is_refused():
    predictor, census, x = _counted()
    with pytest.raises(ConfigError, match="counted"):
        prune(predictor, census, 0.5)
    census.add(predictor, predictor.pool_blocks(x, LAYOUT))
    for target in (0.0, 1.5):
        with pytest.raises(ConfigError, match="target"):
            prune(predictor, census, target)
