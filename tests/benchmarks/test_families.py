"""The page of families is what was measured, and what was measured agrees with the family files."""

from __future__ import annotations

import json

from benchmarks.families import ROOT, probe
from benchmarks.families_page import render
from lemo.families import all_families

NEWEST = json.loads((ROOT / "benchmarks" / "results" / "families.jsonl").read_text().splitlines()[-1])
ROWS = {row["type"]: row for row in NEWEST["setting"]["rows"]}


def test_the_page_is_the_newest_record():
    """`python -m benchmarks.families --render` writes it again."""
    assert (ROOT / "docs" / "families.md").read_text() == render(NEWEST)


def test_every_family_file_passed_and_its_engine_is_as_it_says():
    for name, family in all_families().items():
        row = ROWS[name]
        assert "refused" not in row, row
        assert row["fused"] == (family.names is not None), name
        assert row["mlp"] == bool(family.mlp and family.mlp_down), name


def test_trying_a_type_again_gives_its_row():
    """One of each kind: accepted, hybrid, refused by its parts, refused by the laws."""
    for name in ("gpt_oss", "lfm2", "bloom", "doge"):
        got, wanted = probe(name), dict(ROWS[name])
        if "refused" in got:
            got["refused"], wanted["refused"] = got["refused"][:60], wanted["refused"][:60]
        assert got == wanted


def test_refused_types_have_a_reason():
    refused = [row for row in ROWS.values() if "refused" in row]
    assert refused and all(len(row["refused"]) > 20 for row in refused)
    assert "ALiBi" in ROWS["bloom"]["refused"] and "ALiBi" in ROWS["mpt"]["refused"]
