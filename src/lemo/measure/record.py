"""Record: one measurement with everything needed to repeat it, kept as one JSON line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import lemo
from lemo.errors import DataError
from lemo.measure.statistics import Samples, value_of

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "triton", "numpy")


@dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes:
        name: what was measured, in words that sort: `extension/skip/validation_loss`.
        value: the published figure; follows from `samples` by `setting["statistic"]`.
        unit: `s`, `ms`, `bytes`, `GiB`, `tokens/s`, `nats`, `share` (a fraction), `ratio` (baseline over lemo), ...
        samples: the raw numbers: a list, or lists by name (`baseline` and `lemo` where two things were compared).
        setting: everything that was chosen, with `statistic`.
        seeds: seeds of what was drawn.
        device: the machine's accelerator, or its processor.
        versions: of Python and the packages that took part.
        commit: of the repository; `+changes` behind it says that tracked files differed from it.
        script: the file that measured, relative to the repository.
        config_hash: of `setting`.
        time: when it was measured, UTC.
        bar: the bar that it answers, `ID` or `ID/shape`; None for none.
    """

    name: str
    value: float
    unit: str
    samples: Samples
    setting: Mapping[str, Any]
    seeds: tuple[int, ...]
    device: str
    versions: Mapping[str, str]
    commit: str
    script: str
    config_hash: str
    time: str
    bar: str | None = None

    @classmethod
    def measure(
        cls,
        name: str,
        unit: str,
        samples: Samples,
        setting: Mapping[str, Any],
        *,
        script: str,
        seeds: Sequence[int] = (),
        bar: str | None = None,
    ) -> Record:
        """A Record of numbers just measured on this machine: all that is not given is filled in.

        Args:
            name: what was measured.
            unit: of the value.
            samples: raw numbers, as `value_of` reads them.
            setting: what was chosen; `statistic` (default `median` for one list) names how the value follows.
            script: file that measured, relative to the repository.
            seeds: seeds of what was drawn.
            bar: the bar that it answers.

        Raises:
            DataError: the Record would be refused by `problems`.
        """
        samples = _plain(samples)
        setting = json.loads(json.dumps({"statistic": "median", **setting}, allow_nan=False))
        record = cls(
            name=name,
            value=value_of(samples, setting["statistic"]),
            unit=unit,
            samples=samples,
            setting=setting,
            seeds=tuple(seeds),
            device=device_name(),
            versions=versions(),
            commit=commit(),
            script=script,
            config_hash=config_hash(setting),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            bar=bar,
        )
        if problems := record.problems():
            raise DataError(f"Record {name!r}: {'; '.join(problems)}")
        return record

    def problems(self) -> list[str]:
        """What makes the Record unfit to be published; empty for a good one."""
        found = []
        if not self.script:
            found.append("names no script")
        if not self.samples or (isinstance(self.samples, Mapping) and not all(self.samples.values())):
            found.append("holds no samples")
        elif any(not math.isfinite(number) for number in _numbers(self.samples)):
            found.append("holds samples that are no finite numbers")
        elif (statistic := self.setting.get("statistic")) is None:
            found.append("its setting names no statistic")
        else:
            try:
                value = value_of(self.samples, statistic)
            except DataError as error:
                found.append(str(error))
            else:
                if not math.isclose(value, self.value, rel_tol=1e-9, abs_tol=1e-12):
                    found.append(f"says {self.value}, but its samples give {value}")
        if self.config_hash != config_hash(self.setting):
            found.append("config_hash is not that of its setting")
        return found

    def append(self, path: str | Path) -> Record:
        """Adds the Record to a JSON-lines file, which is made where missing. Returns the Record."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(dataclasses.asdict(self), allow_nan=False)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        return self


def read_records(paths: str | Path | Iterable[str | Path]) -> list[Record]:
    """Records of one or several JSON-lines files, in order.

    Raises:
        DataError: a file that cannot be read, or a line that is no Record; the message names file and line.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    return [record for path in paths for record in _read_file(Path(path))]


def _read_file(path: Path) -> list[Record]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _parse(line: str, where: str) -> Record:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: no JSON: {error}") from error
    if not isinstance(data, dict):
        raise DataError(f"{where}: a Record is a JSON object, got {type(data).__name__}")
    fields = {field.name: field for field in dataclasses.fields(Record)}
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in data]
    unknown = sorted(set(data) - set(fields))
    if missing or unknown:
        raise DataError(f"{where}: fields missing: {missing}, unknown: {unknown}")
    if isinstance(data["value"], bool) or not isinstance(data["value"], int | float):
        raise DataError(f"{where}: value must be a number, got {data['value']!r}")
    for name, kind in (("samples", list | dict), ("setting", dict), ("seeds", list)):
        if not isinstance(data[name], kind):
            raise DataError(f"{where}: {name} has the wrong type, {type(data[name]).__name__}")
    if any(isinstance(number, bool) or not isinstance(number, int | float) for number in _numbers(data["samples"])):
        raise DataError(f"{where}: samples must be numbers")
    return Record(**{**data, "seeds": tuple(data["seeds"])})


def _numbers(samples: Samples) -> list[float]:
    if isinstance(samples, Mapping):
        return [number for numbers in samples.values() for number in numbers]
    return list(samples)


def _plain(samples: Samples) -> Samples:
    """Samples as Python floats, so that arrays and scalars of other libraries can be passed."""
    if isinstance(samples, Mapping):
        return {name: [float(number) for number in numbers] for name, numbers in samples.items()}
    return [float(number) for number in samples]


def config_hash(setting: Mapping[str, Any]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a setting, independent of the order of its keys."""
    text = json.dumps(setting, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def commit() -> str:
    """Commit of the repository that this package is run from; else `LEMO_COMMIT`; else `unknown`."""
    folder = Path(__file__).resolve().parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        ours = _git(folder, "ls-files", "--", Path(__file__).name)
    except (OSError, subprocess.CalledProcessError):
        head = ours = ""
    if not head or not ours:
        return os.environ.get("LEMO_COMMIT", "unknown")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ":/src", ":/benchmarks")
    return f"{head}+changes" if changed else head


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python, lemo and the packages that take part, those that are installed."""
    found = {"python": platform.python_version(), "lemo": lemo.__version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    """Name of the first CUDA device, else of the processor with the number of cores this process may use."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return (
        f"{_processor()}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
