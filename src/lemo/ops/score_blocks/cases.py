"""Inputs of score_blocks for tests and benchmarks. Features of a predictor are fp32, whatever the model's dtype."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lemo.ops.score_blocks.op import score_blocks
from lemo.ops.score_blocks.reference import score_blocks_reference
from lemo.testing import Case, Inputs, OpSpec, with_gaps

NETS = ("query", "key")
MAPS = ("weight1", "bias1", "weight2", "bias2", "weight3", "bias3")


def _arguments(inputs: Inputs) -> Inputs:
    """The op's arguments from tensors by name; 16-bit values become fp32, as a predictor's are."""
    low = (torch.float16, torch.bfloat16)
    made = {name: t.float() if isinstance(t, Tensor) and t.dtype in low else t for name, t in inputs.items()}
    nets = {f"{net}_net": tuple(made.pop(f"{net}_{name}") for name in MAPS) for net in NETS}
    standard = made.pop("mean_E"), made.pop("scale_E")
    return {**made, **nets, "standard": standard}


def _run(**inputs: Any) -> Tensor:
    return score_blocks(**_arguments(inputs))


def _run_reference(**inputs: Any) -> Tensor:
    return score_blocks_reference(**_arguments(inputs))


def _inputs(
    generator: torch.Generator,
    *,
    documents: tuple[int, ...] = (21,),
    features: int = 30,
    query_widths: tuple[int, int] = (8, 6),
    key_widths: tuple[int, int] = (7, 9),
    rank: int = 5,
    gaps: bool = False,
    offset: float = 0.0,
) -> Inputs:
    """Documents of the given blocks; `offset` is added to Q's outputs, so that their mean is far from zero."""
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    blocks = draw(sum(documents), features)
    made: Inputs = {"features_KE": with_gaps(blocks) if gaps else blocks, "mean_E": draw(features)}
    made["scale_E"] = torch.rand(features, generator=generator, dtype=torch.float64) + 0.5
    for net, widths in zip(NETS, (query_widths, key_widths), strict=True):
        sizes = (features, *widths, rank)
        for place in range(3):
            made[f"{net}_weight{place + 1}"] = draw(sizes[place + 1], sizes[place]) / sizes[place] ** 0.5
            made[f"{net}_bias{place + 1}"] = draw(sizes[place + 1])
    made["query_bias3"] += offset
    ends = torch.tensor(documents).cumsum(0)
    made["end_K"] = torch.repeat_interleave(ends, torch.tensor(documents))
    return made


def _flops(inputs: Inputs) -> int:
    return 2 * len(inputs["end_K"]) * sum(inputs[f"{net}_weight{place}"].numel() for net in NETS for place in (1, 2, 3))


def _bytes_moved(inputs: Inputs) -> int:
    return 4 * sum(t.numel() for t in inputs.values() if isinstance(t, Tensor) and t.is_floating_point())


def _case(name: str, **options: Any) -> Case:
    return Case(name, lambda g: _inputs(g, **options), gradcheck=False, ulps=16.0)


PREDICTOR = {"features": 387, "query_widths": (64, 64), "key_widths": (64, 64), "rank": 32}

SPEC = OpSpec(
    name="score_blocks",
    run=_run,
    reference=_run_reference,
    cases=(
        _case("one document"),
        _case("packed", documents=(9, 1, 30, 2)),
        _case("one block", documents=(1,)),
        _case("many tiles", documents=(150,)),
        _case("packed, many tiles", documents=(70, 16, 80)),
        _case("wider than a run of features", features=141),
        _case("wide nets", query_widths=(70, 33), key_widths=(17, 64), rank=20),
        _case("rank 1", rank=1),
        _case("rank 16", rank=16),
        _case("gaps", gaps=True),
        _case("offset", offset=100.0, documents=(130, 20)),
        _case("sizes of a predictor", **PREDICTOR),
    ),
    benchmark_shapes=(
        _case("128 blocks", documents=(128,), **PREDICTOR),
        _case("2048 blocks", documents=(2048,), **PREDICTOR),
    ),
    flops=_flops,
    bytes_moved=_bytes_moved,
)
