"""Every op against its reference, on every case that its cases.py lists."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lemo.ops
from lemo.testing import OpSpec, check_case, check_gradient, specs_in

SPECS: list[OpSpec] = specs_in(lemo.ops)
CASES = [pytest.param(spec, case, id=f"{spec.name}: {case.name}") for spec in SPECS for case in spec.cases]
DIFFERENTIABLE = [param for param in CASES if param.values[1].gradcheck and param.values[1].gradients]
LIBRARY = [param for param in CASES if param.values[0].library_call]


def test_every_op_is_complete():
    folders = {path.parent.name for path in Path(lemo.ops.__file__).parent.glob("*/op.py")}
    assert len(SPECS) >= len(folders) >= 5
    assert len({spec.name for spec in SPECS}) == len(SPECS)
    for spec in SPECS:
        assert spec.name in lemo.ops.__all__ and callable(getattr(lemo.ops, spec.name))
        assert len({case.name for case in spec.cases}) == len(spec.cases)
        assert spec.benchmark_shapes


@pytest.mark.parametrize(("spec", "case"), DIFFERENTIABLE)
def test_gradient_of_reference(spec, case):
    check_gradient(spec, case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_op_meets_its_reference(spec, case, dtype):
    check_case(spec, case, dtype)


@pytest.mark.parametrize(("spec", "case"), LIBRARY)
def test_library_op_is_registered_soundly(spec, case):
    op, arguments = spec.library_call(case.inputs(0, torch.float32))
    torch.library.opcheck(op, arguments)
