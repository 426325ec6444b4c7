"""Checks ops against their references, then times them; a time is only printed for an op that passed.

    python benchmarks/ops.py [block_score scatter_rows ...] [--out FOLDER]

block_score is timed against the forward of torch's scaled_dot_product_attention on the same queries and keys, by the
fastest of its backends; the other ops against their references. Calls alternate; the table shows medians, and every
sample goes into FOLDER/ops.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import lemo.ops
from lemo.measure.record import Record
from lemo.ops.block_score.cases import large
from lemo.testing import Case, Inputs, OpSpec, check_case, check_error_budget, tensors_of

SCRIPT = "benchmarks/ops.py"
BAR, BAR_ROWS = "A.block_score_vs_sdpa", (8192, 16384, 32768)
SEED = 0
# The matrix units sum products of 16-bit numbers with fewer guard bits than ordinary fp32 addition.
TENSOR_CORE_ULPS = 32.0
SDPA_BACKENDS = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}

Samples = dict[str, list[float]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.parent.name for path in Path(lemo.ops.__file__).parent.glob("*/cases.py"))
    parser.add_argument("ops", nargs="*", default=names, help=f"which, all by default: {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--repeats", type=int, default=20, help="samples of each")
    parser.add_argument("--rows", type=int, nargs="+", default=list(BAR_ROWS), help="lengths of block_score")
    parser.add_argument("--heads", type=int, default=32)
    chosen = parser.parse_args(arguments)
    if unknown := sorted(set(chosen.ops) - set(names)):
        parser.error(f"unknown ops: {', '.join(unknown)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("no CUDA device: references are timed on the CPU, and no bar is answered")
    torch.backends.cuda.matmul.allow_tf32 = False
    failed = False
    for name in chosen.ops:
        spec: OpSpec = importlib.import_module(f"lemo.ops.{name}.cases").SPEC
        if problem := check(spec, device):
            print(f"{name}: NOT TIMED, it misses its reference: {problem}", file=sys.stderr)
            failed = True
        elif name == "block_score":
            failed |= not benchmark_block_score(spec, device, chosen)
        else:
            benchmark_against_reference(spec, device, chosen)
    return int(failed)


def check(spec: OpSpec, device: str) -> str | None:
    """What is wrong with the op on its small cases; None when nothing is."""
    for case in spec.cases:
        for dtype in (torch.float32, torch.bfloat16):
            if spec.name == "block_score" and dtype == torch.bfloat16:
                case = dataclasses.replace(case, ulps=TENSOR_CORE_ULPS)
            try:
                check_case(spec, case, dtype, device)
            except Exception as error:
                return f"{case.name}: {type(error).__name__}: {error}"
    print(f"{spec.name}: {len(spec.cases)} cases within the error budget in fp32 and bf16 on {device}")
    return None


def alternating(functions: dict[str, Callable[[], Any]], device: str, repeats: int) -> Samples:
    """Milliseconds of each function, called in turn."""
    samples: Samples = {name: [] for name in functions}
    for round_ in range(repeats + 3):
        for name, function in functions.items():
            elapsed = _milliseconds(function, device)
            if round_ >= 3:  # the first rounds compile and warm up
                samples[name].append(elapsed)
    return samples


def _milliseconds(function: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        begin = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - begin)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def peak_bytes(function: Callable[[], Any], device: str) -> int | None:
    """Bytes that a call allocates on top of what lives before it."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# ---- block_score


