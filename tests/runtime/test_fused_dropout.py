"""LoRA dropout in the fused engine: masks by a counter, equal to the generic executor under the same masks."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lemo import attach
from lemo.ops import dropout_rows
from lemo.ops.dropout_rows.reference import keep_mask
from lemo.runtime.fused import factors
from lemo.runtime.fused.factors import dropout_key
from lemo.runtime.model import causal_model, decoder_layers
from tests.runtime.oracle import batch, gradients, tiny_model
from tests.runtime.test_exact import in_double
from tests.runtime.test_fused import BOUND, MODES, plan_of, run

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SEED = 1234


class MaskByRow(nn.Module):
    """The fused engine's mask in the place of an adapter's dropout; `rows` are those of the running attention."""

    def __init__(self, p: float, layer: int, projection: int, rows: list[torch.Tensor]) -> None:
        super().__init__()
        self.share, self.key, self.rows = p, dropout_key(SEED, layer, projection), rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Differentiable, of (1, N, M)."""
        mask = keep_mask(self.rows[-1], x.shape[-1], self.share, self.key)
        return x * mask / (1 - self.share)


def adapted(p: float = 0.3, targets=PROJECTIONS, dtype=torch.float64, family: str = "llama"):
    """A model with adapters that matter."""
    model = get_peft_model(
        tiny_model(family, dtype=dtype), LoraConfig(r=3, target_modules=list(targets), lora_alpha=7, lora_dropout=p)
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def with_masks(model, tokens: int):
    """Puts the counter masks into the generic executor's adapters. Rows are told apart by their RoPE angles."""
    base, rows = causal_model(model), []
    table = base.model.rotary_emb(torch.zeros(1, dtype=torch.float64), torch.arange(tokens)[None])[0][0]

    def note(module, args, kwargs):
        cosine = kwargs["position_embeddings"][0][0]
        distance = (cosine[:, None] - table[None]).abs().amax(-1)
        assert float(distance.amin(1).max()) < 1e-12
        rows.append(distance.argmin(1))

    for index, layer in enumerate(decoder_layers(base)):
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
        for projection, name in enumerate(PROJECTIONS):
            module = next(m for n, m in layer.named_modules() if n.endswith(name))
            if hasattr(module, "lora_dropout"):
                p = module.lora_dropout["default"].p
                module.lora_dropout["default"] = MaskByRow(p, index, projection, rows)
    return model


@pytest.mark.parametrize("targets", [PROJECTIONS, ("q_proj", "v_proj", "down_proj")], ids=["all", "some"])
@pytest.mark.parametrize("kv", ["kept", "all"])
@pytest.mark.parametrize("mode", MODES)
def test_fused_is_generic_under_the_same_masks(mode, kv, targets, monkeypatch):
    """Values and all gradients, exact forward included: its two passes and backward see one mask."""
    in_double(monkeypatch)
    monkeypatch.setattr(factors, "draw_seed", lambda: SEED)
    model, inputs = adapted(targets=targets), batch(48)
    plan = plan_of(model, mode, kv, dense=(1,))
    found = {}
    for recompute in ("none", "lin"):
        found[recompute] = run(model, plan, inputs, "fused", recompute=recompute)
    undropped = run(adapted(p=0.0, targets=targets), plan, inputs, "fused")
    loss, wanted, _ = run(with_masks(model, 48), plan, inputs, "generic")
    scale = torch.stack([g.norm() for g in wanted.values()]).norm()
    assert abs(float(undropped[0] - loss)) > 1e-4  # the masks matter
    for fused_loss, got, _ in found.values():
        assert abs(float(loss - fused_loss)) <= BOUND * abs(float(loss))
        assert got.keys() == wanted.keys()
        assert all(float((got[name] - g).norm() / scale) <= BOUND for name, g in wanted.items())


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("mode", ["skip", "exact rows"])
def test_recompute_levels_draw_the_same_masks(mode, family, monkeypatch):
    """Backward makes the masks again: with the MLP and the projections recomputed or saved, the same numbers."""
    in_double(monkeypatch)
    targets = PROJECTIONS if family == "llama" else ("qkv_proj", "gate_up_proj", "o_proj", "down_proj")
    model, inputs = adapted(targets=targets, family=family), batch(48)
    plan, found = plan_of(model, mode, "all"), []
    for recompute in ("none", "mlp", "lin", "layer"):
        torch.manual_seed(5)
        found.append(run(model, plan, inputs, "fused", recompute=recompute)[:2])
    for loss, got in found[1:]:
        assert torch.equal(loss, found[0][0])
        for name, gradient in found[0][1].items():
            assert torch.allclose(got[name], gradient, rtol=1e-12, atol=1e-15), name


def test_one_number_of_the_generator_makes_a_forwards_masks(monkeypatch):
    """The same seed repeats a step, another does not; a dropout that is switched off drops nothing."""
    in_double(monkeypatch)
    model, inputs = adapted(), batch(48)
    plan, losses = plan_of(model, "skip"), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        losses.append(float(run(model, plan, inputs, "fused")[0]))
    assert losses[0] == losses[1] != losses[2]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    wanted = run(adapted(p=0.0), plan, inputs, "fused")[0]
    assert torch.allclose(run(model, plan, inputs, "fused")[0], wanted, rtol=1e-12)


def test_micro_batches_draw_apart_and_backward_keeps_its_own(monkeypatch):
    """Two forwards before two backwards: each backward uses the masks of its own forward."""
    in_double(monkeypatch)
    model, inputs = adapted(), batch(48)
    plan = plan_of(model, "skip", dense=(0, 1, 2, 3))
    torch.manual_seed(3)
    wanted = run(model, plan, inputs, "fused")[1]
    torch.manual_seed(3)
    model.zero_grad(set_to_none=True)
    with attach(model, plan, engine="fused", self_test=False):
        first, second = model(**inputs).loss, model(**inputs).loss
        second.backward()
        other = gradients(model)
        model.zero_grad(set_to_none=True)
        first.backward()
        got = gradients(model)
    assert all(torch.equal(got[name], gradient) for name, gradient in wanted.items())
    assert not any(torch.equal(other[name], gradient) for name, gradient in wanted.items())


def test_masks_have_their_share_and_are_independent():
    """Kept share within five standard errors; rows, columns, layers, maps and steps agree as often as by chance."""
    p, rows, width = 0.2, 400, 500
    sets = {
        "first": keep_mask(torch.arange(rows), width, p, dropout_key(7, 0, 0)),
        "map": keep_mask(torch.arange(rows), width, p, dropout_key(7, 0, 1)),
        "layer": keep_mask(torch.arange(rows), width, p, dropout_key(7, 1, 0)),
        "step": keep_mask(torch.arange(rows), width, p, dropout_key(8, 0, 0)),
        "rows": keep_mask(torch.arange(rows) + rows, width, p, dropout_key(7, 0, 0)),
    }
    sets["shifted row"] = sets["first"].roll(1, 0)
    sets["shifted column"] = sets["first"].roll(1, 1)
    error = (p * (1 - p) / (rows * width)) ** 0.5
    for mask in sets.values():
        assert abs(float(mask.double().mean()) - (1 - p)) < 5 * error
    centred = {name: mask.double() - mask.double().mean() for name, mask in sets.items()}
    for name, other in centred.items():
        if name != "first":
            correlation = float((centred["first"] * other).mean() / (p * (1 - p)))
            assert abs(correlation) < 5 / (rows * width) ** 0.5, name
    # No row and no column is kept more often than chance allows: sums over either vary as binomials do.
    for dim, count in ((0, rows), (1, width)):
        spread = float(sets["first"].double().mean(dim).var() / (p * (1 - p) / count))
        assert 0.7 < spread < 1.4


def test_a_row_drops_alike_wherever_it_stands():
    """Values and their gradient, by the row's number alone; the result has the mean of the input."""
    x, key = torch.ones(64, 300, dtype=torch.float64), dropout_key(1, 2, 3)
    whole = dropout_rows(x, 0.4, key)
    chosen = torch.tensor([3, 60, 17])
    assert torch.equal(dropout_rows(x[:3], 0.4, key, chosen), whole[chosen])
    assert abs(float(whole.mean()) - 1) < 5 * (0.4 / 0.6 / x.numel()) ** 0.5
    total = torch.full_like(x, 2.0)
    assert dropout_rows(x, 0.4, key, into_nM=total) is total and torch.equal(total, 2 + whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"p": 1.0}, "p must"),
        ({"key": (1, 2**32)}, "key must"),
        ({"rows_n": torch.zeros(3, dtype=torch.int64)}, "rows_n has"),
        ({"rows_n": torch.zeros(4)}, "rows_n must"),
        ({"into_nM": torch.zeros(4, 5)}, "into_nM"),
        ({"x_nM": torch.zeros(6, 4).mT}, "contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    """By name."""
    arguments = {"x_nM": torch.zeros(4, 6), "p": 0.1, "key": (1, 2)} | changes
    with pytest.raises(ValueError, match=message):
        dropout_rows(**arguments)
