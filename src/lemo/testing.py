"""What the tests and benchmarks of ops share: cases, the error budget, poisoned allocations, gradient checks.

An op's `cases.py` fills an `OpSpec` (or several); one generic suite and one generic benchmark read them all.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

Inputs = dict[str, Any]

# Of a tensor that is drawn whole.
LARGE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Case:
    """One input of an op.

    Attributes:
        name: says what is special about it.
        build: makes the keyword arguments of the op from a seeded CPU generator; floating tensors in fp64.
        gradients: names of the arguments that get a gradient.
        gradcheck: the reference's gradient is the derivative of its value (false where a gradient is stopped).
        ulps: allowance of the error budget in units of the output dtype's resolution.
        kernel: the op's Triton kernel takes this input, where there is one.
    """

    name: str
    build: Callable[[torch.Generator], Inputs]
    gradients: tuple[str, ...] = ()
    gradcheck: bool = True
    ulps: float = 4.0
    kernel: bool = True

    def inputs(self, seed: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
        """Arguments of the op with floating tensors in `dtype`, strides kept and gaps between elements filled with NaN.

        The same seed gives the same values, rounded to bf16, in every dtype: that an input was rounded is no error.
        """
        made = self.build(torch.Generator().manual_seed(seed))
        cast = {name: _cast(value, dtype, device) for name, value in made.items()}
        return {name: t.requires_grad_() if name in self.gradients else t for name, t in cast.items()}


@dataclass(frozen=True)
class OpSpec:
    """What a `cases.py` exports as SPEC.

    Attributes:
        name: of the op.
        run: the public op; takes the arguments of a case by name. Returns a tensor or a tuple that holds some.
        reference: the same as plain torch.
        cases: small ones, for tests on any machine.
        benchmark_shapes: large ones, by name.
        flops: floating-point operations that the op needs for given arguments.
        bytes_moved: bytes that it must read and write.
        library_call: makes the torch.library op and its arguments from a case's; None where there is no such op.
        kernel_call: the same for an op that only runs where its kernel does.
        naive: the same result by indexing, computing and scattering with whole tensors, for the benchmark.
        ceiling: `copy` where the op should run at the rate of a copy, on its first benchmark shape.
        prepare: what `run` does to a case's arguments before it calls the op, so that a benchmark can do it beforehand.
    """

    name: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    cases: tuple[Case, ...]
    benchmark_shapes: tuple[Case, ...]
    flops: Callable[[Inputs], int]
    bytes_moved: Callable[[Inputs], int]
    library_call: Callable[[Inputs], tuple[Any, tuple]] | None = None
    kernel_call: Callable[[Inputs], tuple[Any, tuple]] | None = None
    naive: Callable[..., Any] | None = None
    ceiling: str = ""
    prepare: Callable[[Inputs], Inputs] | None = None


def specs_in(package: ModuleType) -> list[OpSpec]:
    """Every OpSpec of the op folders of a package."""
    folders = sorted(path.parent.name for path in Path(str(package.__file__)).parent.glob("*/op.py"))
    return [spec for folder in folders for spec in specs_of(f"{package.__name__}.{folder}")]


def specs_of(folder: str) -> list[OpSpec]:
    """`SPEC` of an op folder named as a module, or `SPECS` of one that holds several ops."""
    cases = importlib.import_module(f"{folder}.cases")
    return list(cases.SPECS) if hasattr(cases, "SPECS") else [cases.SPEC]


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of an op's output, in order."""
    items = output if isinstance(output, tuple | list) else [output]
    return [item for item in items if isinstance(item, Tensor)]


def outputs_and_gradients(
    function: Callable[..., Any], inputs: Inputs, gradients: Sequence[str], seed: int = 1
) -> dict[str, Tensor]:
    """Outputs of one call and the gradients of its named arguments, by name.

    The incoming gradient is drawn from `seed`, the same for every dtype and device.
    """
    outputs = tensors_of(function(**inputs))
    named = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    if gradients:
        generator = torch.Generator().manual_seed(seed)
        weights = [
            _cast(torch.randn(t.shape, generator=generator, dtype=torch.float64), t.dtype, t.device) for t in outputs
        ]
        found = torch.autograd.grad(outputs, [inputs[name] for name in gradients], weights)
        named |= {f"gradient of {name}": grad for name, grad in zip(gradients, found, strict=True)}
    return named


