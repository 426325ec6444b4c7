"""Times the ops that move rows; `benchmarks/ops.py` calls it.

Against a copy measured beside them, their reference, torch.compile of it, and the naive way: index, compute, zeros and
scatter, add. The share is minimum bytes over time, over bytes over
time of a copy of 1 GiB in the same turns.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Samples, alternating
from lemo.measure.record import Record
from lemo.ops.stream_rows import cases as stream_rows
from lemo.testing import Inputs, OpSpec

SCRIPT = "benchmarks/ops.py"
SEED = 0
COPY_BYTES = 1 << 30
# The shapes are too large for a processor; a test takes small ones.
DEVICE_NEEDED = True


def benchmark_row_op(spec: OpSpec, device: str, chosen: argparse.Namespace) -> None:
    """Times the op on its benchmark shapes; the first answers the bars."""
    if device == "cpu" and DEVICE_NEEDED:
        print(f"{spec.name}: its benchmark shapes need a CUDA device")
        return
    path = chosen.out / "ops.jsonl"
    for at, case in enumerate(spec.benchmark_shapes):
        inputs = case.inputs(SEED, torch.bfloat16, device)
        inputs = spec.prepare(inputs) if spec.prepare else inputs
        functions = {"lemo": spec.run, "reference": spec.reference, "naive": spec.naive}
        if at == 0:
            functions["compiled"] = torch.compile(spec.reference)
        samples = _time(functions, inputs, device, chosen.repeats)
        _report(f"{spec.name} {case.name}", samples, spec.bytes_moved(inputs))
        setting = {"shape": case.name, "op": spec.name}
        bar = f"C.ops_bandwidth/{spec.name.rstrip('_')}" if at == 0 else None
        _record_share(f"ops/{spec.name}", samples, spec.bytes_moved(inputs), setting, path, bar)
        bar = "C.gather_norm_vs_naive" if at == 0 and spec.name == "norm_rows" else None
        _record_ratios(f"ops/{spec.name}", samples, setting, path, bar)
        if spec.name.startswith("bypass_rows"):
            _print_tilings(spec, inputs, device, chosen.repeats)
        del inputs
        torch.cuda.empty_cache()
    if spec.name == "write_rows_":
        _benchmark_layers(device, chosen)


def _benchmark_layers(device: str, chosen: argparse.Namespace) -> None:
    """The whole output of a layer: write with residual add, and bypass of all other rows."""
    path = chosen.out / "ops.jsonl"
    for name, layer in stream_rows.LAYERS.items():
        inputs = {
            key: t.to(device, torch.bfloat16) if t.is_floating_point() else t.to(device)
            for key, t in layer.inputs(torch.Generator().manual_seed(SEED)).items()
        }
        functions = {"lemo": stream_rows.write_layer, "naive": stream_rows.naive_layer}
        functions["compiled"] = torch.compile(stream_rows.naive_layer)
        samples = _time(functions, inputs, device, chosen.repeats)
        shape = f"{name}, {layer.shape[0]}x{layer.shape[1]}, rank {layer.rank}"
        _report(f"output, bypass and residual in place, {shape}", samples, stream_rows.layer_bytes(inputs))
        setting = {"shape": shape, "op": "write_rows_ and bypass_rows_"}
        _record_share(
            f"ops/layer/{name}", samples, stream_rows.layer_bytes(inputs), setting, path, f"C.ops_bandwidth/{name}"
        )
        _record_ratios(f"ops/layer/{name}", samples, setting, path, f"C.scatter_vs_naive/{name}")


def _time(functions: dict[str, Callable[..., Any] | None], inputs: Inputs, device: str, repeats: int) -> Samples:
    """Milliseconds of each function and of a copy of COPY_BYTES; one that cannot run is named and left out."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    ready: dict[str, Callable[[], Any]] = {"copy": partial(target.copy_, source)}
    for name, function in functions.items():
        if function is None:
            continue
        call = partial(_without_gradient, function, inputs)
        try:
            call()
        except Exception as error:
            if name != "compiled":
                raise
            print(f"    torch.compile cannot run: {type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            ready[name] = call
    return alternating(ready, device, repeats, queued=True)


def _without_gradient(function: Callable[..., Any], inputs: Inputs) -> None:
    with torch.no_grad():
        function(**inputs)


def _report(what: str, samples: Samples, bytes_moved: int) -> None:
    ms = {name: statistics.median(values) for name, values in samples.items()}
    rate, copy_rate = bytes_moved / ms["lemo"] / 1e6, 2 * COPY_BYTES / ms["copy"] / 1e6
    others = ", ".join(
        f"{name} {ms[name]:.3f} ms ({ms[name] / ms['lemo']:.2f}x)" for name in ms if name not in ("lemo", "copy")
    )
    print(f"{what}: {ms['lemo']:.3f} ms, {rate:.0f} GB/s, {rate / copy_rate:.2f} of a copy's {copy_rate:.0f}; {others}")


def _record_share(
    name: str, samples: Samples, bytes_moved: int, setting: dict[str, Any], path: Path, bar: str | None
) -> None:
    """`baseline` is what a copy needs for the same bytes, so baseline over lemo is the share of its rate."""
    scale = bytes_moved / (2 * COPY_BYTES)
    both = {"baseline": [ms * scale for ms in samples["copy"]], "lemo": samples["lemo"]}
    setting = {**setting, "dtype": "bfloat16", "statistic": "ratio_of_medians", "samples_unit": "ms"}
    setting |= {"bytes_moved": bytes_moved, "copy_bytes": 2 * COPY_BYTES}
    Record.measure(
        f"{name}/share_of_copy_rate/{setting['shape']}", "share", both, setting, script=SCRIPT, seeds=(SEED,), bar=bar
    ).append(path)


def _record_ratios(name: str, samples: Samples, setting: dict[str, Any], path: Path, bar: str | None) -> None:
    """Time of the reference, torch.compile of it and the naive way over ours; `bar` is about the naive one."""
    setting = {**setting, "dtype": "bfloat16", "statistic": "ratio_of_medians", "samples_unit": "ms"}
    for other in ("reference", "compiled", "naive"):
        if other in samples:
            both = {"baseline": samples[other], "lemo": samples["lemo"]}
            answers = bar if other == "naive" else None
            full = f"{name}/gain_over_{other}/{setting['shape']}"
            Record.measure(full, "ratio", both, setting, script=SCRIPT, seeds=(SEED,), bar=answers).append(path)


def _print_tilings(spec: OpSpec, inputs: Inputs, device: str, repeats: int) -> None:
    """Milliseconds of every tiling that fits; the first is the one in use."""
    from lemo.ops.stream_rows import kernel

    maps = inputs["down_MR"], inputs["up_RM"]
    rstd = inputs.get("rstd_s")
    functions = {}
    for tiling in kernel.tilings(maps[0].shape[1], torch.bfloat16):
        if rstd is None:
            call = partial(kernel.bypass, inputs["stream_NM"], inputs["rows_s"], *maps, 1e-6, None, tiling)
        else:
            call = partial(kernel.bypass_backward, inputs["grad_NM"], inputs["rows_s"], rstd, *maps, tiling)
        functions[str(tiling)] = call
    timed = alternating(functions, device, max(repeats // 2, 3), queued=True)
    print("    tilings: " + ", ".join(f"{name}: {statistics.median(ms):.3f}" for name, ms in timed.items()))
