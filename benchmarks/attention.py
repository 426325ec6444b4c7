"""Times explicit attention: compact causal, and kept queries on all keys, by every kernel that can run.

    python benchmarks/attention.py [--parts probe compact all tilings] [--lengths 16384 65536] [--keeps 0.3 0.5]
        [--heads 32/8 32/32] [--cuts 2048/4096/512 ...] [--candidates triton dense] [--out FOLDER]

Rates count useful FLOPs only: 4·D·H per pair of a query and a key that it sees forward, 10·D·H backward. Kept queries
are random blocks of 64; each candidate must agree with the Triton kernels before it is timed, and is set against the
fastest vendor kernel's causal attention of all rows, timed in turns with it. The best candidate of each length goes
into FOLDER/attention.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lemo.measure.record import Record
from lemo.ops import attend_backward, attend_forward, plan_rows
from lemo.ops.attend_rows import stripes, tiling, vendor
from lemo.ops.attend_rows.cuts import Cut
from lemo.ops.attend_rows.reference import Segments

SCRIPT, SEED, BLOCK, HEAD_DIM = "benchmarks/attention.py", 0, 64, 128
BAR, BAR_LENGTH = "C.kv_all_attention", 65536
PASSES = ("forward", "backward")
# Two bf16 results of sums that differ in order; a wrong kernel is off by the size of the values.
AGREEMENT = 0.03
EXTRA_TILINGS = {
    "forward": ("128x128w8s3", "128x64w8s2", "128x64w8s4", "128x64w4s2", "64x128w4s2", "64x64w4s3"),
    "query": ("128x64w8s3", "128x128w8s1", "128x64w8s1", "64x64w4s3", "64x128w4s2", "128x32w8s4"),
    "key": ("128x64w8s1", "128x32w8s3", "64x64w4s2", "64x64w4s3", "64x128w8s1", "128x128w8s1"),
}

Passes = dict[str, Callable[[], Any]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["probe", "compact", "all"])
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 9856, 19712, 32768], help="of compact attention")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, BAR_LENGTH], help="keys of kept x all")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--heads", nargs="+", default=["32/8", "32/32"], help="query heads / key heads")
    parser.add_argument("--cuts", nargs="+", default=["2048/4096/512"], help="chunk/stripe/step of the rectangles")
    parser.add_argument("--candidates", nargs="+", default=["triton", "dense"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device; nothing was measured")
        return 0
    torch.manual_seed(SEED)
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    parts = {"probe": probe, "compact": time_compact, "all": time_all, "tilings": time_tilings}
    return max(parts[part](chosen) for part in chosen.parts)


def draw(heads: int, rows: int) -> Tensor:
    """(H, N, D) bf16, heads inside rows in memory, as projections leave them."""
    return torch.randn(rows, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16).transpose(0, 1)


def milliseconds(functions: Passes, repeats: int) -> dict[str, list[float]]:
    """Samples of each function, called in turn after two rounds of warming up."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(repeats + 2):
        for name, function in functions.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            if round_ >= 2:
                samples[name].append(begin.elapsed_time(end))
    return samples


def tera_flops(pairs: int, heads: int, which: str, ms: list[float]) -> list[float]:
    """Useful rates of samples in milliseconds."""
    flops = (4 if which == "forward" else 10) * HEAD_DIM * heads * pairs
    return [flops / sample / 1e9 for sample in ms]


def first_error(function: Callable[[], Any]) -> str | None:
    """What a call raises, in one line."""
    try:
        function()
        torch.cuda.synchronize()
    except Exception as error:  # a benchmark shows whatever stops a candidate
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


# ---- what runs here


