"""What the methods of others do beyond settings of a plan, against references written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.rivals import attention_only, shifted_groups
from benchmarks.rivals.oracle import Oracle, with_oracle
from lemo.core.plan import LayerPlan, Plan
from lemo.core.predictor import PatternPredictor
from lemo.core.target import TARGETS
from lemo.runtime.attach import attach
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


def test_an_oracle_sees_the_layers_own_queries_and_keys():
    from lemo.runtime.stream import LayerStream

    torch.manual_seed(0)
    model = tiny_llama(layers=2).eval()
    ids = torch.randint(3, 250, (2, 96))
    stream = LayerStream.open(model, ids, block_size=16)
    trace = stream.dense(0, stream.hidden_BTM, ("attention",))
    oracle = Oracle(model, model.model.layers[0], "attention_mass")
    query, key, value, scaling = oracle._project(stream.hidden_BTM.flatten(0, 1), stream.layout)
    torch.testing.assert_close(query, trace.query_HND)
    torch.testing.assert_close(key, trace.key_GND)
    torch.testing.assert_close(value, trace.value_GND)
    assert scaling == pytest.approx(trace.scaling)
    plan = with_oracle(Plan.uniform(2, forward_ratio=0.5, backward_ratio=0.5), model, "attention_mass")
    assert all(isinstance(x.predictor, Oracle) for x in plan.layers)
    for target in TARGETS:
        scores = replace(oracle, target=target).scores(stream.hidden_BTM.flatten(0, 1), stream.layout)
        assert scores.shape == (12,) and scores.isfinite().all()


def test_one_predictor_chooses_for_all_layers():
    """The rows of the first layer that skips, in every layer that skips, anew in every batch."""
    torch.manual_seed(0)
    model = tiny_llama(layers=4).train()
    layers = tuple(LayerPlan(0.5, 0.5, predictor=PatternPredictor(model.config.hidden_size)) for _ in range(3))
    plan = Plan((LayerPlan(1.0, 1.0), *layers), block_size=8, scorer="predictor", kv="all")
    found = []
    with attach(model, with_oracle(plan, model, "first_layer"), self_test=False, unsafe_no_bypass=True) as handle:
        for seed in (1, 2):
            ids = torch.randint(3, 250, (1, 128), generator=torch.Generator().manual_seed(seed))
            labels = torch.where(torch.arange(128) >= 120, ids, -100)
            model(input_ids=ids, labels=labels)
            rows = [handle.selections[i].forward.chosen() for i in (1, 2, 3)]
            assert all(torch.equal(rows[0], other) for other in rows[1:])
            found.append(rows[0])
    assert not torch.equal(*found)
