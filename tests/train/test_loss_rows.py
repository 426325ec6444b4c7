"""LossRows: supervised rows are whole blocks, the share holds, the draw depends on seed, sample and epoch only."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lemo.errors import ConfigError, LabelsError
from lemo.runtime.batch import read_layout, supervised_rows
from lemo.train.block_losses import BlockLosses
from lemo.train.collate import WindowCollator, WindowDataset
from lemo.train.loss_rows import LossRows, draw_by_chance, draw_chances
from lemo.train.windows import Window

PLACEMENTS = ["random", "spread", "tail"]


def sample(name, *lengths):
    total = sum(lengths)
    return WindowDataset([Window(name, np.arange(total) % 50 + 3, lengths=tuple(lengths))])[0]


def supervised_blocks(batch, block_size):
    """(layout, blocks with a supervised row), after checking that they are supervised as a whole."""
    rows_BT = supervised_rows(batch)
    layout = read_layout(batch, rows_BT, block_size)
    rows_N = rows_BT.reshape(-1)
    last_of_document = layout.document_start_D + layout.document_length_D - 1
    for block in layout.supervised_K.nonzero().squeeze(-1).tolist():
        start, length = int(layout.block_start_K[block]), int(layout.block_length_K[block])
        rows = torch.arange(start, start + length)
        # A document's last row predicts nothing.
        rows = rows[~torch.isin(rows, last_of_document)]
        assert rows_N[rows].all()
    assert not rows_N[layout.block_of_row_N < 0].any()
    return layout, layout.supervised_K


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=5),
    other=st.integers(2, 90),
    share=st.sampled_from([0.1, 0.25, 0.4, 0.5, 0.9]),
    placement=st.sampled_from(PLACEMENTS),
    side=st.sampled_from(["right", "left"]),
    block_size=st.sampled_from([1, 4, 8]),
)
def test_supervised_rows_are_whole_blocks_and_the_share_holds(lengths, other, share, placement, side, block_size):
    features = [sample("a", *lengths), sample("b", other)]
    plain = WindowCollator(side=side)
    before, all_blocks = supervised_blocks(plain(features), block_size)
    rows = LossRows(plain, share, placement, seed=3, block_size=block_size)
    batch = rows(features)
    _, drawn = supervised_blocks(batch, block_size)
    assert not (drawn & ~all_blocks).any()
    sequence = before.block_start_K // batch["labels"].shape[1]
    for b in range(2):
        total, count = int(all_blocks[sequence == b].sum()), int(drawn[sequence == b].sum())
        assert count >= 1
        assert abs(count - share * total) < 1
    full = plain(features)["labels"]
    kept = batch["labels"] != -100
    assert torch.equal(batch["labels"][kept], full[kept])
    for key in set(batch) - {"labels"}:
        assert torch.equal(batch[key], plain(features)[key])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_draw_is_a_function_of_seed_sample_and_epoch(placement):
    a, b = sample("a", 128), sample("b", 128)

    def labels(seed, epoch, *features):
        rows = LossRows(WindowCollator(), 0.4, placement, seed=seed, block_size=8)
        rows.set_epoch(epoch)
        return rows(features)["labels"]

    alone, together = labels(1, 0, a), labels(1, 0, b, a)
    assert torch.equal(alone[0], together[1])
    assert torch.equal(labels(1, 0, a), alone)
    if placement == "random":
        assert not torch.equal(together[0], together[1])
        assert not torch.equal(labels(2, 0, a), alone)
        assert not torch.equal(labels(1, 1, a), alone)
    if placement == "tail":
        assert torch.equal(labels(2, 5, a), alone)


def test_every_block_is_drawn_over_epochs():
    rows = LossRows(WindowCollator(), 0.25, "random", block_size=8)
    seen = torch.zeros(16, dtype=torch.bool)
    for epoch in range(30):
        rows.set_epoch(epoch)
        seen |= supervised_blocks(rows([sample("a", 128)]), 8)[1]
    assert seen.all()


def test_spread_leaves_even_gaps_and_tail_takes_each_documents_end():
    _, drawn = supervised_blocks(LossRows(WindowCollator(), 0.25, "spread", block_size=8)([sample("a", 256)]), 8)
    gaps = drawn.nonzero().squeeze(-1).diff()
    assert gaps.tolist() == [4] * 7
    _, drawn = supervised_blocks(LossRows(WindowCollator(), 0.5, "tail", block_size=8)([sample("a", 64, 32)]), 8)
    assert drawn.tolist() == [False] * 4 + [True] * 4 + [False] * 2 + [True] * 2


def test_count_of_labels_is_the_count_of_supervised_rows():
    batch = LossRows(WindowCollator(), 0.5, block_size=8)([sample("a", 64)])
    assert (batch["labels"] != -100).sum() == (batch["labels"][:, 1:] != -100).sum() == supervised_rows(batch).sum()


def test_labels_masked_before_stay_masked():
    window = Window("a", np.arange(64) + 3, np.arange(64) >= 40, (64,))
    batch = LossRows(WindowCollator(), 0.5, "random", block_size=8)([WindowDataset([window])[0]])
    kept = (batch["labels"][0] != -100).nonzero().squeeze(-1)
    assert kept.min() >= 40
    # Rows 39..62 predict the learned tokens: blocks 4..7 hold them, two of the four are drawn.
    assert len(set(((kept - 1) // 8).tolist())) == 2


def test_shift_labels_are_masked_by_row():
    def collator(features):
        tokens = torch.arange(32)[None]
        return {"input_ids": tokens, "shift_labels": tokens.clone()}

    kept = LossRows(collator, 0.5, block_size=8)([{"input_ids": list(range(32))}])["shift_labels"][0] != -100
    assert kept.reshape(4, 8).all(1).sum() == 2
    assert kept.sum() == 16


def test_padding_free_batch_is_cut_by_documents():
    def collator(features):
        ids = torch.tensor([token for f in features for token in f["input_ids"]])[None]
        positions = torch.cat([torch.arange(len(f["input_ids"])) for f in features])[None]
        return {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions}

    features = [{"input_ids": list(range(3, 36))}, {"input_ids": list(range(3, 23))}]
    batch = LossRows(collator, 0.5, block_size=8)(features)
    layout, drawn = supervised_blocks(batch, 8)
    # 33 rows make five blocks of which the last has one row, which predicts nothing; 20 rows make three.
    assert len(layout.block_start_K) == 8
    assert drawn.sum() == round(0.5 * 7)


def test_evaluation_and_full_share_keep_all_labels():
    rows = LossRows(WindowCollator(), 0.3, block_size=8)
    full = WindowCollator()([sample("a", 64)])["labels"]
    with rows.all_labels():
        assert torch.equal(rows([sample("a", 64)])["labels"], full)
    assert not torch.equal(rows([sample("a", 64)])["labels"], full)
    assert torch.equal(LossRows(WindowCollator(), 1.0)([sample("a", 64)])["labels"], full)


def test_other_packages_collators_work():
    from transformers import DataCollatorForLanguageModeling

    from tests.train.tiny import byte_tokenizer

    collator = DataCollatorForLanguageModeling(byte_tokenizer(), mlm=False)
    features = [{"input_ids": list(range(3, 67)), "sample_id": "a"}, {"input_ids": list(range(3, 40))}]
    batch = LossRows(collator, 0.5, block_size=8)(features)
    _, drawn = supervised_blocks(batch, 8)
    assert drawn.sum() == 4 + 2
    assert "sample_id" not in batch


@pytest.mark.parametrize(
    "wrong",
    [
        {"share": 0},
        {"share": 1.1},
        {"share": True},
        {"placement": "first"},
        {"block_size": 0},
        {"placement": "hardest"},
        {"placement": "tail", "reweight": True},
    ],
)
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        LossRows(WindowCollator(), **wrong)


def test_a_batch_without_labels_is_refused():
    with pytest.raises(LabelsError, match="without labels"):
        LossRows(lambda features: {"input_ids": torch.ones(1, 4)}, 0.5)([{"input_ids": [1]}])


class _Listed:
    """A generator whose draws are given."""

    def __init__(self, order, offset):
        self.order, self.offset = np.asarray(order), offset

    def permutation(self, count):
        assert count == len(self.order)
        return self.order

    def random(self):
        return self.offset


def _all_draws(blocks, offsets):
    for order in itertools.permutations(range(blocks)):
        for step in range(offsets):
            yield _Listed(order, (step + 0.5) / offsets)


def test_chances_add_up_and_follow_the_losses():
    chance = draw_chances(torch.tensor([4.0, 2.0, 2.0, 2.0]), 2)
    assert chance.tolist() == pytest.approx([0.8, 0.4, 0.4, 0.4])
    capped = draw_chances(torch.tensor([50.0, 1.0, 1.0, 2.0]), 2)
    assert capped[0] == 1 and float(capped.sum()) == pytest.approx(2) and (capped[1:] < 1).all()
    assert draw_chances(torch.zeros(3), 3).tolist() == [1, 1, 1]
    floor = draw_chances(torch.tensor([1.0, 1.0, 0.0, 2.0]), 1)
    assert float(floor[2]) == pytest.approx(0.25 / 4.25)
    for count in range(1, 8):
        chance = draw_chances(torch.rand(7, generator=torch.Generator().manual_seed(count)) ** 4, count)
        assert float(chance.sum()) == pytest.approx(count) and chance.min() > 0 and chance.max() <= 1


def test_each_block_is_drawn_with_its_chance():
    chance = torch.tensor([0.8, 0.4, 0.4, 0.4], dtype=torch.float64)
    counts = torch.zeros(4)
    for generator in _all_draws(4, 5):
        chosen = draw_by_chance(chance, generator)
        assert len(set(chosen.tolist())) == 2
        counts[chosen] += 1
    assert (counts / (24 * 5)).tolist() == pytest.approx(chance.tolist())


def _four_blocks():
    """28 rows in four blocks of 8, the last of 4 rows with 3 of loss; two rows of block 1 are not learned."""
    learned = np.ones(28, dtype=bool)
    learned[[10, 11]] = False
    return WindowDataset([Window("a", np.arange(28) + 3, learned, (28,))])[0]


@pytest.mark.parametrize("placement", ["random", "spread", "hardest"])
def test_the_weighted_loss_is_unbiased_over_all_draws(placement, monkeypatch):
    losses = torch.tensor([4.0, 2.0, 2.0, 2.0])
    made = LossRows(WindowCollator(), 0.5, placement, block_size=8, reweight=True, block_losses=lambda feature: losses)
    row_loss = torch.rand(28, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    everything = supervised_rows(WindowCollator()([_four_blocks()]))[0]
    estimates, plain = [], []
    for generator in _all_draws(4, 5 if placement == "hardest" else 4):
        monkeypatch.setattr(np.random, "default_rng", lambda seed, generator=generator: generator)
        batch = made([_four_blocks()])
        kept, weights = supervised_rows(batch)[0], batch["loss_weights"][0].double()
        assert (weights[~kept] == 0).all() and (weights[kept] > 0).all()
        num_items = (batch["labels"] != -100).sum()  # as the Trainer counts
        estimates.append(float((row_loss * weights).sum() / num_items))
        plain.append(float(row_loss[kept].mean()))
    wanted = float(row_loss[everything].mean())
    assert np.mean(estimates) == pytest.approx(wanted, rel=1e-6)
    if placement == "hardest":
        assert np.mean(plain) != pytest.approx(wanted, rel=1e-3), "without weights it is biased"


def test_equal_chances_and_blocks_need_no_weights():
    batch = LossRows(WindowCollator(), 0.25, "random", block_size=8, reweight=True)([sample("a", 129)])
    kept = supervised_rows(batch)
    # The last block has one row, which predicts nothing: sixteen equal blocks.
    torch.testing.assert_close(batch["loss_weights"][kept], torch.ones(int(kept.sum())))


def test_hardest_takes_the_blocks_of_the_highest_loss_of_each_sample():
    given = {"a": torch.tensor([1.0, 5.0, 2.0, 4.0]), "b": torch.tensor([3.0, 0.0])}

    def losses(feature):
        return given[feature["sample_id"]]

    rows = LossRows(WindowCollator(), 0.5, "hardest", block_size=8, block_losses=losses)
    _, drawn = supervised_blocks(rows([sample("a", 32), sample("b", 16)]), 8)
    assert drawn.tolist() == [False, True, False, True, True, False]
    with pytest.raises(ConfigError, match="2 losses for a sequence of 3 blocks"):
        rows([sample("b", 20)])


def test_block_losses_are_those_of_the_base_model_and_are_taken_once():
    from peft import LoraConfig, get_peft_model

    from tests.train.tiny import tiny_llama

    torch.manual_seed(0)
    base = tiny_llama(layers=2).train()
    feature, short = sample("a", 30, 10), sample("b", 24)
    batch = WindowCollator()([feature])
    labels = batch["labels"].clone()
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "seq_idx")}
    logits = base(**inputs, use_cache=False).logits[0, :-1]
    rows = torch.nn.functional.cross_entropy(logits, labels[0, 1:].clamp_min(0), reduction="none").detach()
    rows = torch.where(labels[0, 1:] != -100, rows, torch.nan)
    expected = [float(rows[a:b].nanmean()) for a, b in ((0, 8), (8, 16), (16, 24), (24, 30), (30, 38), (38, 40))]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    losses = BlockLosses(model, WindowCollator(), 8)
    found = losses(feature)
    assert found.tolist() == pytest.approx(expected, rel=1e-4) and model.training
    assert losses(feature) is found and losses(short).shape == (3,)


def test_an_attached_model_weighs_rows():
    import lemo
    from lemo.core.plan import Plan
    from tests.train.tiny import tiny_llama

    torch.manual_seed(0)
    model = tiny_llama(layers=2).train()
    losses = BlockLosses(model, WindowCollator(), 8)
    rows = LossRows(WindowCollator(), 0.5, "hardest", block_size=8, reweight=True, block_losses=losses)
    batch = rows([sample("a", 64)])
    weights, labels = batch["loss_weights"][0], batch["labels"][0]
    logits = model(batch["input_ids"]).logits[0, :-1]
    each = torch.nn.functional.cross_entropy(logits, labels[1:].clamp_min(0), reduction="none")
    expected = (each * weights[:-1]).sum() / 7
    wanted = torch.autograd.grad(expected, model.lm_head.weight)[0]
    with lemo.attach(model, Plan.uniform(2, forward_ratio=1.0, backward_ratio=1.0, block_size=8)):
        loss = model(**batch, num_items_in_batch=7).loss
        torch.testing.assert_close(loss, expected)
        loss.backward()
        torch.testing.assert_close(model.lm_head.weight.grad, wanted, rtol=1e-4, atol=1e-6)
    with (
        lemo.attach(model, Plan.uniform(2, forward_ratio=1.0, backward_ratio=1.0), loss="model"),
        pytest.raises(ConfigError, match="segmented"),
    ):
        model(**batch)


@pytest.mark.parametrize("placement", ["random", "spread"])
@pytest.mark.parametrize(
    "total, share, span", [(32, 0.25, 4), (32, 0.25, 8), (33, 0.3, 4), (32, 0.1, 16), (8, 1 / 8, 8)]
)
def test_spans_are_whole_runs_on_a_circle(placement, total, share, span):
    rows = LossRows(WindowCollator(), share, placement, block_size=8, span=8 * span)
    count, seen = round(share * total), torch.zeros(total)
    for epoch in range(400):
        rows.set_epoch(epoch)
        drawn = supervised_blocks(rows([sample("a", 8 * total)]), 8)[1]
        assert drawn.sum() == count
        starts = (drawn & ~drawn.roll(1)).sum()
        assert starts <= -(-count // span), "no more runs than the count needs"
        seen += drawn
    # Every block has the same chance: within five standard deviations of a binomial count.
    chance = count / total
    assert (seen / 400 - chance).abs().max() < 5 * (chance * (1 - chance) / 400) ** 0.5


def test_span_must_fit_blocks_and_placement():
    for wrong in ({"span": 12}, {"span": 0}, {"span": 16, "placement": "tail"}):
        with pytest.raises(ConfigError, match="span"):
            LossRows(WindowCollator(), 0.5, block_size=8, **wrong)
