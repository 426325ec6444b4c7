"""Which data cells were measured on: losses on different data are not compared.

`benchmarks/prepare_data.py tokens CORPUS TOKENIZER OUT --cut` and `python -m benchmarks.quality_answers` make the
published data from the corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Fingerprints of the published data, by kind. Cells that were measured before they carried one are on these: of text,
# the windows that were drawn from it and losses of the model before training on some of them agree.
PUBLISHED = {"text": "ea3ba836750a2865", "answers": "6f17a74187c05685"}
SPLITS = ("train", "validation")


def fingerprint(folder: Path, domains: Sequence[str]) -> str:
    """Sixteen hexadecimal digits of the arrays in `<domain>-<split>.npz` of a folder."""
    found = hashlib.sha256()
    for domain in domains:
        for split in SPLITS:
            with np.load(folder / f"{domain}-{split}.npz", allow_pickle=False) as arrays:
                for name in sorted(arrays):
                    found.update(f"{domain}|{split}|{name}|".encode())
                    found.update(np.ascontiguousarray(arrays[name]).astype("<i8").tobytes())
    return found.hexdigest()[:16]


def corpus_of(setting: Mapping[str, Any]) -> str:
    """Fingerprint of a cell's data."""
    return setting.get("corpus", PUBLISHED[setting["data"]])


def is_published(protocol: Mapping[str, Any]) -> bool:
    """Whether a protocol's data is the published one of its kind."""
    return protocol["corpus"] == PUBLISHED[protocol["data"]]
