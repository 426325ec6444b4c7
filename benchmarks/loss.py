"""The segmented loss of a frozen head against Liger's fused one: time of forward and backward, and peak memory.

    python -m benchmarks.loss [--rows 65536] [--vocabulary 128256] [--width 4096] [--out FILE]

Both get the same bf16 hidden states, weight and labels and take turns. Before they are timed their losses and
gradients must agree. GiB are those above the inputs and the gradient of the hidden states. Without liger-kernel only
the memory is answered. A second pass with labels on a share of the rows shows what dropping unlabelled rows before the
head is worth.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lemo.measure.record import Record
from lemo.ops import linear_ce

SCRIPT = "benchmarks/loss.py"
SEED = 0
BAR_ROWS, BAR_VOCABULARY, BAR_WIDTH = 65536, 128256, 4096
# bf16 gradients of two orders of summation; a wrong gradient is off by its own size.
AGREEMENT = {"loss": 1e-3, "gradient": 2e-2}

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def liger_loss() -> Loss | None:
    """Liger's fused linear cross-entropy; None where it is not installed."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        print(f"no comparison: liger-kernel cannot be imported ({error})", file=sys.stderr)
        return None
    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, labels: loss(weight, hidden, labels)


def draw(options: argparse.Namespace, share: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight and labels; a share of the rows carries one."""
    generator = torch.Generator(options.device).manual_seed(SEED)
    make = partial(torch.randn, generator=generator, device=options.device, dtype=torch.bfloat16)
    hidden = make(options.rows, options.width).requires_grad_()
    weight = make(options.vocabulary, options.width).mul_(options.width**-0.5)
    labels = torch.randint(options.vocabulary, (options.rows,), generator=generator, device=options.device)
    labels[torch.rand(options.rows, generator=generator, device=options.device) >= share] = -100
    return hidden, weight, labels


def step(loss: Loss, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and the gradient of the hidden states."""
    value = loss(*inputs)
    return value.detach(), torch.autograd.grad(value, inputs[0])[0]


def disagreement(losses: dict[str, Loss], inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> str | None:
    """What differs between the two; None when nothing does."""
    (value, gradient), (other, other_gradient) = (step(loss, inputs) for loss in losses.values())
    loss_gap = float((value - other).abs() / other.abs())
    gap, size = 0.0, 0.0
    # In slices: fp32 copies of both gradients would take as much again as what is measured.
    for mine, theirs in zip(gradient.split(4096), other_gradient.split(4096), strict=True):
        gap += float((mine.float() - theirs.float()).square().sum())
        size += float(theirs.float().square().sum())
    gradient_gap = (gap / size) ** 0.5
    print(f"relative difference of the losses {loss_gap:.2e}, of the gradients {gradient_gap:.2e}")
    if loss_gap > AGREEMENT["loss"] or gradient_gap > AGREEMENT["gradient"]:
        return f"loss differs by {loss_gap:.2e}, gradient by {gradient_gap:.2e}"
    return None


def milliseconds(function: Callable[[], Any], device: str) -> float:
    """Wall time between synchronisations."""
    synchronize = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    synchronize()
    begin = time.perf_counter()
    function()
    synchronize()
    return 1e3 * (time.perf_counter() - begin)


def peak_gib(loss: Loss, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> float:
    """GiB that a step takes above its inputs and the gradient that it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(loss, inputs)
    torch.cuda.synchronize()
    above = torch.cuda.max_memory_allocated() - before
    return (above - inputs[0].numel() * inputs[0].element_size()) / 2**30


def alternate(functions: dict[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each, in turns; who goes first changes every round."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(-1, repeats):
        for name in sorted(functions, reverse=turn % 2 == 0):
            took = milliseconds(functions[name], device)
            if turn >= 0:
                samples[name].append(took)
    return samples


def compare_tilings(options: argparse.Namespace) -> None:
    """Prints the time of each way to cut the kernel's work on one segment; the first is the one in use."""
    from lemo.ops.linear_ce import kernel

    logits = torch.randn(2048, options.vocabulary, dtype=torch.bfloat16, device=options.device)
    labels = torch.zeros(len(logits), dtype=torch.int64, device=options.device)
    loss = torch.empty(len(logits), device=options.device)
    for tiling in kernel.CANDIDATES:
        call = partial(kernel.launch, logits, labels, loss, None, 1.0, True, tiling)
        took = [milliseconds(call, options.device) for _ in range(8)]
        rate = 3 * logits.numel() * 2 / statistics.median(took[2:]) / 1e6
        print(f"    kernel {tiling}: {statistics.median(took[2:]):.3f} ms a segment, {rate:.0f} GB/s of 3 passes")


def measure(options: argparse.Namespace, share: float, baseline: Loss | None) -> bool:
    """Measures one share of labelled rows; returns whether the two agreed."""
    inputs = draw(options, share)
    losses: dict[str, Loss] = {"lemo": linear_ce} | ({"baseline": baseline} if baseline else {})
    # Compiles, warms up, and shows that the same thing is computed before anything is timed.
    if baseline and (problem := disagreement(losses, inputs)):
        print(f"NOT TIMED: {problem}", file=sys.stderr)
        return False
    setting = {name: getattr(options, name) for name in ("rows", "vocabulary", "width")}
    setting |= {"labelled": share, "dtype": "bfloat16", "head": "frozen"}
    sizes = (options.rows, options.vocabulary, options.width, share, options.device)
    answers = sizes == (BAR_ROWS, BAR_VOCABULARY, BAR_WIDTH, 1.0, "cuda")
    record = partial(Record.measure, script=SCRIPT, seeds=[SEED])
    if options.device == "cuda":
        step(linear_ce, inputs)
        peaks = {name: [peak_gib(loss, inputs) for _ in range(3)] for name, loss in losses.items()}
        record(
            f"loss/gib/{share:g}",
            "GiB",
            peaks["lemo"],
            {**setting, "statistic": "max", "liger_gib": max(peaks.get("baseline", [])) if baseline else None},
            bar="C.loss_gib" if answers else None,
        ).append(options.out)
        print(f"labelled {share:g}: " + ", ".join(f"{name} {max(gib):.3f} GiB above" for name, gib in peaks.items()))
    samples = alternate(
        {name: partial(step, loss, inputs) for name, loss in losses.items()}, options.device, options.repeats
    )
    print(f"labelled {share:g}: " + ", ".join(f"{name} {statistics.median(ms):.1f} ms" for name, ms in samples.items()))
    if baseline:
        setting |= {"statistic": "overhead_of_medians", "samples_unit": "ms", "over": "Liger"}
        made = record(f"loss/time/{share:g}", "ratio", samples, setting, bar="C.loss_time" if answers else None)
        print(f"labelled {share:g}: {made.append(options.out).value:.3f} of Liger's time")
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=BAR_ROWS)
    parser.add_argument("--vocabulary", type=int, default=BAR_VOCABULARY)
    parser.add_argument("--width", type=int, default=BAR_WIDTH)
    parser.add_argument("--labelled", type=float, nargs="+", default=[1.0, 0.3], help="shares of the rows")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tilings", action="store_true", help="also time every tiling of the kernel")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results" / "loss.jsonl")
    options = parser.parse_args(arguments)
    baseline = liger_loss() if options.device == "cuda" else None
    agreed = [measure(options, share, baseline) for share in options.labelled]
    if options.tilings and options.device == "cuda":
        compare_tilings(options)
    return 0 if all(agreed) else 1


if __name__ == "__main__":
    sys.exit(main())
