"""What the methods of others do beyond settings of a plan, against references written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.rivals import attention_only, shifted_groups
from benchmarks.rivals.oracle import MASS_TARGETS, Oracle, Traced, with_oracle
from lemo.core.layout import Layout
from lemo.core.plan import Plan
from lemo.core.score import AttentionMass, ScoreInputs
from tests.train.tiny import tiny_llama


class _Fixed:
    """A predictor that ranks the first blocks highest."""

    def scores(self, x_NM, layout):
        return -torch.arange(len(layout.block_start_K), dtype=torch.float32)


def test_shifted_groups_attend_inside_groups_only():
    from benchmarks.rivals.shifted_groups import attention, group_edges

    torch.manual_seed(0)
    tokens, heads = 32, 5
    query, key, value = (torch.randn(2, h, tokens, 8) for h in (heads, 1, 1))
    output, _ = attention(None, query, key, value, None, scaling=0.3)
    place = torch.arange(tokens)
    for head in range(heads):
        edges = torch.tensor(group_edges(tokens, shifted=head >= heads // 2))
        group = torch.bucketize(place, edges, right=True)
        seen = (place[:, None] >= place) & (group[:, None] == group)
        weights = (query[:, head] @ key[:, 0].mT * 0.3).masked_fill(~seen, -torch.inf).softmax(-1)
        torch.testing.assert_close(output[:, :, head], weights @ value[:, 0])


def test_longlora_is_in_force_inside_only():
    torch.manual_seed(0)
    model = tiny_llama(layers=2).train()
    ids = torch.randint(3, 250, (1, 64))
    dense = model(ids).logits
    with shifted_groups(model, None):
        grouped = model(ids).logits
    torch.testing.assert_close(grouped[:, :8], dense[:, :8])  # the first half group sees all that is before it
    assert not torch.allclose(grouped[:, 40:], dense[:, 40:], atol=1e-3)
    assert torch.equal(model(ids).logits, dense)


def test_attention_only_drops_keys_and_updates_of_the_other_rows():
    torch.manual_seed(0)
    model = tiny_llama(layers=2).train()
    ids = torch.randint(3, 250, (2, 64))
    dense = model(ids).logits
    plan = Plan.uniform(2, forward_ratio=1.0, backward_ratio=0.5, block_size=16, scorer="predictor")
    plan = replace(plan, layers=tuple(replace(x, predictor=_Fixed()) for x in plan.layers))
    with attention_only(model, plan):
        torch.testing.assert_close(model(ids).logits, dense)
    half = replace(plan, layers=tuple(replace(x, forward_ratio=0.5) for x in plan.layers))
    updates: list[torch.Tensor] = []
    hook = model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda m, a, out: updates.append(out))
    with attention_only(model, half):
        loss = model(ids, labels=ids).loss
        assert updates[0].shape[1] == 32, "half of the rows attend"
        loss.backward()
        model.eval()
        assert model(ids).logits.shape == dense.shape and updates[1].shape[1] == 64, "evaluation is dense"
    hook.remove()
    assert "forward" not in model.model.layers[1].self_attn.__dict__
    assert torch.equal(model.train()(ids).logits, dense)


@pytest.fixture
def traced() -> Traced:
    torch.manual_seed(0)
    supervised = torch.zeros(160, dtype=torch.bool)
    supervised[128:144] = True
    return Traced(torch.randn(4, 160, 8), torch.randn(2, 160, 8), torch.randn(2, 160, 8), supervised, 16, 0.35)


def test_mass_is_what_predictors_learn_today(traced: Traced):
    layout = Layout.build(torch.zeros(1, 160, dtype=torch.int64), None, block_size=16)
    inputs = ScoreInputs(layout, query_HND=traced.query_HTD, key_GND=traced.key_GTD, scaling=traced.scaling)
    torch.testing.assert_close(MASS_TARGETS["mass"](traced), AttentionMass(query_stride=4).scores(inputs))


@pytest.mark.parametrize(("target", "rises"), [("mass_loss_rows", True), ("mass", True), ("mass_peak", True)])
def test_a_block_that_loss_rows_read_ranks_high(traced: Traced, target: str, rises: bool):
    query, key = traced.query_HTD.clone(), traced.key_GTD.clone()
    key[:, 32:48] = 0.0
    key[:, 32:48, 0] = 10.0
    query[:, 128:144] = 0.0
    query[:, 128:144, 0] = 10.0
    scores = MASS_TARGETS[target](replace(traced, query_HTD=query, key_GTD=key))
    if target == "mass_loss_rows":
        assert scores.argmax() == 2 and scores[2] > 0.9
    assert scores[2] > MASS_TARGETS[target](traced)[2]


def test_detrending_takes_the_place_out():
    flat = Traced(
        torch.zeros(2, 320, 4), torch.zeros(1, 320, 4), torch.ones(1, 320, 4), torch.zeros(320).bool(), 16, 1.0
    )
    plain, detrended = MASS_TARGETS["mass"](flat), MASS_TARGETS["mass_detrended"](flat)
    torch.testing.assert_close(detrended, torch.ones(20))
    assert plain.max() / plain.min() > 2, "under uniform attention today's target is all position"
    doubled = replace(flat, value_GTD=torch.cat([flat.value_GTD[:, :160], 2 * flat.value_GTD[:, 160:]], dim=1))
    weighed = MASS_TARGETS["mass_times_value"](doubled) / MASS_TARGETS["mass_times_value"](flat)
    torch.testing.assert_close(weighed, torch.cat([torch.ones(10), 2 * torch.ones(10)]))


def test_an_oracle_sees_the_layers_own_queries_and_keys():
    from lemo.runtime.stream import LayerStream

    torch.manual_seed(0)
    model = tiny_llama(layers=2).eval()
    ids = torch.randint(3, 250, (2, 96))
    stream = LayerStream.open(model, ids, block_size=16)
    trace = stream.dense(0, stream.hidden_BTM, ("attention",))
    oracle = Oracle(model, model.model.layers[0], "mass")
    query, key, _, scaling = oracle._project(stream.hidden_BTM.flatten(0, 1), stream.layout)
    torch.testing.assert_close(query, trace.query_HND)
    torch.testing.assert_close(key, trace.key_GND)
    assert scaling == pytest.approx(trace.scaling)
    plan = with_oracle(Plan.uniform(2, forward_ratio=0.5, backward_ratio=0.5), model, "mass")
    assert all(isinstance(x.predictor, Oracle) for x in plan.layers)
    for target in (*MASS_TARGETS, "interaction"):
        scores = replace(oracle, target=target).scores(stream.hidden_BTM.flatten(0, 1), stream.layout)
        assert scores.shape == (12,) and scores.isfinite().all()
