"""What a run says about its plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lemo.core.plan import LayerPlan, Plan
from lemo.train.planning import describe_plan


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