def check_error_budget(actual: Tensor, working: Tensor, exact: Tensor, *, ulps: float = 4.0, what: str = "") -> None:
    """Holds an implementation to twice the error that the reference itself makes in the working dtype.

    Both in the largest and in the root-mean-square error, each against fp64, plus `ulps` units of the output dtype's
    resolution at the size of the exact result.

    Args:
        actual: result under test.
        working: the reference's result in the same working dtype.
        exact: the reference's result in fp64 from the same input values.
        ulps: allowance for another order of summation.
        what: names the result in the message.

    Raises:
        AssertionError: shape, dtype or the finite elements differ, or the error is above the budget.
    """
    if actual.shape != exact.shape or actual.dtype != working.dtype:
        raise AssertionError(
            f"{what}: {tuple(actual.shape)} {actual.dtype}, expected {tuple(exact.shape)} {working.dtype}"
        )
    if not actual.is_floating_point():
        if not torch.equal(actual.cpu(), exact.cpu()):
            raise AssertionError(f"{what}: integers differ")
        return
    resolution = torch.finfo(actual.dtype).eps
    actual, working, exact = (t.detach().double().cpu() for t in (actual, working, exact))
    if not torch.equal(actual.isfinite(), exact.isfinite()):
        raise AssertionError(f"{what}: {int((~actual.isfinite()).sum())} elements are not finite")
    if exact.numel() == 0:
        return
    for kind, norm in (("largest", _largest), ("root mean square", _root_mean_square)):
        error, reference_error = norm(actual - exact), norm(working - exact)
        budget = 2 * reference_error + ulps * resolution * norm(exact)
        if not error <= budget:
            raise AssertionError(
                f"{what}: {kind} error {error:.3e} is above {budget:.3e} (twice the reference's {reference_error:.3e} "
                f"and {ulps} units of {resolution:.1e} at {norm(exact):.3e})"
            )


def check_case(spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> None:
    """Checks the public op against its reference on one case: outputs and all gradients, within the error budget.

    Raises:
        AssertionError: a result misses the budget.
    """
    exact = outputs_and_gradients(spec.reference, case.inputs(seed, torch.float64), case.gradients)
    working = outputs_and_gradients(spec.reference, case.inputs(seed, dtype, device), case.gradients)
    with poisoned_allocations():
        actual = outputs_and_gradients(spec.run, case.inputs(seed, dtype, device), case.gradients)
    if actual.keys() != exact.keys():
        raise AssertionError(f"{spec.name}/{case.name}: {list(actual)}, expected {list(exact)}")
    for name in exact:
        what = f"{spec.name}/{case.name}/{dtype}: {name}"
        check_error_budget(actual[name], working[name], exact[name], ulps=case.ulps, what=what)


def check_gradient(spec: OpSpec, case: Case) -> None:
    """Checks the reference's gradients by finite differences in fp64.

    Raises:
        RuntimeError: as torch.autograd.gradcheck does.
    """
    inputs = case.inputs(0, torch.float64)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = spec.reference(**{**inputs, **dict(zip(case.gradients, tensors, strict=True))})
        return tuple(t for t in tensors_of(outputs) if t.is_floating_point())

    torch.autograd.gradcheck(function, tuple(inputs[name] for name in case.gradients))


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Memory that Python code allocates uninitialised is full of NaN (integers: of their smallest value)."""

    def poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            return poison_(allocate(*args, **kwargs))

        return poisoned

    with contextlib.ExitStack() as stack:
        for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (Tensor, ("new_empty",))):
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, poisoning(getattr(owner, name))))
        yield


def poison_(tensor: Tensor) -> Tensor:
    """Fills a tensor with NaN, or with the smallest integer, in place."""
    if tensor.dtype == torch.bool:
        return tensor
    return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)


def _cast(value: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    """Floating tensors in `dtype` with their strides, in tuples as well; other tensors moved; the rest unchanged."""
    if isinstance(value, tuple):
        items = [_cast(item, dtype, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        return value.to(device)
    made = torch.empty_strided(value.shape, value.stride(), dtype=dtype, device=device)
    storage = torch.empty(0, dtype=dtype, device=device).set_(made.untyped_storage())
    poison_(storage)
    return made.copy_(value.bfloat16())


def _largest(t: Tensor) -> float:
    return float(t.abs().max())


def _root_mean_square(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


def draw_normal(*shape: int, generator: torch.Generator) -> Tensor:
    """Normal numbers in fp64; of a large tensor the first rows again and again, in bf16, so that it is soon made."""
    if (count := torch.Size(shape).numel()) <= LARGE_ELEMENTS:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    rows = max(LARGE_ELEMENTS * shape[0] // count, 1)
    first = torch.randn(rows, *shape[1:], generator=generator).bfloat16()
    return first.repeat(-(-shape[0] // rows), *[1] * (len(shape) - 1))[: shape[0]]


def with_gaps(tensor: Tensor) -> Tensor:
    """The same values at every second place of a storage twice as large: a tensor that is not contiguous."""
    wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
    wide[..., ::2] = tensor
    return wide[..., ::2]