def probe(_: argparse.Namespace) -> int:
    """Which vendor kernels pass, with grouped and with repeated keys, and what packed cuDNN calls cost the host."""
    kernels = {
        "cudnn, grouped": vendor.CUDNN,
        "cudnn, repeated": vendor.CUDNN_REPEATED,
        "flash, grouped": vendor.FLASH,
        "flash, repeated": vendor.FLASH_REPEATED,
        "varlen": vendor.VARLEN,
    }
    for name, kernel in kernels.items():
        begin = time.perf_counter()
        reason = vendor.probe(kernel, torch.bfloat16, HEAD_DIM, torch.device("cuda", torch.cuda.current_device()))
        print(f"probe {name:<16} {time.perf_counter() - begin:6.2f} s  {reason or 'passed'}", flush=True)
    query, key, value = (draw(heads, 4096).transpose(0, 1) for heads in (32, 8, 8))
    ends = torch.tensor([0, 4096], dtype=torch.int32, device="cuda")

    def packed() -> None:
        torch.ops.aten._cudnn_attention_forward(
            query, key, value, None, ends, ends, 4096, 4096, True, 0.0, False, False, scale=0.1
        )

    error = first_error(packed)
    begin = time.perf_counter()
    for _call in range(5 if error is None else 0):
        packed()
    host_ms = (time.perf_counter() - begin) * 200
    print(f"packed cuDNN forward, lengths on the device: {error or f'{host_ms:.2f} ms of the host a call'}")
    _probe_shapes()
    return 0


def _probe_shapes() -> None:
    """What the first call of a dense kernel with a new shape costs the host: cuDNN builds a graph for each."""
    for kernel in vendor.dense_kernels(torch.bfloat16, HEAD_DIM, torch.device("cuda", torch.cuda.current_device())):
        for rows in (1792, 1920):
            query, key = draw(32, rows), draw(8, 4096)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            output, lse = kernel.forward(query, key, key, False, 0.1)
            torch.cuda.synchronize()
            middle = time.perf_counter()
            kernel.backward(query, query, key, key, output, lse, False, 0.1)
            torch.cuda.synchronize()
            first, second = 1e3 * (middle - begin), 1e3 * (time.perf_counter() - middle)
            print(f"first call with {rows} queries, {kernel.name}: forward {first:.1f} ms, backward {second:.1f} ms")


# ---- compact causal


def causal_passes(kernel: vendor.Dense, query: Tensor, key: Tensor, value: Tensor) -> Passes:
    """Both passes of a vendor's causal kernel."""
    scaling = HEAD_DIM**-0.5
    output, lse = kernel.forward(query, key, value, True, scaling)
    return {
        "forward": partial(kernel.forward, query, key, value, True, scaling),
        "backward": partial(kernel.backward, query, query, key, value, output, lse, True, scaling),
    }


def explicit_passes(tensors: tuple[Tensor, ...], queries: Any, keys: Any, backend: Any) -> Passes:
    """Both passes of the op; the gradient of the output is the query, any will do."""
    options = {"scaling": HEAD_DIM**-0.5, "backend": backend}
    saved = attend_forward(*tensors, queries, keys, **options)
    return {
        "forward": partial(attend_forward, *tensors, queries, keys, **options),
        "backward": partial(attend_backward, tensors[0], *tensors, *saved, queries, keys, **options),
    }


