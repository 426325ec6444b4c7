"""Context rows that attend locally: against a dense model with an explicit mask, in fp64, under both engines."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lemo.core.plan import LayerPlan, Plan
from lemo.errors import ConfigError, UnsupportedModelError
from lemo.runtime.attach import attach
from tests.runtime.oracle import FAMILIES, batch, gradients, tiny_model
from tests.runtime.test_exact import BOUND, error, exact_plan, in_double
from tests.runtime.test_fused import FUSED, assert_equal_engines
from tests.runtime.test_laws import assert_same_gradients

WINDOW = 8
ENGINES = ("generic", "fused")


def windowed(model, forward=1.0, gradient="keys", kv="all", window=WINDOW, **choices) -> Plan:
    """Exact forward with few backward rows, context rows attending locally."""
    plan = exact_plan(model, forward, gradient, kv)
    layers = tuple(replace(x, backward_ratio=0.25) for x in plan.layers)
    return replace(plan, layers=layers, context_window=window, **choices)


def run(model, plan, inputs, engine):
    """Loss, gradients and selections of one step."""
    model.zero_grad(set_to_none=True)
    with attach(model, plan, engine=engine, self_test=False, unsafe_no_bypass=True) as handle:
        loss = model(**inputs).loss
        loss.backward()
    return loss.detach(), gradients(model), handle.selections


@pytest.mark.parametrize("forward", [1.0, 0.75])
@pytest.mark.parametrize("kv", ["kept", "all"])
@pytest.mark.parametrize("gradient", ["rows", "pairs", "keys"])
@pytest.mark.parametrize(
    ("family", "engine"),
    [("llama", "generic"), ("llama", "fused"), ("qwen3", "generic"), ("qwen3", "fused"), ("gpt2", "generic")],
)
def test_context_rows_attend_as_the_mask_says(family, gradient, kv, forward, engine, monkeypatch):
    """Loss and every gradient are those of the dense model whose context rows have an explicit mask."""
    in_double(monkeypatch)
    model = tiny_model(family, dtype=torch.float64)
    plan = windowed(model, forward, gradient, kv)
    assert error(model, plan, engine=engine) <= BOUND
    # The reference would see the difference.
    full, near = (run(model, p, batch(48), engine)[0] for p in (replace(plan, context_window=None), plan))
    assert abs(float(full - near)) > 1e-6


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("llama", "qwen3", "gpt2")])
def test_every_family_obeys(family, monkeypatch):
    """Sliding windows, soft caps, sinks: a layer's own rule and this one."""
    in_double(monkeypatch)
    model = tiny_model(family, dtype=torch.float64)
    assert error(model, windowed(model)) <= BOUND
    if family in FUSED:
        model.zero_grad(set_to_none=True)
        assert error(model, windowed(model, kv="kept", gradient="rows"), engine="fused") <= BOUND


def test_pairs_are_still_refused_where_attention_is_not_plain():
    model = tiny_model("gemma2")
    plan = windowed(model, gradient="pairs")
    attached = attach(model, plan, self_test=False, unsafe_no_bypass=True)
    with attached, pytest.raises(UnsupportedModelError, match="rows"):
        model(**batch(48))


@pytest.mark.parametrize("gradient", ["rows", "keys"])
@pytest.mark.parametrize("window", [24, 48, 512])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_window_that_reaches_all_keys_changes_nothing(engine, window, gradient, monkeypatch):
    """Two chunks that hold the document: bit for bit what runs without a window."""
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    plan = windowed(model, gradient=gradient, window=window)
    wanted, wanted_gradients, _ = run(model, replace(plan, context_window=None), batch(48), engine)
    loss, found, _ = run(model, plan, batch(48), engine)
    assert torch.equal(loss, wanted)
    assert all(torch.equal(found[name], wanted_gradients[name]) for name in wanted_gradients)


