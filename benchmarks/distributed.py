"""One run of `lemo train` in several processes, one per GPU, against the same run in one: losses and tokens per second.

    python -m benchmarks.distributed --model FOLDER --data FILE [--processes 2] [--window 16384] [--steps 12]

The single process accumulates as many windows a step as the others take together, so both train on the same windows
with the same loss rows. They take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from lemo.config import DataConfig, LoraConfig, ModelConfig, RunConfig, TrainingConfig
from lemo.measure.record import Record

SCRIPT = "benchmarks/distributed.py"
RESULTS = Path(__file__).parent / "results" / "distributed.jsonl"
WARMUP_STEPS = 2  # kernels are compiled or chosen in them


def make_recipe(options: argparse.Namespace, count: int, output: Path) -> RunConfig:
    """The default on plain text, for so many processes."""
    steps = max(1, options.windows_per_step // count)
    data = DataConfig(train=(str(options.data),), validation=(str(options.data),), window_tokens=options.window)
    training = TrainingConfig(
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        gradient_accumulation_steps=steps,
        gradient_checkpointing=options.recompute != "none",
        recompute=options.recompute,
        offload=options.offload,
    )
    model = ModelConfig(path=str(options.model), dtype=options.dtype, context_length=options.context)
    return RunConfig(output=str(output), model=model, data=data, lora=LoraConfig(), training=training)


def work(options: argparse.Namespace) -> None:
    """One of the processes; the first leaves the result and the loss of every step."""
    from rich.console import Console

    from lemo.eval.perplexity import evaluate_loss
    from lemo.train.run import train

    count, output = int(os.environ["WORLD_SIZE"]), Path(options.worker)
    with (output.parent / f"{output.name}-{os.environ['RANK']}.log").open("w") as log:
        result = train(make_recipe(options, count, output), evaluate_loss, console=Console(file=log, width=160))
    if os.environ["RANK"] == "0":
        (output.parent / f"{output.name}.json").write_text(json.dumps(result.to_dict()))


def run_turn(options: argparse.Namespace, count: int, folder: Path) -> dict[str, Any]:
    """A run in `count` processes: its losses, and tokens per second of every step behind the first ones.

    Raises:
        SystemExit: a process failed; with what it said.
    """
    name = f"{count}-{len(list(folder.glob('*.json')))}"
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "benchmarks.distributed"]
    command = [sys.executable, "-m", *launch, "--worker", str(folder / name), *options.given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{count} processes failed:\n{done.stderr[-12000:]}")
    result = json.loads((folder / f"{name}.json").read_text())
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "tokens_per_s" in line and "loss" in line]
    return {
        "losses": [line["loss"] for line in steps],
        "tokens_per_s": [line["tokens_per_s"] for line in steps[WARMUP_STEPS:]],
        "after": result["losses"]["dense after"],
        "peak_gib": result["peak_memory_bytes"] / 2**30,
    }


def compare(options: argparse.Namespace) -> None:
    """Turns of one process and of several, and the Records."""
    found: dict[int, list[dict[str, Any]]] = {1: [], options.processes: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.turns):
            for count, turns in found.items():
                turns.append(run_turn(options, count, Path(folder)))
                last = turns[-1]
                speed, memory = median(last["tokens_per_s"]), f"{last['peak_gib']:.2f} GiB"
                print(f"{count} processes: {speed:,.0f} tokens/s, loss after {last['after']:.4f}, {memory}", flush=True)
    alone, together = found[1], found[options.processes]
    setting = {
        name: getattr(options, name)
        for name in ("window", "steps", "windows_per_step", "processes", "dtype", "recompute", "offload")
    } | {"model": options.model.name, "data": options.data.name}

    def write(name: str, unit: str, samples: Any, statistic: str) -> None:
        title, chosen = f"distributed/{options.processes}/{name}", {**setting, "statistic": statistic}
        record = Record.measure(title, unit, samples, chosen, script=SCRIPT, seeds=[0])
        record.append(options.out)
        print(f"{title}: {record.value:.4g} {unit}", flush=True)

    speeds = [[x for turn in turns for x in turn["tokens_per_s"]] for turns in (together, alone)]
    write("tokens_per_s", "tokens/s", speeds[0], "median")
    write("tokens_per_s_of_one", "tokens/s", speeds[1], "median")
    write("loss_difference", "nats", _apart(together, alone), "max")
    after = [abs(x["after"] - y["after"]) for x, y in zip(together, alone, strict=True)]
    write("after_difference", "nats", after, "max")
    if len(alone) > 1:  # what the same run differs from itself
        write("repeat_difference", "nats", _apart(alone[1:], alone[:-1]), "max")


def _apart(some: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> list[float]:
    """How far the losses of every step are apart."""
    pairs = zip(some, others, strict=True)
    return [abs(a - b) for one, other in pairs for a, b in zip(one["losses"], other["losses"], strict=True)]


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True)
    add("--data", type=Path, required=True, help="text or pre-tokenised npz; trains on it and validates on its windows")
    add("--processes", type=int, default=2)
    add("--window", type=int, default=16384)
    add("--context", type=int, help="context length of the tuned model, where it exceeds the model's own")
    add("--windows-per-step", type=int, default=4)
    add("--steps", type=int, default=12)
    add("--learning-rate", type=float, default=1e-3)
    add("--recompute", default="none", choices=("none", "mlp", "lin", "layer"))
    add("--offload", action="store_true")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    add("--turns", type=int, default=2)
    add("--out", type=Path, default=RESULTS)
    add("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.processes < 2 or options.windows_per_step % options.processes:
        parser.error("--processes must be at least 2 and divide --windows-per-step")
    options.given = list(sys.argv[1:] if arguments is None else arguments)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    if options.worker:
        work(options)
    else:
        compare(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
