"""Laws of targets: each equals its definition written out, rows agree with blocks, and packing changes nothing."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import torch

from lemo.config import CalibrationConfig
from lemo.core.layout import Layout
from lemo.core.score import AttentionMass, Interaction, ScoreInputs
from lemo.core.target import TARGETS, MassTarget, PeakTarget, target_scores
from lemo.errors import ConfigError

HEADS, GROUPS, DIM, BLOCK = 4, 2, 8, 16


def _layout(*lengths, supervised=(), padding=0):
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((padding,), -1)])
    flags = torch.zeros(1, len(ids), dtype=torch.bool)
    for rows in supervised:
        flags[0, rows] = True
    return Layout.build(ids[None], flags, block_size=BLOCK)


def _inputs(layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = layout.batch * layout.tokens
    query, key, value = (torch.randn(n, rows, DIM, generator=generator) for n in (HEADS, GROUPS, GROUPS))
    return ScoreInputs(layout, query_HND=query, key_GND=key, scaling=0.35, value_GND=value)


def _probability(inputs, rows):
    """(H, T, T) of one document."""
    key = inputs.key_GND[:, rows].repeat_interleave(HEADS // GROUPS, 0)
    logits = inputs.query_HND[:, rows] @ key.mT * inputs.scaling
    return logits.masked_fill(torch.ones_like(logits[0], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


LAYOUT = (160, {"supervised": (slice(96, 128),)})


def test_names_are_those_of_the_config():
    kinds = typing.get_type_hints(CalibrationConfig)["target"]
    assert set(typing.get_args(kinds)) == set(TARGETS)
    with pytest.raises(ConfigError, match="target must be"):
        target_scores("mass", _inputs(_layout(64)))
    with pytest.raises(ConfigError, match="value_GND"):
        target_scores("mass_times_value", dataclasses.replace(_inputs(_layout(64)), value_GND=None))


@pytest.mark.parametrize("stride", [1, 4])
def test_mass_and_interaction_are_those_of_the_scorers(stride):
    inputs = _inputs(_layout(70, 90, padding=8))
    assert torch.equal(target_scores("attention_mass", inputs, stride).block_K, AttentionMass(stride).scores(inputs))
    assert torch.equal(target_scores("interaction", inputs, stride).block_K, Interaction().scores(inputs))


def test_mass_of_loss_rows_counts_queries_of_supervised_blocks_only():
    layout = _layout(160, supervised=(slice(100, 101),))  # one row makes block 6, rows 96 to 111
    inputs = _inputs(layout)
    p = _probability(inputs, slice(0, 160)).mean(0)[96:112]
    expected = p.unflatten(1, (10, BLOCK)).sum(-1).mean(0)
    found = target_scores("mass_loss_rows", inputs)
    torch.testing.assert_close(found.block_K[:6], expected[:6])
    torch.testing.assert_close(found.block_K[6], p[:, 96:112].sum() / 16)
    assert (found.block_K[7:] == 0).all()
    assert found.known_N.tolist() == [True] * 112 + [False] * 48
    everything = dataclasses.replace(inputs, layout=_layout(160))
    torch.testing.assert_close(
        target_scores("mass_loss_rows", everything).block_K, target_scores("attention_mass", everything).block_K
    )


def test_detrending_takes_the_place_out_and_values_weigh():
    layout = _layout(320)
    flat = ScoreInputs(
        layout,
        query_HND=torch.zeros(2, 320, 4),
        key_GND=torch.zeros(1, 320, 4),
        scaling=1.0,
        value_GND=torch.cat([torch.ones(1, 160, 4), 2 * torch.ones(1, 160, 4)], 1) / 2,
    )
    for stride in (1, 4):
        plain, detrended = (target_scores(n, flat, stride) for n in ("attention_mass", "mass_detrended"))
        torch.testing.assert_close(detrended.block_K, torch.ones(20), rtol=1e-4, atol=0)
        assert plain.block_K.max() / plain.block_K.min() > 2, "under uniform attention plain mass is all position"
        weighed = target_scores("mass_times_value", flat, stride).block_K / plain.block_K
        torch.testing.assert_close(weighed, torch.cat([torch.ones(10), 2 * torch.ones(10)]))
    rows = target_scores("mass_detrended", flat).row_NH
    assert float(rows[:300].std()) < 1e-3 < float(target_scores("attention_mass", flat).row_NH[:300].std())


@pytest.mark.parametrize("limit_bytes", [1 << 28, 20_000])
def test_peak_is_the_largest_mean_of_a_distant_block(limit_bytes):
    inputs = _inputs(_layout(150))
    p = torch.nn.functional.pad(_probability(inputs, slice(0, 150)), (0, 10))
    means = torch.stack([p[:, m * BLOCK : (m + 1) * BLOCK].mean(1) for m in range(10)])  # (query block, H, T)
    expected = torch.zeros(10)
    for n in range(10):
        for m in range(n + 2, 10):
            expected[n] = max(expected[n], means[m].mean(0)[n * BLOCK : (n + 1) * BLOCK].sum())
    found = PeakTarget().scores(inputs, 1, limit_bytes)
    torch.testing.assert_close(found.block_K, expected)
    rows = torch.stack([means[k // BLOCK + 2 :, :, k].amax(0) for k in range(128)])
    torch.testing.assert_close(found.row_NH[:128].exp(), rows, rtol=1e-3, atol=1e-6)
    assert found.known_N.tolist() == [True] * 128 + [False] * 22


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_block_that_late_queries_need_ranks_high_in_blocks_and_rows(name):
    inputs = _inputs(_layout(160, supervised=(slice(128, 144),)))
    query, key = inputs.query_HND.clone(), inputs.key_GND.clone()
    key[:, 32:48] = 0.0
    key[:, 32:48, 0] = 10.0
    query[:, 128:144] = 0.0
    query[:, 128:144, 0] = 10.0
    before = target_scores(name, inputs, 4)
    after = target_scores(name, dataclasses.replace(inputs, query_HND=query, key_GND=key), 4)
    assert after.block_K[2] > before.block_K[2]
    inside, outside = after.row_NH[32:48].mean(), after.row_NH[48:112].mean()
    assert inside > outside + (before.row_NH[32:48].mean() - before.row_NH[48:112].mean())
    if name == "mass_loss_rows":
        assert after.block_K.argmax() == 2 and after.block_K[2] > 0.9


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_packed_document_scores_as_it_does_alone(name):
    packed = _inputs(_layout(70, 90, supervised=(slice(40, 50), slice(120, 125)), padding=6))
    found = target_scores(name, packed, 4)
    assert found.row_NH.shape == (166, HEADS) and not found.known_N[160:].any()
    blocks, rows = [], []
    for at, supervised in ((slice(0, 70), slice(40, 50)), (slice(70, 160), slice(50, 55))):
        layout = _layout(at.stop - at.start, supervised=(supervised,))
        parts = (packed.query_HND[:, at], packed.key_GND[:, at], packed.value_GND[:, at])
        alone = ScoreInputs(layout, query_HND=parts[0], key_GND=parts[1], scaling=0.35, value_GND=parts[2])
        scores = target_scores(name, alone, 4)
        blocks.append(scores.block_K)
        rows.append(scores.row_NH)
        assert torch.equal(scores.known_N, found.known_N[at])
    torch.testing.assert_close(found.block_K, torch.cat(blocks), rtol=1e-5, atol=1e-6)
    if name != "interaction":  # whose floor is a share of the batch's mean
        torch.testing.assert_close(found.row_NH[:160], torch.cat(rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", [MassTarget(), MassTarget(loss_rows=True), MassTarget(detrended=True), PeakTarget()])
def test_the_slice_changes_nothing(target):
    inputs = _inputs(_layout(100, supervised=(slice(60, 70),)))
    whole, sliced = target.scores(inputs, 2), target.scores(inputs, 2, limit_bytes=5000)
    torch.testing.assert_close(whole.block_K, sliced.block_K)
    torch.testing.assert_close(whole.row_NH, sliced.row_NH, rtol=1e-4, atol=1e-4)
