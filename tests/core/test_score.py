"""Laws of scorers: each equals its definition written out, and packing changes nothing."""

from dataclasses import replace

import pytest
import torch

from lemo.core.layout import Layout
from lemo.core.predictor import PatternPredictor
from lemo.core.score import (
    AttentionMass,
    Fixed,
    Interaction,
    Random,
    Recent,
    ScoreInputs,
    UpdateNorm,
    Words,
    mlp_scores,
    scorer_named,
)
from lemo.errors import ConfigError

HEADS, GROUPS, DIM = 4, 2, 6


def _layout(*lengths, padding=0, block_size=8):
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)] + [torch.full((padding,), -1)])
    return Layout.build(ids[None], None, block_size=block_size)


def _inputs(*lengths, padding=0, seed=0, **changes):
    torch.manual_seed(seed)
    rows = sum(lengths) + padding
    fields = {
        "x_NM": torch.randn(rows, 10),
        "query_HND": torch.randn(HEADS, rows, DIM),
        "key_GND": torch.randn(GROUPS, rows, DIM),
        "scaling": 0.4,
        "output_NM": torch.randn(rows, 10),
    }
    return ScoreInputs(_layout(*lengths, padding=padding), **{**fields, **changes})


def _logits(inputs):
    key = inputs.key_GND.repeat_interleave(HEADS // GROUPS, 0)
    logits = torch.einsum("hid,hjd->hij", inputs.query_HND, key) * inputs.scaling
    document = inputs.layout.document_of_row_N
    index = torch.arange(len(document))
    allowed = (document[:, None] == document) & (document >= 0) & (index[:, None] >= index)
    return logits, allowed


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("lengths", [(40,), (23, 17)])
def test_attention_mass_is_the_mean_probability(lengths, stride):
    inputs = _inputs(*lengths, padding=4)
    layout = inputs.layout
    logits, allowed = _logits(inputs)
    probability = logits.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num().mean(0)
    expected = []
    for start, length, document in zip(
        layout.block_start_K.tolist(), layout.block_length_K.tolist(), layout.block_document_K.tolist(), strict=True
    ):
        end = int(layout.document_start_D[document] + layout.document_length_D[document])
        rows = [i for i in range(start, end) if (end - 1 - i) % stride == 0]
        expected.append(probability[rows, start : start + length].sum() / len(rows))
    result = AttentionMass(query_stride=stride).scores(inputs)
    torch.testing.assert_close(result, torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_attention_mass_does_not_depend_on_the_slice():
    inputs = _inputs(40)
    small = AttentionMass(limit_bytes=2000).scores(inputs)
    torch.testing.assert_close(small, AttentionMass().scores(inputs))


@pytest.mark.parametrize("lengths", [(40,), (23, 17)])
def test_interaction_is_the_papers_formula(lengths):
    inputs = _inputs(*lengths, padding=4)
    layout = inputs.layout
    logits, allowed = _logits(inputs)
    s = logits.relu().mean(0) * allowed
    starts, sizes = layout.block_start_K.tolist(), layout.block_length_K.tolist()
    expected = []
    for n, document in enumerate(layout.block_document_K.tolist()):
        pairs = [
            s[starts[m] : starts[m] + sizes[m], starts[n] : starts[n] + sizes[n]].max()
            for m in range(n, len(starts))
            if layout.block_document_K[m] == document
        ]
        expected.append(torch.stack(pairs).mean())
    torch.testing.assert_close(Interaction().scores(inputs), torch.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scorer", [AttentionMass(), Interaction(), Random(3), UpdateNorm(), scorer_named("position")])
def test_a_packed_document_scores_as_it_does_alone(scorer):
    packed = _inputs(23, 17)
    parts = []
    for rows in (slice(0, 23), slice(23, 40)):
        alone = ScoreInputs(
            _layout(rows.stop - rows.start),
            packed.x_NM[rows],
            packed.query_HND[:, rows],
            packed.key_GND[:, rows],
            packed.scaling,
            packed.output_NM[rows],
        )
        parts.append(scorer.scores(alone))
    torch.testing.assert_close(scorer.scores(packed), torch.cat(parts), rtol=1e-5, atol=1e-6)


def test_random_depends_on_seed_layer_step_and_document_only():
    inputs = _inputs(400)
    base = Random(1).scores(inputs)
    assert torch.equal(base, Random(1).scores(_inputs(400, seed=7)))
    others = [
        Random(2).scores(inputs),
        Random(1).scores(_inputs(400, layer=1)),
        Random(1).scores(_inputs(400, step=1)),
        Random(1).scores(_inputs(400, document_keys_D=torch.tensor([99]))),
    ]
    for i, draw in enumerate([base, *others]):
        assert float(draw.min()) >= 0 and float(draw.max()) < 1
        assert all(not torch.equal(draw, other) for other in others[i:])


def test_random_is_uniform_and_uncorrelated_across_layers():
    layout = Layout.build(torch.zeros(1, 4096, dtype=torch.int64), None, block_size=1)
    draws = torch.stack([Random(0).scores(ScoreInputs(layout, layer=layer)) for layer in range(4)])
    assert abs(float(draws.mean()) - 0.5) < 0.02 and abs(float(draws.var()) - 1 / 12) < 0.01
    off_diagonal = torch.corrcoef(draws) - torch.eye(4)
    assert float(off_diagonal.abs().max()) < 0.08


def test_mlp_scores_pool_the_norm():
    layout, norm = _layout(11), torch.rand(11)
    torch.testing.assert_close(mlp_scores(norm, layout), torch.stack([norm[:8].mean(), norm[8:].mean()]))
    torch.testing.assert_close(mlp_scores(norm, layout, "max"), torch.stack([norm[:8].max(), norm[8:].max()]))


def test_names_and_missing_inputs():
    predictor = PatternPredictor(10, pooled_features=4, rank=2)
    inputs = _inputs(40)
    named = scorer_named("predictor", predictor=predictor).scores(inputs)
    assert torch.equal(named, predictor.scores(inputs.x_NM, inputs.layout))
    assert torch.equal(Fixed(named).scores(inputs), named)
    with pytest.raises(ConfigError, match="predictor"):
        scorer_named("predictor")
    with pytest.raises(ConfigError, match="scorer must be"):
        scorer_named("atention_mass")
    with pytest.raises(ConfigError, match="query_HND"):
        AttentionMass().scores(ScoreInputs(inputs.layout))


def test_recent_counts_blocks_to_the_next_loss_of_the_same_document():
    ids = torch.cat([torch.zeros(40), torch.ones(24)])[None].long()
    supervised = torch.zeros(1, 64, dtype=torch.bool)
    supervised[0, [17, 25]] = True  # blocks 2 and 3 of the first document, none of the second
    layout = Layout.build(ids, supervised, block_size=8)
    scores_K = Recent().scores(ScoreInputs(layout))
    assert scores_K.dtype == torch.float32
    assert scores_K[:4].tolist() == [-2, -1, 0, 0]
    assert scores_K[4] < -2, "nothing with loss follows: last"
    assert scores_K[5:].diff().gt(0).all(), "without loss later blocks come first"
    assert scorer_named("recent") == Recent()


def _asking(ids_BT, labelled, *, documents=None, local=None, block_size=4):
    """Layout of token ids with labelled tokens, whose rows are those before them."""
    documents = torch.zeros_like(ids_BT) if documents is None else documents
    supervised = torch.zeros_like(ids_BT, dtype=torch.bool)
    supervised[0, [t - 1 for t in labelled]] = True
    local_BT = None
    if local is not None:
        local_BT = torch.zeros_like(supervised)
        local_BT[0, local], supervised[0, local] = True, True
    layout = Layout.build(documents, supervised, block_size=block_size, local_BT=local_BT)
    return replace(layout, ids_BT=ids_BT)


def _filler(tokens=64):
    return torch.arange(tokens).remainder(5).add(10)[None]


def test_words_rank_blocks_by_how_rare_their_share_in_the_question_is():
    ids = _filler()
    ids[0, [9, 21]], ids[0, 40], ids[0, 30] = 50, 51, 52
    ids[0, 56:] = torch.tensor([53, 50, 53, 54, 55, 51, 56, 57])  # asks for 50; 51 is answered; 52 by nobody
    asking = ScoreInputs(_asking(ids, [60, 61, 62, 63]))
    scores_K = Words(4, beside_rows=0).scores(asking)
    best = scores_K.argsort(descending=True).tolist()
    # Rows 56 to 63 are asked or answered; then come both 50 in the order of Recent.
    assert set(best[:2]) == {14, 15} and best[2:4] == [5, 2]
    assert scores_K[10] < 1e-3, "what is answered chooses no rows"
    assert scores_K[7] < 1e-3, "rare, but nobody asks"
    assert Words(4, beside_rows=0, answered=True).scores(asking).argsort(descending=True)[:5].tolist()[2:] == [10, 5, 2]
    assert scorer_named("words") == Words()


def test_chains_are_followed_in_rounds():
    """The question names 50, beside which stands 51, which stands elsewhere beside 52."""
    ids = _filler(128)
    ids[0, [21, 22]], ids[0, [61, 62]], ids[0, 100] = torch.tensor([50, 51]), torch.tensor([51, 52]), 52
    ids[0, 126] = 50
    asking = ScoreInputs(_asking(ids, [127]))
    found = {n: Words(1, beside_rows=1, rounds=n).scores(asking) for n in (1, 2, 3)}
    kept = {n: [k for k in range(31) if scores_K[k] >= 0.1] for n, scores_K in found.items()}
    assert kept == {1: [5], 2: [5, 15], 3: [5, 15, 25]}
    assert found[3][5] > found[3][15] > found[3][25]


def test_a_block_answers_for_what_stands_right_beside_it():
    ids = _filler()
    ids[0, 23], ids[0, 62] = 50, 50  # the last row of block 5; the question
    asking = ScoreInputs(_asking(ids, [63]))
    alone_K, beside_K = (Words(1, beside_rows=rows).scores(asking) for rows in (0, 2))
    assert alone_K[4:8].tolist() == pytest.approx([0, 1, 0, 0], abs=1e-3)
    assert beside_K[4:8].tolist() == pytest.approx([0, 1, 0.5, 0], abs=1e-3)
    documents = (torch.arange(64) >= 24).long()[None]
    other_K = Words(1, beside_rows=2).scores(ScoreInputs(_asking(ids, [63], documents=documents)))
    assert other_K[5:7].abs().max() < 1e-2, "what stands in another document"


def test_words_fall_back_on_recent_and_need_token_ids():
    silent = _asking(_filler(), [])
    ranks = [s.scores(ScoreInputs(silent)).argsort() for s in (Words(), Recent())]
    assert ranks[0].equal(ranks[1]), "nothing is asked"
    strange = _asking(torch.arange(64)[None] + 10, [63])
    ranks = [s.scores(ScoreInputs(strange)).argsort()[:-1] for s in (Words(1, beside_rows=0), Recent())]
    assert ranks[0].equal(ranks[1]), "no word of the question occurs before it"
    with pytest.raises(ConfigError, match=r"'words' needs input_ids"):
        Words().scores(ScoreInputs(replace(silent, ids_BT=None)))


def test_words_of_a_document_are_not_asked_by_its_neighbour():
    ids, documents = _filler(), torch.zeros(1, 64, dtype=torch.int64)
    documents[0, 32:] = 1
    ids[0, 5], ids[0, 40], ids[0, 61] = 50, 50, 50
    apart = Words(2, beside_rows=0).scores(ScoreInputs(_asking(ids, [62, 63], documents=documents)))
    alone = Words(2, beside_rows=0).scores(ScoreInputs(_asking(ids[:, 32:], [30, 31])))
    torch.testing.assert_close(apart[8:], alone, atol=1e-3, rtol=0)
    assert apart[1] < 1e-3 and apart[10] > 0.9


def test_local_rows_of_prompts_ask_nothing():
    ids = _filler()
    ids[0, [9, 25]], ids[0, 61] = 50, 51
    plain = Words(2, beside_rows=0).scores(ScoreInputs(_asking(ids, [62, 63])))
    local = Words(2, beside_rows=0).scores(ScoreInputs(_asking(ids, [62, 63], local=list(range(8, 12)))))
    torch.testing.assert_close(local, plain, atol=1e-3, rtol=0)