def benchmark_block_score(spec: OpSpec, device: str, chosen: argparse.Namespace) -> bool:
    """Times every length; returns whether all of them met the reference."""
    print(
        f"{'rows':>7} {'block_score':>12} {'SDPA':>9} {'backend':>8} {'ratio':>6} {'TFLOP/s':>8} {'peak':>9}   tilings"
    )
    good = True
    for rows in chosen.rows:
        case = large(rows, chosen.heads, chosen.heads)
        inputs = _on_device(case, device)
        run = partial(spec.run, **inputs)
        try:
            _check_large(spec, inputs, run())
        except AssertionError as error:
            print(f"{rows:>7} NOT TIMED: {error}", file=sys.stderr)
            good = False
            continue
        sdpa = _sdpa_functions(inputs, device)
        samples = alternating({"block_score": run, **sdpa}, device, chosen.repeats)
        fastest = min(sdpa, key=lambda name: statistics.median(samples[name]))
        tilings = _tilings(inputs, device, chosen.repeats)
        peak = peak_bytes(run, device)
        _report_block_score(spec, inputs, samples, fastest, tilings, peak)
        if device == "cuda":
            _record_block_score(inputs, samples, fastest, tilings, peak, chosen.out / "ops.jsonl")
    return good


def _on_device(case: Case, device: str) -> Inputs:
    """bf16 on the device, the layout of the blocks on the CPU as in a Layout."""
    inputs = case.inputs(SEED, torch.bfloat16, device)
    return {name: t.cpu() if name.startswith("block_") else t for name, t in inputs.items()}


def _check_large(spec: OpSpec, inputs: Inputs, actual: torch.Tensor) -> None:
    operands = ("query_HND", "key_GND")
    exact = spec.reference(**{k: v.double() if k in operands else v for k, v in inputs.items()})
    working = spec.reference(**inputs)
    check_error_budget(actual, working, exact, ulps=TENSOR_CORE_ULPS, what=f"block_score {actual.shape}")


def _sdpa_functions(inputs: Inputs, device: str) -> dict[str, Callable[[], Any]]:
    """Causal attention on the same queries and keys, by every backend that accepts them."""
    query, key = inputs["query_HND"][None], inputs["key_GND"][None]
    value = torch.randn_like(key)

    def attend(backend: SDPBackend | None) -> torch.Tensor:
        with torch.no_grad():
            if backend is None:
                return F.scaled_dot_product_attention(query, key, value, is_causal=True)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    functions = {}
    for name, backend in SDPA_BACKENDS.items():
        if device == "cpu" and backend is not None:
            continue
        try:
            attend(backend)
        except RuntimeError as error:
            print(f"        SDPA {name} cannot run: {str(error).splitlines()[0]}")
        else:
            functions[name] = partial(attend, backend)
    return functions


