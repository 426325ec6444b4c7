"""What pool_blocks and score_blocks promise beyond equality with their references."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from lemo.ops import pool_blocks, score_blocks
from lemo.ops.pool_blocks.reference import Blocks


def _blocks(rows=20, size=8):
    start = torch.arange(0, rows, size)
    return Blocks(start, torch.minimum(torch.tensor(size), rows - start), size)


def test_pools_equal_a_loop_over_blocks():
    x, projection, blocks = torch.randn(20, 6), torch.randn(6, 3), _blocks()
    extra = torch.randn(3, 2)
    found = pool_blocks(x, projection, blocks, pools=("lse", "max", "mean"), extra_KE=extra, eps=0.5)
    for k, (start, length) in enumerate(zip(blocks.start_K.tolist(), blocks.length_K.tolist(), strict=True)):
        rows = x[start : start + length]
        rows = rows / (rows.square().mean(-1, keepdim=True) + 0.5).sqrt() @ projection
        pooled = [rows.exp().mean(0).log(), rows.amax(0), rows.mean(0), extra[k]]
        torch.testing.assert_close(found[k], torch.cat(pooled))


def test_results_never_require_grad():
    x, projection = torch.randn(20, 6, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    assert not pool_blocks(x, projection, _blocks()).requires_grad


def test_long_inputs_are_sliced_without_a_seam(monkeypatch):
    from lemo.ops.pool_blocks import reference

    x, projection = torch.randn(20, 6), torch.randn(6, 3)
    whole = pool_blocks(x, projection, _blocks(), backend="reference")
    monkeypatch.setattr(reference, "ROWS_AT_ONCE", 7)
    torch.testing.assert_close(pool_blocks(x, projection, _blocks(), backend="reference"), whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projection_MF": torch.zeros(5, 3)}, "do not fit"),
        ({"x_NM": torch.zeros(20, 6, dtype=torch.int64)}, "floating"),
        ({"blocks": Blocks(torch.arange(3), torch.arange(2), 8)}, "integers"),
        ({"blocks": Blocks(torch.arange(3), torch.ones(3, dtype=torch.int64), 0)}, "positive"),
        ({"pools": ()}, "pools"),
        ({"pools": ("mean", "mean")}, "pools"),
        ({"pools": ("median",)}, "pools"),
        ({"extra_KE": torch.zeros(2, 1)}, "extra_KE"),
        ({"projection_MF": torch.zeros(6, 3, device="meta")}, "meta"),
    ],
)
def test_pool_blocks_refuses_what_does_not_fit(changes, message):
    arguments = {"x_NM": torch.zeros(20, 6), "projection_MF": torch.zeros(6, 3), "blocks": _blocks(), **changes}
    with pytest.raises(ValueError, match=message):
        pool_blocks(**arguments)


def _net(inputs=4, rank=2):
    sizes = (inputs, 3, 5, rank)
    maps = [(torch.randn(out, size), torch.randn(out)) for size, out in pairwise(sizes)]
    return tuple(t for pair in maps for t in pair)


def _arguments():
    standard = torch.randn(4), torch.rand(4) + 0.5
    return {
        "features_KE": torch.randn(6, 4),
        "standard": standard,
        "query_net": _net(),
        "key_net": _net(),
        "end_K": torch.tensor([4, 4, 4, 4, 6, 6]),
    }


def test_scores_are_means_of_the_map_of_pairs():
    made = _arguments()
    features = (made["features_KE"] - made["standard"][0]) * made["standard"][1]

    def run(net):
        hidden = (features @ net[0].T + net[1]).relu()
        return (hidden @ net[2].T + net[3]).relu() @ net[4].T + net[5]

    pairs = run(made["query_net"]) @ run(made["key_net"]).T / 2**0.5
    expected = torch.stack([pairs[n : made["end_K"][n], n].mean() for n in range(6)])
    torch.testing.assert_close(score_blocks(**made), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features_KE": torch.zeros(6, 5)}, "mean and scale"),
        ({"features_KE": torch.zeros(6)}, "features_KE"),
        ({"end_K": torch.ones(5, dtype=torch.int64)}, "end_K"),
        ({"query_net": _net(inputs=7)}, "query_net"),
        ({"key_net": _net(rank=3)}, "equally many"),
        ({"key_net": _net()[:4]}, "key_net"),
        ({"standard": (torch.zeros(4).double(), torch.ones(4).double())}, "float32"),
    ],
)
def test_score_blocks_refuses_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        score_blocks(**{**_arguments(), **changes})