def _packed(lengths, padding=None):
    """Documents in one sequence, or one a sequence with padding; and each alone."""
    alone = [batch(n, supervised_from=n - 8, seed=5 + n) for n in lengths]
    if padding is None:
        inputs = {name: torch.cat([x[name] for x in alone], 1) for name in alone[0]}
        inputs["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
        return inputs, alone
    longest = max(lengths)
    inputs = {"input_ids": torch.zeros(len(lengths), longest, dtype=torch.int64)}
    inputs |= {"labels": torch.full_like(inputs["input_ids"], -100)}
    inputs |= {"attention_mask": torch.zeros_like(inputs["input_ids"])}
    for row, one in enumerate(alone):
        count = lengths[row]
        place = slice(0, count) if padding == "right" else slice(longest - count, longest)
        for name in ("input_ids", "labels"):
            inputs[name][row, place] = one[name][0]
        inputs["attention_mask"][row, place] = 1
    positions = inputs["attention_mask"].cumsum(1) - 1
    inputs["position_ids"] = positions.clamp(min=0)
    return inputs, alone


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("gradient", ["rows", "pairs", "keys"])
@pytest.mark.parametrize("engine", ENGINES)
def test_documents_run_as_they_do_alone(engine, gradient, padding, monkeypatch):
    """Packed or padded, of different lengths and with short last chunks: loss and gradients of each alone."""
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    plan = windowed(model, gradient=gradient)
    lengths = (43, 24, 60)
    inputs, alone = _packed(lengths, padding)
    loss, found, _ = run(model, plan, inputs, engine)
    runs = [run(model, plan, one, engine) for one in alone]
    assert abs(float(loss - sum(x[0] for x in runs) / len(runs))) < 1e-10
    wanted = {name: sum(x[1][name] for x in runs) / len(runs) for name in found}
    assert_same_gradients(found, wanted, BOUND)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_document_cannot_change_another(engine, monkeypatch):
    """Another first document leaves the loss of the second as it is."""
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    plan = windowed(model)
    inputs, _ = _packed((40, 45))
    inputs["labels"][:, :41] = -100
    loss = run(model, plan, inputs, engine)[0]
    inputs["input_ids"][:, :40] = inputs["input_ids"][:, :40].flip(1)
    assert abs(float(run(model, plan, inputs, engine)[0] - loss)) < 1e-12


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kv", ["kept", "all"])
def test_rows_that_a_threshold_drops_attend_as_context(engine, kv, monkeypatch):
    """Entries of the capacity that were not chosen have no effect: both engines agree on the rest."""
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    plan = windowed(model, 0.75, "keys", kv)
    layers = tuple(replace(x, threshold=0.5) for x in plan.layers)
    plan = replace(plan, policy="threshold", layers=layers)
    assert error(model, plan, engine=engine) <= BOUND


@pytest.mark.parametrize("recompute", ["none", "mlp", "lin", "layer"])
@pytest.mark.parametrize("gradient", ["rows", "pairs", "keys"])
def test_what_is_computed_again_is_what_forward_had(gradient, recompute, monkeypatch):
    """Every level, with a dense layer in between and loss rows alone in the last."""
    in_double(monkeypatch)
    model = tiny_model(dtype=torch.float64)
    plan = windowed(model, 0.75, gradient).replace_layer(1, forward_ratio=1.0, backward_ratio=1.0)
    assert_equal_engines(model, plan, batch(48, supervised_from=38), recompute=recompute)


def test_evaluation_attends_to_everything():
    model, inputs = tiny_model(), batch(48)
    wanted = model.eval()(**inputs).loss
    with attach(model, windowed(model), self_test=False, unsafe_no_bypass=True):
        assert torch.equal(model.eval()(**inputs).loss, wanted)


@pytest.mark.parametrize("window", [0, -64, 96, 64.0, True])
def test_windows_that_are_no_blocks_are_refused(window):
    with pytest.raises(ConfigError, match="context_window"):
        Plan((LayerPlan(),), context_window=window)


def test_a_plan_keeps_its_window(tmp_path):
    plan = Plan.uniform(2, context_window=512)
    plan.save(tmp_path)
    assert Plan.load(tmp_path).context_window == 512