def _tilings(inputs: Inputs, device: str, repeats: int) -> Samples:
    """Milliseconds of each tiling that fits; the first is the one in use."""
    if device == "cpu":
        return {}
    from lemo.ops.block_score import kernel

    query, block_rows = inputs["query_HND"], int(inputs["block_length_K"].max())
    layout = tuple(inputs[f"block_{part}_K"] for part in ("start", "length", "document"))
    arguments = (query, inputs["key_GND"], layout, inputs["scaling"], None, block_rows)
    groups = [dataclasses.replace(kernel.CANDIDATES[0], group=group) for group in (4, 16)]
    functions = {}
    for tiling in (*kernel.CANDIDATES, *groups):
        if kernel.fits(tiling, query.shape[-1], block_rows, query.dtype):
            name = f"{tiling.query_rows}x{tiling.key_rows} w{tiling.warps} s{tiling.stages} g{tiling.group}"
            functions[name] = partial(kernel.launch, *arguments, tiling)
    return alternating(functions, device, max(repeats // 2, 3))


def _report_block_score(
    spec: OpSpec, inputs: Inputs, samples: Samples, fastest: str, tilings: Samples, peak: int | None
) -> None:
    ours, theirs = (statistics.median(samples[name]) for name in ("block_score", fastest))
    rate = spec.flops(inputs) / ours / 1e9
    memory = "-" if peak is None else f"{peak / 2**20:.1f} MiB"
    tiling = ", ".join(f"{name}: {statistics.median(ms):.2f}" for name, ms in tilings.items())
    rows = inputs["query_HND"].shape[1]
    times = f"{rows:>7} {ours:>9.3f} ms {theirs:>6.3f} ms {fastest:>8} {ours / theirs:>6.3f}"
    print(f"{times} {rate:>8.1f} {memory:>9}   {tiling}")


def _record_block_score(
    inputs: Inputs, samples: Samples, fastest: str, tilings: Samples, peak: int | None, path: Path
) -> None:
    heads, rows, head_dim = inputs["query_HND"].shape
    setting = {
        "rows": rows,
        "heads": heads,
        "key_heads": inputs["key_GND"].shape[0],
        "head_dim": head_dim,
        "block_size": int(inputs["block_length_K"].max()),
        "dtype": "bfloat16",
        "sdpa_backend": fastest,
        "tf32": False,
    }
    measure = partial(Record.measure, script=SCRIPT, seeds=(SEED,))
    # Every backend and tiling that was timed stays in the Record beside the two that are compared.
    everything = {"baseline": samples[fastest], "lemo": samples["block_score"]}
    everything |= {f"sdpa {name}": ms for name, ms in samples.items() if name not in ("block_score", fastest)}
    everything |= {f"tiling {name}": ms for name, ms in tilings.items()}
    measure(
        f"ops/block_score/time_over_sdpa/{rows}",
        "ratio",
        everything,
        {**setting, "statistic": "overhead_of_medians", "samples_unit": "ms"},
        bar=f"{BAR}/{rows}" if rows in BAR_ROWS and heads == 32 else None,
    ).append(path)
    measure(f"ops/block_score/peak_memory/{rows}", "bytes", [float(peak or 0)], {**setting, "statistic": "max"}).append(
        path
    )


# ---- all other ops


def benchmark_against_reference(spec: OpSpec, device: str, chosen: argparse.Namespace) -> None:
    """Times forward and backward of the op and of its reference on every benchmark shape."""
    if device == "cpu":
        print(f"{spec.name}: its benchmark shapes need a CUDA device")
        return
    for case in spec.benchmark_shapes:
        inputs = case.inputs(SEED, torch.bfloat16, device)
        functions = {
            "lemo": partial(_forward_backward, spec.run, inputs, case.gradients),
            "baseline": partial(_forward_backward, spec.reference, inputs, case.gradients),
        }
        samples = alternating(functions, device, chosen.repeats)
        peaks = {name: peak_bytes(function, device) or 0 for name, function in functions.items()}
        ours, theirs = (statistics.median(samples[name]) for name in ("lemo", "baseline"))
        print(
            f"{spec.name} {case.name}: {ours:.3f} ms, reference {theirs:.3f} ms; "
            f"{spec.flops(inputs) / ours / 1e9:.1f} TFLOP/s, {spec.bytes_moved(inputs) / ours / 1e6:.0f} GB/s; "
            f"peak {peaks['lemo'] / 2**20:.0f} MiB, reference {peaks['baseline'] / 2**20:.0f} MiB"
        )
        setting = {"shape": case.name, "dtype": "bfloat16", "statistic": "overhead_of_medians", "samples_unit": "ms"}
        measure = partial(Record.measure, script=SCRIPT, seeds=(SEED,))
        measure(f"ops/{spec.name}/time_over_reference", "ratio", samples, setting).append(chosen.out / "ops.jsonl")
        memory = {name: [float(peak)] for name, peak in peaks.items()}
        if min(peaks.values()) > 0:
            setting = {"shape": case.name, "dtype": "bfloat16", "statistic": "ratio_of_max", "samples_unit": "bytes"}
            measure(f"ops/{spec.name}/peak_memory", "ratio", memory, setting).append(chosen.out / "ops.jsonl")


def _forward_backward(function: Callable[..., Any], inputs: Inputs, gradients: tuple[str, ...]) -> None:
    outputs = [t for t in tensors_of(function(**inputs)) if t.requires_grad]
    if gradients and outputs:
        torch.autograd.grad(outputs, [inputs[name] for name in gradients], [torch.ones_like(t) for t in outputs])


if __name__ == "__main__":
    raise SystemExit(main())
