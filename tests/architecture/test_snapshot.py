"""The public surface changes on purpose only."""

from __future__ import annotations

import json

from tests.architecture import snapshot

HINT = "if the change is meant, run `python -m tests.architecture.snapshot` and add a line to CHANGELOG.md"


def test_public_names_are_the_stored_ones():
    assert snapshot.public_names() == json.loads(snapshot.NAMES_FILE.read_text()), HINT


def test_cli_flags_are_the_stored_ones():
    assert snapshot.cli_flags() == json.loads(snapshot.FLAGS_FILE.read_text()), HINT
