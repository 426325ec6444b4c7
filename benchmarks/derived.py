"""Records that are made of other Records: comparisons of cells, and what follows from their settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lemo.measure.record import Record


class DerivedRecords:
    """Where derived Records go, each written once.

    Args:
        path: of the file.
        records: what it holds.
        script: that derives.
    """

    def __init__(self, path: Path, records: Sequence[Record], script: str) -> None:
        """Remembers what is known."""
        self.path, self.script = path, script
        self.known = {_key(record) for record in records}

    def write(
        self,
        name: str,
        unit: str,
        samples: Any,
        setting: dict[str, Any],
        sources: Sequence[Record],
        bar: str | None = None,
    ) -> Record:
        """The Record, appended unless it is there; device, versions and commit are those of the newest source."""
        seeds = sorted({seed for source in sources for seed in source.seeds})
        record = Record.measure(name, unit, samples, setting, script=self.script, seeds=seeds, bar=bar)
        newest = max(sources, key=lambda source: source.time)
        record = dataclasses.replace(record, device=newest.device, versions=newest.versions, commit=newest.commit)
        if _key(record) not in self.known:
            self.known.add(_key(record))
            record.append(self.path)
        return record


def _key(record: Record) -> tuple[Any, ...]:
    """What tells derived Records apart: one whose samples alone grew has another value."""
    return record.name, record.config_hash, record.bar, record.seeds, record.value
