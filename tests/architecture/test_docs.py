"""The documentation's links lead somewhere, and every decision is listed."""

from __future__ import annotations

import re

import pytest

from tests.architecture.rules import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)#]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_inside_the_repository_exist(page):
    targets = [t for t in LINK.findall(page.read_text()) if not t.startswith("http")]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_every_decision_is_listed():
    folder = ROOT / "docs" / "decisions"
    listed = set(LINK.findall((folder / "README.md").read_text()))
    assert listed == {path.name for path in folder.glob("0*.md")}


def test_paths_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"`((?:src|benchmarks|recipes|docs|examples)/[\w./-]+)`", text)
    named += re.findall(r"(?:lemo \w+) (recipes/[\w./-]+)", text)
    assert named and not [path for path in named if not (ROOT / path).exists()]
