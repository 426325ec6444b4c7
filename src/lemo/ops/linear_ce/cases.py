"""Inputs of linear_ce for tests and benchmarks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lemo.ops.linear_ce.op import linear_ce
from lemo.ops.linear_ce.reference import linear_ce_reference
from lemo.testing import Case, Inputs, OpSpec, with_gaps

SEGMENT_ROWS = 5


def _run(**inputs: Any) -> torch.Tensor:
    """Small cases in several segments, large ones in segments of the default size."""
    small = inputs["labels_N"].numel() < 1000
    return linear_ce(**inputs, **({"segment_rows": SEGMENT_ROWS} if small else {}))


def _inputs(
    generator: torch.Generator,
    *,
    shape: tuple[int, ...] = (17, 6),
    vocabulary: int = 11,
    ignored: float = 0.4,
    bias: bool = False,
    gaps: bool = False,
    scale: float = 1.0,
    **options: Any,
) -> Inputs:
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    hidden = draw(shape) * scale
    labels = torch.randint(vocabulary, shape[:-1], generator=generator)
    labels[torch.rand(shape[:-1], generator=generator) < ignored] = options.get("ignore_index", -100)
    made = {"hidden_NM": with_gaps(hidden) if gaps else hidden, "weight_VM": draw(vocabulary, shape[-1])}
    made |= {"labels_N": labels, **options}
    return made | ({"bias_V": draw(vocabulary)} if bias else {})


def _labelled(inputs: Inputs) -> int:
    return int((inputs["labels_N"] != inputs.get("ignore_index", -100)).sum())


def _flops(inputs: Inputs) -> int:
    """Head forward, gradient of hidden and gradient of the weight."""
    return 6 * _labelled(inputs) * inputs["weight_VM"].numel()


def _bytes_moved(inputs: Inputs) -> int:
    """Hidden rows and the weight read, their gradients written."""
    elements = _labelled(inputs) * inputs["hidden_NM"].shape[-1] + inputs["weight_VM"].numel()
    return 2 * elements * inputs["hidden_NM"].element_size()


def _library_call(inputs: Inputs, triton: bool = False) -> tuple[Any, tuple]:
    hidden = inputs["hidden_NM"].reshape(-1, inputs["hidden_NM"].shape[-1])
    labels, bias = inputs["labels_N"].reshape(-1), inputs.get("bias_V")
    rows = (labels != inputs.get("ignore_index", -100)).nonzero().squeeze(1)
    options = (inputs.get("softcap"), inputs.get("logit_scale", 1.0), SEGMENT_ROWS)
    wanted = (hidden.requires_grad, inputs["weight_VM"].requires_grad, bias is not None and bias.requires_grad)
    hidden = hidden.detach()[rows].requires_grad_(hidden.requires_grad)
    return torch.ops.lemo.linear_ce.default, (
        hidden,
        inputs["weight_VM"],
        labels[rows],
        bias,
        *options,
        *wanted,
        triton,
    )


def _case(name: str, *gradients: str, ulps: float = 4.0, **options: Any) -> Case:
    return Case(name, lambda g: _inputs(g, **options), gradients or ("hidden_NM", "weight_VM"), ulps=ulps)


SPEC = OpSpec(
    name="linear_ce",
    run=_run,
    reference=linear_ce_reference,
    cases=(
        _case("frozen head", "hidden_NM"),
        _case("trainable head"),
        _case("trainable head only", "weight_VM"),
        _case("bias", "hidden_NM", "weight_VM", "bias_V", bias=True),
        _case("all labelled", ignored=0.0),
        _case("none labelled", "hidden_NM", "weight_VM", "bias_V", ignored=1.0, bias=True),
        _case("batch", shape=(2, 9, 6)),
        _case("softcap", softcap=2.0),
        _case("logit scale", logit_scale=0.25),
        _case("softcap, scale, bias", "hidden_NM", "weight_VM", "bias_V", softcap=3.0, logit_scale=1.5, bias=True),
        _case("num_items", num_items=40),
        _case("num_items tensor", num_items=torch.tensor(40)),
        _case("ignore index 0", ignore_index=0),
        _case("gaps", gaps=True),
        _case("large logits", "hidden_NM", scale=40.0),
        _case("vocabulary of several tiles", shape=(5, 4), vocabulary=41),
    ),
    benchmark_shapes=(
        _case("8192x4096, 128256", "hidden_NM", shape=(8192, 4096), vocabulary=128256, ignored=0.0),
        _case("8192x4096, 128256, trainable", shape=(8192, 4096), vocabulary=128256, ignored=0.0),
    ),
    flops=_flops,
    bytes_moved=_bytes_moved,
    library_call=_library_call,
    kernel_call=partial(_library_call, triton=True),
)
