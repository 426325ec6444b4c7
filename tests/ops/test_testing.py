"""The measuring stick itself: it must reject what is wrong."""

from __future__ import annotations

import pytest
import torch

from lemo.testing import Case, OpSpec, check_case, check_error_budget, poisoned_allocations, with_gaps


def _spec(run) -> OpSpec:
    return OpSpec("double", run, lambda x: 2 * x, (), (), lambda _: 0, lambda _: 0)


CASE = Case("plain", lambda g: {"x": torch.randn(50, generator=g, dtype=torch.float64)}, ("x",))


def test_a_right_op_passes():
    check_case(_spec(lambda x: x + x), CASE, torch.float32)


@pytest.mark.parametrize(
    "run",
    [
        lambda x: 2 * x * (1 + 1e-5),
        lambda x: 2 * x.detach() + x - x.detach(),
        lambda x: torch.where(torch.arange(50) == 7, torch.nan, 2 * x),
        lambda x: (2 * x)[:-1],
        lambda x: (2 * x).double(),
        lambda x: torch.empty_like(x).mul(0) + 2 * x,
    ],
    ids=["value", "gradient", "nan", "shape", "dtype", "reads uninitialised memory"],
)
def test_a_wrong_op_fails(run):
    with pytest.raises(AssertionError):
        check_case(_spec(run), CASE, torch.float32)


def test_budget_is_twice_the_error_of_the_reference():
    exact = torch.ones(10, dtype=torch.float64)
    working = (exact + 1e-3).float()
    check_error_budget((exact + 1.9e-3).float(), working, exact)
    with pytest.raises(AssertionError, match="largest error"):
        check_error_budget((exact + 2.1e-3).float(), working, exact)


def test_poison_reaches_allocations_inside_a_library_op():
    @torch.library.custom_op("lemo_test::lazy", mutates_args=())
    def lazy(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    with poisoned_allocations():
        assert lazy(torch.zeros(3)).isnan().all()
        assert torch.zeros(2).new_empty(2, dtype=torch.int64).eq(torch.iinfo(torch.int64).min).all()
    assert torch.empty is not None and "poison" not in torch.empty.__name__


def test_cases_keep_strides_and_poison_the_gaps():
    case = Case("gaps", lambda g: {"x": with_gaps(torch.ones(3, 4, dtype=torch.float64))})
    x = case.inputs(0, torch.float32)["x"]
    assert x.stride() == (8, 2) and (x == 1).all()
    assert torch.as_strided(x, (3, 3), (8, 2), 1).isnan().all()


def test_inputs_have_one_value_in_every_dtype():
    values = [CASE.inputs(3, dtype)["x"].double() for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    assert torch.equal(values[0], values[1]) and torch.equal(values[1], values[2])
