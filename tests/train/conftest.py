"""What several tests of training need: a folder to train in, and a console to read."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tests.train.tiny import save_tiny_model, words


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder with a tiny model and text; runs go beside them."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny_model(folder / "model", layers=3)
    (folder / "train.txt").write_text(words(400, seed=1))
    (folder / "validation.txt").write_text(words(80, seed=2))
    return folder


@pytest.fixture
def screen():
    """Console whose text is in `file`."""
    return Console(file=io.StringIO(), width=400)
