"""What a run says about its plan."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lemo.cli.recipe import build_run
from lemo.config import RunConfig
from lemo.core.plan import LayerPlan, Plan
from lemo.train.planning import describe_plan, leaves_rows_out, make_plan, needs_calibration
from tests.runtime.oracle import tiny_model


def exact(context_window):
    return Plan((LayerPlan(1.0, 0.12),) * 3, gradient="keys", scorer="recent", context_window=context_window)


def test_a_dense_plan_is_said_to_be_one():
    assert describe_plan(Plan((LayerPlan(1.0, 1.0),) * 2), 4096) == ["plan: every layer dense"]


@pytest.mark.parametrize(
    ("tokens", "says"), [(2049, "more than 2,048 rows, rows without"), (2048, "every row sees all")]
)
def test_a_context_window_that_takes_nothing_is_said_to(tokens, says):
    first, second = describe_plan(exact(1024), tokens)
    assert first.startswith("plan: 3 of 3 layers run every row forward, gradient keys; forward 1.00, backward 0.12")
    assert says in second


def test_local_rows_that_see_all_are_said_to():
    plans = exact(1024), replace(exact(1024), local_forward="all")
    near, wide = (describe_plan(plan, 4096)[-1] for plan in plans)
    assert wide == near + "; local loss rows see all rows in forward"


def test_plans_without_a_window_say_nothing_of_it():
    (line,) = describe_plan(exact(None), 10**6)
    assert "3 of 3 layers" in line
    assert "skip rows" in describe_plan(Plan((LayerPlan(0.3, 0.3),) * 2, kv="kept"), 4096)[0]


def _left_out(**changes) -> RunConfig:
    """The recipe of the guide that leaves rows out, with some keys of `sparsity` changed."""
    page = (Path(__file__).parents[2] / "docs" / "guide" / "recipes.md").read_text()
    block = next(b for b in re.findall(r"```yaml\n(.*?)```", page, re.S) if "forward_ratio" in b)
    values = yaml.safe_load(block)
    values["sparsity"] |= changes
    return build_run({"output": "x", "model": {"path": "m"}, "data": {"train": ["a.txt"]}, **values}, "guide")


def test_rows_that_are_left_out_need_no_calibration():
    run = _left_out()
    assert leaves_rows_out(run) and not needs_calibration(run)
    assert not needs_calibration(_left_out(scorer="words"))
    for changes in ({"dense_layers": [0]}, {"kv": "all"}, {"scorer": "random"}, {"mlp": "own", "mlp_ratio": 0.2}):
        assert needs_calibration(_left_out(**changes)), changes
    model = tiny_model("llama")
    plan = make_plan(model, run, None, None)
    assert plan.leaves_out and "leave the same rows out" in describe_plan(plan, 512)[0]
    # Where a layer of the model can only run all rows, others read what is left out, and a bypass has to be fitted.
    hybrid = plan.replace_layer(0, forward_ratio=1.0, backward_ratio=1.0)
    assert needs_calibration(run, hybrid)
