"""The page that says how to measure again names every file of Records, and commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.training_presets import presets
from lemo.measure.record import read_records

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "measuring.md").read_text(encoding="utf-8")
FILES = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
COMMANDS = re.findall(r"python (?:-m )?((?:benchmarks|lemo|examples)[\w./]*)((?: [^`#|\n]*)?)", PAGE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_of_records_has_the_command_that_makes_it(path: Path):
    line = next((row for row in PAGE.splitlines() if row.startswith("|") and f"`{path.name}`" in row), None)
    assert line is not None, f"docs/measuring.md does not say how {path.name} is made"
    for script in {record.script for record in read_records(path)}:
        module = script.removesuffix(".py").replace("/", ".")
        assert script in line or module in line or (script, "make demo") == ("examples/demo.py", _command(line)), script


def _command(line: str) -> str:
    return line.split("|")[2].strip().strip("`")


@pytest.mark.parametrize(("target", "rest"), COMMANDS, ids=[target for target, _ in COMMANDS])
def test_commands_are_of_scripts_and_options_that_exist(target: str, rest: str):
    path = ROOT / target if target.endswith(".py") else ROOT / (target.replace(".", "/") + ".py")
    path = path if path.exists() else ROOT / "src" / path.relative_to(ROOT)
    assert path.exists(), target
    source = path.read_text(encoding="utf-8")
    for option in re.findall(r"--([a-z-]+)", rest):
        assert f"--{option}" in source, f"{target} has no option --{option}"
    for preset in re.findall(r"--preset (\S+)", rest):
        assert preset in presets()


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 20 and len(FILES) > 15
    named = PAGE.split("the presets ", 1)[1].split("`", 1)[0].split("|")[0].strip(" ,")
    assert set(re.split(r",\s*", named)) <= set(presets())
