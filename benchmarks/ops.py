"""Checks ops against their references, then times them; a time is only printed for an op that passed.

    python benchmarks/ops.py [block_score scatter_rows ...] [--out FOLDER]

block_score is timed against the forward of torch's scaled_dot_product_attention on the same queries and keys, by the
fastest of its backends; attend_rows against causal SDPA over the whole sequence; ops that move rows (row_ops.py)
against a copy and the naive way; the others against their references. Calls alternate; the table shows medians, and
every sample goes into FOLDER/ops.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# Run as a script, too: then this folder is on the path, and not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lemo.ops
from benchmarks.local_attention import benchmark_attend_local
from benchmarks.row_ops import benchmark_row_op
from benchmarks.timing import Samples, alternating, peak_bytes
from lemo.measure.record import Record
from lemo.ops.attend_rows.cases import flops, pairs, segments_of
from lemo.ops.block_score.cases import large
from lemo.testing import (
    Case,
    Inputs,
    OpSpec,
    check_case,
    check_error_budget,
    outputs_and_gradients,
    specs_of,
    tensors_of,
)

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
    for name, spec in ((folder, spec) for folder in chosen.ops for spec in specs_of(f"lemo.ops.{folder}")):
        if problem := check(spec, device):
            print(f"{spec.name}: NOT TIMED, it misses its reference: {problem}", file=sys.stderr)
            failed = True
        elif name == "block_score":
            failed |= not benchmark_block_score(spec, device, chosen)
        elif name == "attend_rows":
            failed |= not benchmark_attend_rows(spec, device, chosen)
        elif name == "attend_local":
            failed |= not benchmark_attend_local(spec, device, chosen)
        elif spec.ceiling == "copy":
            benchmark_row_op(spec, device, chosen)
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


# ---- attend_rows


def benchmark_attend_rows(spec: OpSpec, device: str, chosen: argparse.Namespace) -> bool:
    """Times half of the rows against causal attention of all; returns whether every shape met the reference."""
    good = True
    if device == "cpu":
        print("attend_rows: its benchmark shapes need a CUDA device")
        return good
    print("share: time over that of causal SDPA on all rows; ideal: pairs of query and key over those of all rows")
    for case in spec.benchmark_shapes:
        inputs = case.inputs(SEED, torch.bfloat16, device)
        try:
            _check_attend_rows(spec, case, inputs)
        except AssertionError as error:
            print(f"{case.name} NOT TIMED: {error}", file=sys.stderr)
            good = False
            continue
        everything = _full_attention(inputs)
        functions = {
            "forward": partial(_without_gradient, spec.run, inputs),
            "SDPA forward": partial(_without_gradient, _causal, everything),
            "forward and backward": partial(_forward_backward, spec.run, inputs, case.gradients),
            "SDPA forward and backward": partial(_forward_backward, _causal, everything, tuple(everything)),
        }
        samples = alternating(functions, device, chosen.repeats)
        _report_attend_rows(case, inputs, samples, chosen.out / "ops.jsonl")
        if "own_key_GND" not in inputs:
            _print_attend_tilings(inputs, device, chosen.repeats)
    return good


def _without_gradient(function: Callable[..., Any], inputs: Inputs) -> None:
    with torch.no_grad():
        function(**inputs)


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def _full_attention(inputs: Inputs) -> Inputs:
    """Queries, keys and values of every row, in the layout of a model's projections."""
    groups, rows, head_dim = inputs["key_GKD"].shape
    sizes = {"query": len(inputs["query_HND"]), "key": groups, "value": groups}
    made = {name: inputs["key_GKD"].new_empty(1, rows, count, head_dim).normal_() for name, count in sizes.items()}
    return {name: t.transpose(1, 2).requires_grad_() for name, t in made.items()}


def _check_attend_rows(spec: OpSpec, case: Case, inputs: Inputs) -> None:
    """Output and the queries' gradient of a sample of rows; the reference of all would not fit."""
    count, device = inputs["query_HND"].shape[1], inputs["query_HND"].device
    sample = torch.arange(count % 97, count, max(count // 128, 1), device=device)
    actual = outputs_and_gradients(spec.run, inputs, ("query_HND",))
    drawn = torch.randn(actual["output 0"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = drawn.to(device, torch.bfloat16)[:, sample]
    found = {}
    for dtype in (torch.float64, torch.bfloat16):
        few = {name: value for name, value in inputs.items() if not name.startswith("own_")}
        few |= {name: few[name].detach().to(dtype) for name in ("query_HND", "key_GKD", "value_GKD")}
        few |= {"queries_position": inputs["queries_position"][sample], "queries_lengths": (len(sample),)}
        few["query_HND"] = few["query_HND"][:, sample].requires_grad_()
        output = spec.reference(**few)
        found[dtype] = output, torch.autograd.grad(output, few["query_HND"], weight.to(dtype))[0]
    for at, name in enumerate(("output 0", "gradient of query_HND")):
        working, exact = found[torch.bfloat16][at], found[torch.float64][at]
        check_error_budget(actual[name][:, sample], working, exact, ulps=case.ulps, what=f"{case.name}: {name}")


def _report_attend_rows(case: Case, inputs: Inputs, samples: Samples, path: Path) -> None:
    ideal = pairs(inputs) / sum(range(inputs["key_GKD"].shape[1] + 1))
    for what, backward in (("forward", False), ("forward and backward", True)):
        both = {"baseline": samples[f"SDPA {what}"], "lemo": samples[what]}
        theirs_ms, ours_ms = (statistics.median(ms) for ms in both.values())
        rate = flops(inputs, backward) / ours_ms / 1e9
        print(
            f"{case.name:<46} {what:<21} {ours_ms:>8.3f} ms {rate:>6.1f} TFLOP/s   SDPA {theirs_ms:>8.3f} ms   "
            f"share {ours_ms / theirs_ms:.3f}, ideal {ideal:.3f}"
        )
        setting = {"shape": case.name, "dtype": "bfloat16", "pair_share": ideal, "tera_flops_per_s": rate}
        setting |= {"statistic": "overhead_of_medians", "samples_unit": "ms"}
        name = f"ops/attend_rows/{what.replace(' ', '_')}_time_over_sdpa/{case.name}"
        Record.measure(name, "ratio", both, setting, script=SCRIPT, seeds=(SEED,)).append(path)


def _print_attend_tilings(inputs: Inputs, device: str, repeats: int) -> None:
    """Milliseconds of every tiling that fits, for each of the three kernels; the first is the one in use."""
    from lemo.ops.attend_rows import kernel, tiling

    query, key, value = (inputs[name].detach() for name in ("query_HND", "key_GKD", "value_GKD"))
    work = tiling.Work.between(*segments_of(dict(inputs)))
    scaling, grad = inputs["scaling"], query
    saved = kernel.forward(query, key, value, work, scaling, None)
    sums = saved[1], kernel.backward_query(grad, query, key, value, saved, work, scaling, None)[1]
    calls = {
        "forward": partial(kernel.forward, query, key, value, work, scaling, None),
        "query": partial(kernel.backward_query, grad, query, key, value, saved, work, scaling, None),
        "key": partial(kernel.backward_key, grad, query, key, value, sums, work, scaling, None, True),
    }
    for kind, call in calls.items():
        fitting = {str(t): partial(call, tiling=t) for t in tiling.tilings(kind, query.shape[2], query.dtype)}
        timed = alternating(fitting, device, max(repeats // 4, 3))
        print(f"    {kind:<8}" + ", ".join(f"{name}: {statistics.median(ms):.3f}" for name, ms in timed.items()))


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
