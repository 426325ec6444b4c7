"""Laws of the budget: what is bought fits and buys most, and the plan loses no more than the uniform one."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lemo
from lemo.calibrate import budget
from lemo.calibrate.budget import Point, at_ratio, hull, ratio_of, spend
from lemo.calibrate.session import calibrate
from lemo.config import CalibrationConfig
from lemo.core.plan import LayerPlan, Plan
from lemo.errors import ConfigError
from lemo.measure.flops import DecoderShape, LayerWork, layer_flops
from lemo.train.costs import layer_cost

TOKENS, BLOCK = 128, 8
CONFIG = CalibrationConfig(
    pooled_features=4,
    predictor_width=4,
    predictor_rank=2,
    predictor_steps=4,
    bypass_rank=4,
    allocate="budget",
    target="attention_mass",  # with what loss rows read, no ratios of these three layers beat uniform ones
)


def test_the_hull_is_convex_and_ends_at_the_least_loss():
    points = [Point(0.1, 1, 5), Point(0.2, 2, 4.5), Point(0.3, 3, 2), Point(0.5, 5, 1), Point(1.0, 9, 1.2)]
    assert [p.ratio for p in hull(points)] == [0.1, 0.3, 0.5]
    assert [p.ratio for p in hull(points[::-1])] == [0.1, 0.3, 0.5]
    assert hull(points[:1]) == points[:1]


def _curves(seed):
    generator = torch.Generator().manual_seed(seed)
    curves = {}
    for layer in range(3):
        price, worth = (1 + 4 * torch.rand(2, generator=generator)).tolist()
        curves[layer] = [Point(r, price * r, worth * (1 - r) ** 2) for r in (0.25, 0.5, 1.0)]
    return curves


@pytest.mark.parametrize("seed", range(5))
def test_the_greedy_choice_is_the_best_of_all_on_convex_curves(seed):
    curves = _curves(seed)
    prices = {layer: points[0].cost / points[0].ratio for layer, points in curves.items()}

    def loss_at(layer, ratio):
        for a, b in itertools.pairwise(curves[layer]):
            if ratio <= b.ratio:
                return a.loss + (b.loss - a.loss) * (ratio - a.ratio) / (b.ratio - a.ratio)
        raise AssertionError

    total = sum(points[1].cost for points in curves.values())
    found = spend(curves, total, lambda layer, ratio: prices[layer] * ratio, 16)
    assert all(round(16 * r) == pytest.approx(16 * r) for r in found.values())
    assert sum(prices[i] * r for i, r in found.items()) <= total + 1e-9
    best = min(
        sum(loss_at(i, r) for i, r in enumerate(ratios))
        for ratios in itertools.product([k / 16 for k in range(4, 17)], repeat=3)
        if sum(prices[i] * r for i, r in enumerate(ratios)) <= total + 1e-9
    )
    lost = sum(loss_at(i, r) for i, r in found.items())
    step = max(loss_at(i, 0.25) - loss_at(i, 0.25 + 1 / 16) for i in curves)
    assert best - 1e-9 <= lost <= best + 2 * step, "within the blocks that rounding leaves"
    with pytest.raises(ConfigError, match="cheapest"):
        spend(curves, 0.1, lambda layer, ratio: ratio, 16)


def test_ratios_move_together():
    both, exact = LayerPlan(0.4, 0.2, mlp_ratio=None), LayerPlan(1.0, 0.5)
    assert (ratio_of(both), ratio_of(exact)) == (0.4, 0.5)
    moved = at_ratio(both, 0.8)
    assert (moved.forward_ratio, moved.backward_ratio) == (0.8, 0.4)
    for ratio in (0.1, 0.3, 0.7):
        same = at_ratio(LayerPlan(0.3, 0.3, mlp_ratio=0.3), ratio)
        assert same.forward_ratio == same.backward_ratio == same.mlp_ratio == ratio
    assert at_ratio(exact, 0.25) == LayerPlan(1.0, 0.25)
    assert at_ratio(both, 1.0).is_dense and at_ratio(exact, 1.0).is_dense


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, max_position_embeddings=128, **sizes))
    with torch.no_grad():
        made.lm_head.weight.mul_(30)
        for layer in made.model.layers:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(layer.self_attn, name).weight.mul_(10)
    return made


@pytest.fixture(scope="module")
def batches(model):
    """Five windows of the model's own words: whatever the layers leave out raises the loss."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (5, 1), generator=generator)
    with torch.no_grad():
        while ids.shape[1] < TOKENS:
            chances = model(ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    blocks = torch.rand(5, TOKENS // BLOCK, generator=generator) < 0.15
    supervised = blocks.repeat_interleave(BLOCK, 1)
    return [{"input_ids": ids[i : i + 1], "supervised": supervised[i : i + 1]} for i in range(5)]


@pytest.mark.parametrize("forward", [0.5, 1.0])
def test_an_allocated_plan_costs_no_more_and_loses_no_more(model, batches, forward, tmp_path, monkeypatch):
    skeleton = Plan.uniform(model, forward_ratio=forward, backward_ratio=0.5, block_size=BLOCK)
    cost = layer_cost(model, skeleton, TOKENS, lora_rank=2)
    options = {"plan": skeleton, "held_out": batches[3:], "progress": False, "output_dir": tmp_path}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = calibrate(model, batches[:3], CONFIG, cost=cost, **options)
    report = json.loads((tmp_path / "calibration-report.json").read_text())["allocation"]
    uniform = [at_ratio(layer, 0.5) if not layer.is_dense else LayerPlan(forward, 0.5) for layer in plan.layers]
    uniform = [replace(x, bypass=plan.layers[0].bypass) if x.forward_ratio < 1 else x for x in uniform]
    assert sum(map(cost, plan.layers)) <= sum(map(cost, uniform)) * (1 + 1e-9)
    assert report["loss"] <= report["uniform"]
    assert all(len(points) >= 3 for points in report["curves"].values())
    ratios = [ratio_of(layer) if not layer.is_dense else 1.0 for layer in plan.layers]
    assert ratios == [report["ratios"][str(i)] for i in range(3)]
    assert all(r == 0.5 or round(16 * r) == pytest.approx(16 * r) for r in ratios)
    assert [t["mix"] for t in report["tried"]] == [1.0, 0.5]
    # What the last layer makes of context rows is read by nobody.
    assert ratios[2] == min(ratios) < 0.5
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    with lemo.attach(model, plan, self_test=False):
        pass
    monkeypatch.setattr(budget, "allocate", None)  # a finished stage is only read
    again = calibrate(model, batches[:3], CONFIG, cost=cost, **options)
    assert [ratio_of(x) for x in again.layers] == [ratio_of(x) for x in plan.layers]


def test_what_cannot_be_allocated_is_refused(model, batches):
    skeleton = Plan.uniform(model, forward_ratio=0.5, backward_ratio=0.5, block_size=BLOCK)
    with pytest.raises(ConfigError, match="cost="):
        calibrate(model, batches[:3], CONFIG, plan=skeleton, progress=False)
    config = replace(CONFIG, tune_windows=0)
    cost = layer_cost(model, skeleton, TOKENS)
    with pytest.raises(ConfigError, match="held-out"):
        calibrate(model, batches[:3], config, plan=skeleton, progress=False, cost=cost)


def test_costs_are_those_of_the_flop_count(model):
    plan = Plan.uniform(model, forward_ratio=0.5, backward_ratio=0.25, kv="kept")
    shape = DecoderShape.from_config(model.config)
    cost = layer_cost(model, plan, 4096, lora_rank=4)
    assert cost(plan.layers[0]) == layer_flops(shape, 4096, LayerWork(0.5, 0.25, lora_rank=4)).total
    assert cost(LayerPlan()) == layer_flops(shape, 4096, LayerWork(lora_rank=4)).total
