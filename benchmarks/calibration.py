"""How long a calibration takes: a Llama-3-8B shape with random weights, windows of 16,384 tokens, one GPU.

    python -m benchmarks.calibration [--shape llama3-8b] [--window 16384] [--windows 16] [--out FILE]

Predictors and bypass for 30 % of the rows, with the options that a recipe has by default; the values of the
weights decide nothing about the time. `--layers` and small windows try it on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import lemo
from lemo.config import CalibrationConfig
from lemo.core.plan import Plan
from lemo.measure.memory import track_peak
from lemo.measure.record import Record
from lemo.runtime.batch import supervised_rows
from lemo.train.rehearsal import random_batch, random_model, shape_config

SCRIPT = "benchmarks/calibration.py"
BAR_SHAPE, BAR_WINDOW = "llama3-8b", 16384


def make_batches(vocabulary: int, window: int, count: int, loss_share: float, span: int) -> list[dict]:
    """Random tokens with loss rows drawn as in training."""
    found = []
    for seed in range(count):
        batch = random_batch(vocabulary, window, share=loss_share, seed=seed, span=span)
        found.append({"input_ids": batch["input_ids"], "supervised": supervised_rows(batch), "domain": "random"})
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", default=BAR_SHAPE)
    add("--window", type=int, default=BAR_WINDOW)
    add("--windows", type=int, default=CalibrationConfig.windows)
    add("--held-out", type=int, default=CalibrationConfig.tune_windows)
    add("--ratio", type=float, default=0.3)
    add("--layers", type=int)
    add("--device", default="cuda")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    add("--out", type=Path, default=Path(__file__).parent / "results" / "calibration.jsonl")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    shape = shape_config(options.shape, tokens=options.window, layers=options.layers)
    model = random_model(shape, dtype=getattr(torch, options.dtype), device=device)
    ratios = {"forward_ratio": options.ratio, "backward_ratio": options.ratio}
    plan = Plan.uniform(model, **ratios, scorer="predictor", kv="all", dense_layers=(0, -1))
    span = min(1024, options.window // 4 // plan.block_size * plan.block_size)
    count = options.windows + options.held_out
    batches = make_batches(shape.get_text_config().vocab_size, options.window, count, 0.1, span)
    config = CalibrationConfig(windows=options.windows, tune_windows=options.held_out)
    with tempfile.TemporaryDirectory() as folder, track_peak(device) as peak:
        begin = time.perf_counter()
        lemo.calibrate(model, batches, config, plan=plan, output_dir=folder)
        if device.type == "cuda":
            torch.cuda.synchronize()
        minutes = (time.perf_counter() - begin) / 60
    setting = {"shape": options.shape, "layers": shape.get_text_config().num_hidden_layers, "window": options.window}
    setting |= {
        "windows": options.windows,
        "held_out": options.held_out,
        "ratio": options.ratio,
        "dtype": options.dtype,
    }
    setting |= {"calibration": "defaults", "weights": "random", "statistic": "last"}
    whole = options.shape == BAR_SHAPE and options.layers is None and options.window == BAR_WINDOW
    bar = "C.calibration_minutes" if whole and device.type == "cuda" else None
    Record.measure("calibration/minutes", "min", [minutes], setting, script=SCRIPT, seeds=[0], bar=bar).append(
        options.out
    )
    gib = Record.measure("calibration/peak_memory", "GiB", [peak.peak_gib], setting, script=SCRIPT, seeds=[0])
    gib.append(options.out)
    print(f"{minutes:.2f} minutes, peak {peak.peak_gib:.1f} GiB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