def time_compact(chosen: argparse.Namespace) -> int:
    """Causal attention of compact rows by every kernel."""
    print("compact causal, TFLOP/s forward / backward")
    device = torch.device("cuda", torch.cuda.current_device())
    for heads, groups in map(_split, chosen.heads):
        for rows in chosen.rows:
            tensors = draw(heads, rows), draw(groups, rows), draw(groups, rows)
            segment = Segments((0,), (rows,), torch.arange(rows, device="cuda"))
            candidates = {k.name: causal_passes(k, *tensors) for k in vendor.dense_kernels(
                torch.bfloat16, HEAD_DIM, device)}  # fmt: skip
            candidates["triton"] = explicit_passes(tensors, segment, segment, "triton")
            calls = {(n, which): f for n, passes in candidates.items() for which, f in passes.items()}
            samples = milliseconds(calls, chosen.repeats)
            rates = {
                key: statistics.median(tera_flops(rows * (rows + 1) // 2, heads, key[1], ms))
                for key, ms in samples.items()
            }
            shown = "   ".join(f"{n} {rates[n, 'forward']:5.0f} / {rates[n, 'backward']:5.0f}" for n in candidates)
            print(f"{rows:>7} rows {heads}/{groups}: {shown}", flush=True)
    return 0


def _split(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("/"))


# ---- kept queries, all keys


def kept_rows(length: int, keep: float) -> Segments:
    """Random blocks of one document."""
    blocks = -(-length // BLOCK)
    found = torch.randperm(blocks)[: max(round(blocks * keep), 1)].sort().values
    position = (found[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
    position = position[position < length].cuda()
    return Segments((0,), (len(position),), position)


def time_all(chosen: argparse.Namespace) -> int:
    """Kept queries on all keys by every candidate, against the fastest vendor kernel's causal attention."""
    device, failed = torch.device("cuda", torch.cuda.current_device()), False
    for heads, groups in map(_split, chosen.heads):
        for length in chosen.lengths:
            everything = draw(heads, length), draw(groups, length), draw(groups, length)
            fastest = vendor.dense_kernels(torch.bfloat16, HEAD_DIM, device)[0]
            baseline = causal_passes(fastest, *everything)
            for keep in chosen.keeps:
                queries = kept_rows(length, keep)
                keys = Segments((0,), (length,), torch.arange(length, device="cuda"))
                tensors = (draw(heads, queries.lengths[0]), *everything[1:])
                candidates, problems = _agreeing(tensors, queries, keys, chosen)
                failed |= bool(problems)
                pairs = int((queries.position_N + 1).sum())
                where = f"{length:>6} keys, keep {keep}, {heads}/{groups}"
                _report(where, (heads, groups, length, keep), pairs, {fastest.name: baseline, **candidates}, chosen)
    return int(failed)


def _agreeing(
    tensors: tuple[Tensor, ...], queries: Segments, keys: Segments, chosen: argparse.Namespace
) -> tuple[dict[str, Passes], list[str]]:
    """Candidates that run and agree with the Triton kernels; what is wrong with the others."""
    expected = explicit_passes(tensors, queries, keys, "triton")
    wanted = (*expected["forward"](), *expected["backward"]())
    candidates, problems = ({"triton": expected} if "triton" in chosen.candidates else {}), []
    for kind in chosen.candidates:
        for cut in chosen.cuts if kind != "triton" else ():
            name = f"{kind} {cut}"
            begin = time.perf_counter()
            try:
                passes = rectangle_passes(tensors, queries, keys, cut)
                found = (*passes["forward"](), *passes["backward"]())
                problem = _difference(found, wanted)
            except Exception as error:  # shown, and the others go on
                problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            print(f"    {name}: {problem or 'agrees'}, first calls {time.perf_counter() - begin:.2f} s", flush=True)
            if problem is None:
                candidates[name] = passes
            else:
                problems.append(problem)
                print(f"{name} NOT TIMED: {problem}", file=sys.stderr)
    return candidates, problems


def rectangle_passes(tensors: tuple[Tensor, ...], queries: Segments, keys: Segments, cut: str) -> Passes:
    """Both passes by rectangles."""
    planned = plan_rows(queries, keys, Cut(*_split(cut)))
    marks, work = planned.marks, tiling.Work.between(queries, keys)
    assert marks is not None
    query, *pair = tensors
    dense = vendor.dense_kernels(query.dtype, HEAD_DIM, query.device)[0]
    scaling = HEAD_DIM**-0.5
    saved = stripes.forward(query, (pair[0], pair[1]), work, marks, scaling, dense)
    return {
        "forward": partial(stripes.forward, query, (pair[0], pair[1]), work, marks, scaling, dense),
        "backward": partial(stripes.backward, (query, query, *pair, *saved), work, marks, scaling, dense),
    }


def _difference(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> str | None:
    for name, actual, expected in zip(("output", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        error = float((actual.float() - expected.float()).norm() / expected.float().norm())
        if not error < AGREEMENT:
            return f"{name} differs from the Triton kernels by {error:.2g} of its norm"
    return None


def _report(where: str, shape: tuple, pairs: int, candidates: dict[str, Passes], chosen: argparse.Namespace) -> None:
    heads, groups, length, keep = shape
    vendor_name = next(iter(candidates))
    all_pairs = length * (length + 1) // 2
    for which in PASSES:
        samples = milliseconds({name: passes[which] for name, passes in candidates.items()}, chosen.repeats)
        rates = {
            name: tera_flops(all_pairs if name == vendor_name else pairs, heads, which, ms)
            for name, ms in samples.items()
        }
        medians = {name: statistics.median(values) for name, values in rates.items()}
        shown = "  ".join(
            f"{name} {rate:.0f} ({rate / medians[vendor_name]:.2f}, {statistics.median(samples[name]):.2f} ms)"
            for name, rate in medians.items()
        )
        print(f"{where} {which:<8} TFLOP/s (share of causal {vendor_name}): {shown}", flush=True)
        others = [name for name in candidates if name != vendor_name]
        if not others:
            continue
        best = max(others, key=medians.__getitem__)
        setting = {
            "heads": heads, "key_heads": groups, "head_dim": HEAD_DIM, "keys": length, "keep": keep, "block": BLOCK,
            "dtype": "bfloat16", "pass": which, "vendor": vendor_name, "candidate": best,
            "statistic": "overhead_of_medians", "samples_unit": "TFLOP/s",
        }  # fmt: skip
        everything = {"baseline": rates[vendor_name], "lemo": rates[best]}
        everything |= {name: rates[name] for name in others if name != best}
        Record.measure(
            f"attention/kept_on_all/{which}/{length}/{keep}/{heads}_{groups}", "ratio", everything, setting,
            script=SCRIPT, seeds=(SEED,),
            bar=f"{BAR}/{which}_{heads}_{groups}_keep{round(100 * keep)}" if length == BAR_LENGTH else None,
        ).append(chosen.out / "attention.jsonl")  # fmt: skip


# ---- tilings of the Triton kernels


def time_tilings(chosen: argparse.Namespace) -> int:
    """Every tiling in use, and some more, on the first length, share and heads."""
    from lemo.ops.attend_rows import kernel

    (heads, groups), length = _split(chosen.heads[0]), chosen.lengths[0]
    queries, keys = kept_rows(length, chosen.keeps[0]), Segments((0,), (length,), torch.arange(length, device="cuda"))
    query, key, value = draw(heads, queries.lengths[0]), draw(groups, length), draw(groups, length)
    work, scaling = tiling.Work.between(queries, keys), HEAD_DIM**-0.5
    saved = kernel.forward(query, key, value, work, scaling, None)
    sums = saved[1], kernel.backward_query(query, query, key, value, saved, work, scaling, None)[1]
    calls = {
        "forward": partial(kernel.forward, query, key, value, work, scaling, None),
        "query": partial(kernel.backward_query, query, query, key, value, saved, work, scaling, None),
        "key": partial(kernel.backward_key, query, query, key, value, sums, work, scaling, None, True),
    }
    products = {"forward": 2, "query": 3, "key": 4}
    pairs = int((queries.position_N + 1).sum())
    for kind, call in calls.items():
        found = [*tiling.tilings(kind, HEAD_DIM, query.dtype), *map(_tiling, EXTRA_TILINGS[kind])]
        running = {str(t): partial(call, tiling=t) for t in found if tiling.fits(t, kind, HEAD_DIM, query.dtype)}
        running = {name: function for name, function in running.items() if first_error(function) is None}
        samples = milliseconds(running, chosen.repeats)
        rate = {
            name: 2 * products[kind] * HEAD_DIM * heads * pairs / statistics.median(ms) / 1e9
            for name, ms in samples.items()
        }
        print(f"tilings of {kind}, TFLOP/s of its own products: " + ", ".join(
            f"{name}: {value:.0f}" for name, value in sorted(rate.items(), key=lambda item: -item[1])
        ), flush=True)  # fmt: skip
    return 0


def _tiling(text: str) -> tiling.Tiling:
    rows, rest = text.split("x")
    others, rest = rest.split("w")
    return tiling.Tiling(int(rows), int(others), *map(int, rest.split("s")))


if __name__ == "__main__":
    raise SystemExit(main())
