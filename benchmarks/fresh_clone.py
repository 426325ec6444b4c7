"""Times `make demo` and `make test` as a newcomer meets them: in a fresh clone with an environment of its own.

    python benchmarks/fresh_clone.py [demo] [test] [--out FILE]

The test's time includes installing everything; the demo's begins when its environment is installed, and the time of
the installation is noted beside it. Only what is committed takes part. The demo's own Records are kept as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lemo.measure.record import Record, read_records

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCRIPT = "benchmarks/fresh_clone.py"


def make(clone: Path, *targets: str) -> tuple[float, str]:
    """Minutes that make takes, and the end of what it printed; stops this script when make fails."""
    outside = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    start = time.perf_counter()
    done = subprocess.run(
        ["make", *targets],
        cwd=clone,
        env=outside,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    minutes = (time.perf_counter() - start) / 60
    tail = "\n".join(done.stdout.splitlines()[-15:])
    print(f"make {' '.join(targets)}: {minutes:.1f} min, exit {done.returncode}\n{tail}\n", flush=True)
    if done.returncode:
        sys.exit(f"make {' '.join(targets)} failed")
    return minutes, tail


def time_demo(clone: Path, out: Path) -> None:
    """Installs, then runs the demo; keeps the demo's Records in place of those of the last time."""
    installation, _ = make(clone, ".venv/.demo")
    minutes, _ = make(clone, "demo")
    setting = {"statistic": "max", "installation_minutes": round(installation, 2), "cores": os.cpu_count()}
    write(clone, "demo", minutes, setting, out)
    kept = out.with_name("demo.jsonl")
    kept.unlink(missing_ok=True)
    for record in read_records(clone / "demo-output" / "records.jsonl"):
        if record.bar is None:  # the clone's own time above answers the bar
            record.append(kept)
    shutil.copy(clone / "demo-output" / "report.png", ROOT / "docs" / "demo-report.png")


def time_test(clone: Path, out: Path) -> None:
    """Installs and tests."""
    minutes, tail = make(clone, "test")
    counted = re.search(r"(\d+) passed.*", tail)
    setting = {"statistic": "max", "cores": os.cpu_count(), "closing_line": counted[0] if counted else ""}
    write(clone, "test", minutes, setting, out)


def write(clone: Path, target: str, minutes: float, setting: Mapping[str, Any], out: Path) -> None:
    """The Record of a target's minutes, with the commit that was cloned: the repository may have moved on meanwhile."""
    head = subprocess.run(["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    bar = f"A.{target}_minutes"
    record = Record.measure(f"fresh_clone/{target}", "min", [minutes], setting, script=SCRIPT, bar=bar)
    dataclasses.replace(record, commit=head.stdout.strip()).append(out)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=["demo", "test"], metavar="demo|test")
    parser.add_argument("--out", type=Path, default=RESULTS / "fresh_clone.jsonl")
    options = parser.parse_args(arguments)
    if unknown := set(options.targets) - {"demo", "test"}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are demo and test")
    for target in options.targets:
        with tempfile.TemporaryDirectory(prefix="lemo-") as folder:
            clone = Path(folder) / "lemo"
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
            (time_demo if target == "demo" else time_test)(clone, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
