"""Laws of refitting: it runs beside an attached plan, follows the weights, and recall is what calibration reports."""

from __future__ import annotations

import dataclasses
from statistics import fmean

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lemo
from lemo.calibrate.refit import predictor_recall, refit_bypass
from lemo.calibrate.session import calibrate
from lemo.calibrate.windows import Window
from lemo.config import CalibrationConfig
from lemo.core.plan import Plan
from lemo.errors import UnsupportedModelError
from lemo.runtime.stream import LayerStream

TOKENS, BLOCK, LAYERS = 96, 8, 3
CONFIG = CalibrationConfig(
    pooled_features=6,
    predictor_width=6,
    predictor_rank=3,
    predictor_steps=12,
    bypass_rank=4,
)


def _window(seed=0, held_out=False):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.rand(1, TOKENS // BLOCK, generator=generator) < 0.25
    ids = torch.randint(0, 50, (1, TOKENS), generator=generator)
    return Window(ids, blocks.repeat_interleave(BLOCK, 1), None, None, "a", held_out)


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, max_position_embeddings=128, **sizes))
    skeleton = Plan.uniform(model, forward_ratio=0.5, backward_ratio=0.5, dense_layers=(0,), block_size=BLOCK)
    batches = [{"input_ids": w.input_ids_BT, "supervised": w.supervised_BT} for w in map(_window, range(3))]
    plan = calibrate(model, batches[:2], CONFIG, plan=skeleton, held_out=batches[2:], progress=False)
    return model, plan


def _moved(model):
    torch.manual_seed(1)
    changed = LlamaForCausalLM(model.config)
    changed.load_state_dict({k: v + 0.02 * torch.randn_like(v) for k, v in model.state_dict().items()})
    return changed


def test_a_stream_beside_an_attached_plan_is_the_same_stream(fitted):
    model, plan = fitted
    model.eval()
    window = _window(5)
    alone = LayerStream.open(model, window.input_ids_BT, supervised_BT=window.supervised_BT, block_size=BLOCK)
    wanted = [alone.sparse(1, alone.hidden_BTM, plan), alone.dense(0, alone.hidden_BTM).output_BTM]
    with lemo.attach(model, plan) as handle:
        with pytest.raises(UnsupportedModelError, match="attached"):
            LayerStream.open(model, window.input_ids_BT)
        beside = LayerStream.open(
            model, window.input_ids_BT, supervised_BT=window.supervised_BT, block_size=BLOCK, attached=True
        )
        found = [beside.sparse(1, beside.hidden_BTM, plan), beside.dense(0, beside.hidden_BTM).output_BTM]
        assert handle.sparse_batches == 0 and not handle.selections
        model.train()
        labels = window.input_ids_BT.masked_fill(torch.arange(TOKENS) < 60, -100)
        model(input_ids=window.input_ids_BT, labels=labels).loss.backward()
        assert handle.sparse_batches == 1
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("aim", ["update", "dense_stream"])
def test_a_refit_follows_the_weights_and_touches_nothing_else(fitted, aim):
    model, plan = fitted
    moved, window = _moved(model).train(), _window(7)
    fresh, explained = refit_bypass(moved, plan, [window], aim=aim, ridge=1e-3)
    _, before = refit_bypass(moved, plan, [window], aim=aim, ridge=1e12)  # held to the old map
    assert moved.training and set(explained) == {1, 2}
    # Layer 1 sees the same rows in both; behind it the streams differ.
    assert explained[1] > before[1] + 0.01
    for old, new in zip(plan.layers, fresh.layers, strict=True):
        assert dataclasses.replace(new, bypass=old.bypass) == old
    assert fresh.layers[1].bypass.rank == plan.layers[1].bypass.rank
    unsafe = dataclasses.replace(plan, fingerprint=None)
    with lemo.attach(moved, unsafe, self_test=False):
        beside, _ = refit_bypass(moved, plan, [window], aim=aim, ridge=1e-3)
    for a, b in zip(fresh.layers[1:], beside.layers[1:], strict=True):
        assert torch.equal(a.bypass.down_MR, b.bypass.down_MR)
    strong, _ = refit_bypass(moved, plan, [window], aim=aim, ridge=1e12)
    old, new = plan.layers[1].bypass, strong.layers[1].bypass
    torch.testing.assert_close(new.down_MR @ new.up_RM, old.down_MR @ old.up_RM, rtol=1e-3, atol=1e-4)


def test_recall_is_what_calibration_reported_until_weights_move(fitted):
    model, plan = fitted
    window = _window(2, held_out=True)
    found = predictor_recall(model, plan, [window], CONFIG)
    assert set(found) == {1, 2}
    reported = plan.provenance["recall"]["sequential"]["text"]["recall_0.3"]
    assert fmean(found.values()) == pytest.approx(reported, abs=1e-6)
    assert predictor_recall(model, plan, [window, window], CONFIG) == found
    everything = dataclasses.replace(window, supervised_BT=torch.ones(1, TOKENS, dtype=torch.bool))
    assert predictor_recall(model, plan, [everything], CONFIG) == {}
