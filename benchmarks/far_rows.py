"""Where far loss rows lie, and how much of what a local view loses they take away: drawn, and chosen by repeats.

    python benchmarks/far_rows.py --data DATA [--domains books,code,...] [--tokens 16384 65536] [--window 1024]
    python benchmarks/far_rows.py --data DATA --model MODEL --tokens 4096 --window 512 --windows 3 --seeds 50

DATA holds pre-tokenised `<domain>-train.npz` (benchmarks/prepare_data.py makes them); windows are whole ones of single
documents, spread evenly over them. All rows come from `LossRows`, without and with `repeats_beyond`.

Without a model: the mean place of far rows in their window, and what the choice adds to a call of `LossRows`.
With a model instead: the loss of every row with full attention and with a local view, in which a row sees its chunk of
`window` rows, the chunk before, and the first block of the document. A row loses the difference. Measured are the
correlation, over runs of `window` rows, of rows that repeat what is beyond the local view and nats that are lost, also
without the first two runs, which have nothing beyond it and so neither; and the share of the nats that all loss rows
lose which is lost on far rows, and so is taken away. The mask of the local view takes tokens² bytes, and as many scores
for each head where attention holds them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lemo.config import DataConfig, ModelConfig
from lemo.core.layout import Layout
from lemo.measure.record import Record
from lemo.runtime.batch import LOCAL_ROWS, read_layout
from lemo.train.data import LossRows, WindowCollator, load_windows
from lemo.train.far_rows import GRAM, repeats_beyond
from lemo.train.loss_rows import IGNORE
from lemo.train.model import load_model

SCRIPT = "benchmarks/far_rows.py"
DOMAINS = "books,code,math,legal,instruct"
DRAWN, REPEATS = "drawn", "repeats"
HEAD_ROWS = 1024  # rows whose logits are held at a time


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True)
    add("--model", type=Path, help="measure what a local view loses instead of places")
    add("--domains", default=DOMAINS)
    add("--tokens", type=int, nargs="+", default=[16384, 65536], help="of a window")
    add("--window", type=int, default=1024, help="rows of a chunk of the local view, and of a run of loss rows")
    add("--windows", type=int, default=25, help="at most so many of each domain")
    add("--seeds", type=int, default=8, help="draws of each window")
    add("--share", type=float, default=0.12, help="of blocks, with loss and far")
    add("--local-share", type=float, default=0.25, help="of blocks, with loss and local")
    add("--block", type=int, default=64)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("bfloat16", "float32"), help="of the model; float32 on a CPU, else bfloat16")
    add("--out", type=Path, default=Path(__file__).parent / "results" / "far_rows.jsonl")
    options = parser.parse_args(arguments)
    if options.dtype is None:
        options.dtype = "float32" if torch.device(options.device).type == "cpu" else "bfloat16"
    if options.seeds < 1 or options.windows < 1:
        parser.error("--seeds and --windows must be one or more")
    return options


def read_samples(options: argparse.Namespace, domain: str, tokens: int) -> list[dict[str, Any]]:
    """Whole windows of single documents of a domain; none where documents are too short."""
    config = DataConfig(train=(str(options.data / f"{domain}-train.npz"),), window_tokens=tokens)
    dataset, _ = load_windows(config, None, limit=options.windows)
    return [dataset[index] for index in range(len(dataset))]


@dataclass(frozen=True)
class Rows:
    """Rows that carry loss in one window.

    Attributes:
        loss_R: (T - 1,) bool, rows with loss; row t predicts token t + 1.
        far_R: (T - 1,) bool, those of them that see all keys.
        ms: of the call of `LossRows`.
    """

    loss_R: Tensor
    far_R: Tensor
    ms: float


def draw(options: argparse.Namespace, sample: dict[str, Any], seed: int, by: str) -> Rows:
    """What `LossRows` draws of one window, far rows as drawn or by repeats."""
    collator = LossRows(
        WindowCollator(),
        options.share,
        seed=seed,
        block_size=options.block,
        span=options.window,
        local_share=options.local_share,
        repeats_beyond=options.window if by == REPEATS else None,
    )
    begin = time.perf_counter()
    batch = collator([sample])
    ms = 1000 * (time.perf_counter() - begin)
    loss_R = batch["labels"][0, 1:] != IGNORE
    return Rows(loss_R, loss_R & ~batch[LOCAL_ROWS][0, :-1], ms)


def draw_both(options: argparse.Namespace, sample: dict[str, Any]) -> dict[str, list[Rows]]:
    """Draws of every seed, by way of choosing far rows.

    Raises:
        RuntimeError: the choice changed which rows carry loss, so that the two cannot be compared.
    """
    found: dict[str, list[Rows]] = {DRAWN: [], REPEATS: []}
    for seed in range(options.seeds):
        for by, rows in found.items():
            rows.append(draw(options, sample, seed, by))
        if not torch.equal(found[DRAWN][-1].loss_R, found[REPEATS][-1].loss_R):
            raise RuntimeError(f"{sample['sample_id']}, seed {seed}: repeats_beyond changed which rows carry loss")
    return found


def mean_place(rows: Rows) -> float:
    """Mean place of far rows in the window, in [0, 1)."""
    return (rows.far_R.nonzero().double().mean() / (len(rows.far_R) + 1)).item()


def taken_share(draws: Sequence[Rows], lost_R: Tensor) -> float | None:
    """Nats lost on far rows over nats lost on all loss rows, both summed over draws; None where none are lost.

    Sums, because a single draw may have loss in the first two chunks alone, where nothing is lost.
    """
    total = sum(lost_R[rows.loss_R].sum().item() for rows in draws)
    return sum(lost_R[rows.far_R].sum().item() for rows in draws) / total if total > 0 else None


def correlation(repeats_R: Tensor, lost_R: Tensor, window: int, first: int = 0) -> float | None:
    """Of repeats and lost nats over runs, from the `first` on; None where either is the same in all."""
    starts = range(first * window, len(lost_R), window)
    if len(starts) < 2:
        return None
    repeats, lost = (np.add.reduceat(values_R.double().numpy(), starts) for values_R in (repeats_R, lost_R))
    return float(np.corrcoef(repeats, lost)[0, 1]) if repeats.std() and lost.std() else None


def local_view(tokens: int, window: int, block: int, device: torch.device) -> Tensor:
    """(1, 1, T, T) bool: the row's chunk up to the row, the chunk before, and the first block."""
    place_T = torch.arange(tokens, device=device)
    chunk_T = place_T // window
    seen_TT = (chunk_T[:, None] - chunk_T <= 1) | (place_T < block)
    return (seen_TT & (place_T[:, None] >= place_T))[None, None]


@torch.no_grad()
def row_losses(model: Any, ids_T: Tensor, mask: Tensor | None) -> Tensor:
    """(T - 1,) fp64 on the host: loss of each row with the keys that the mask shows it, all before it for None."""
    hidden_TM = model.model(input_ids=ids_T[None], attention_mask=mask, use_cache=False)[0][0]
    pieces = zip(hidden_TM[:-1].split(HEAD_ROWS), ids_T[1:].split(HEAD_ROWS), strict=True)
    losses = [cross_entropy(model.lm_head(rows).float(), ids, reduction="none") for rows, ids in pieces]
    return torch.cat(losses).double().cpu()


def lost_nats(model: Any, options: argparse.Namespace, sample: dict[str, Any]) -> Tensor:
    """(T - 1,) fp64: loss of each row with a local view over its loss with full attention."""
    device = torch.device(options.device)
    ids_T = torch.from_numpy(sample["input_ids"]).to(device)
    mask = local_view(len(ids_T), options.window, options.block, device)
    return row_losses(model, ids_T, mask) - row_losses(model, ids_T, None)


def layout_of(options: argparse.Namespace, sample: dict[str, Any]) -> Layout:
    """Layout of one window, as LossRows reads it."""
    batch = WindowCollator()([sample])
    return read_layout(batch, None, options.block)


class Results:
    """Writes and prints Records that share a setting."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Keeps the setting."""
        self.path, self.seeds = options.out, range(options.seeds)
        names = ("window", "seeds", "share", "local_share", "block")
        self.setting: dict[str, Any] = {name: getattr(options, name) for name in names} | {"gram": GRAM}
        if options.model is not None:
            self.setting |= {"model": options.model.name, "dtype": options.dtype}

    def add(self, name: str, unit: str, samples: Sequence[float | None], statistic: str = "mean", **more: Any) -> None:
        """Measures, appends and prints one Record of the windows that have a value; the others are counted."""
        kept = [value for value in samples if value is not None]
        more |= {"windows": len(kept), "windows_without_value": len(samples) - len(kept)}
        if not kept:
            print(f"{name:40s} no window has a value", flush=True)
            return
        setting = {**self.setting, "statistic": statistic, **more}
        record = Record.measure(name, unit, kept, setting, script=SCRIPT, seeds=self.seeds).append(self.path)
        print(f"{name:40s} {record.value:9.4f} {unit:12s} {more}", flush=True)


def measure_places(options: argparse.Namespace, results: Results, domain: str, tokens: int) -> None:
    """Mean place of far rows and what the choice costs, a value for each window."""
    places: dict[str, list[float]] = {DRAWN: [], REPEATS: []}
    costs = []
    for sample in read_samples(options, domain, tokens):
        draws = draw_both(options, sample)
        for by, rows in draws.items():
            places[by].append(fmean(map(mean_place, rows)))
        costs.append(median(rows.ms for rows in draws[REPEATS]) - median(rows.ms for rows in draws[DRAWN]))
    for by, values in places.items():
        results.add(f"far_rows/place/{by}/{domain}/{tokens}", "share", values, tokens=tokens)
    results.add(f"far_rows/cost/{domain}/{tokens}", "ms", costs, "median", tokens=tokens)


def measure_losses(
    options: argparse.Namespace, results: Results, domain: str, tokens: int, lose: Callable[[dict[str, Any]], Tensor]
) -> None:
    """How repeats go with lost nats, and the share of them that far rows take away, a value for each window.

    Args:
        options: of the command line.
        results: where Records go.
        domain: of the windows.
        tokens: of a window.
        lose: (T - 1,) nats that each row of a window loses by a local view.
    """
    taken: dict[str, list[float | None]] = {DRAWN: [], REPEATS: []}
    correlations: dict[str, list[float | None]] = {"correlation": [], "correlation_beyond": []}
    lost = []
    for sample in read_samples(options, domain, tokens):
        lost_R = lose(sample)
        ids_T = torch.from_numpy(sample["input_ids"])
        repeats_R = repeats_beyond(ids_T, layout_of(options, sample), options.window)[:-1]
        for values, first in zip(correlations.values(), (0, 2), strict=True):
            values.append(correlation(repeats_R, lost_R, options.window, first))
        lost.append(lost_R.mean().item())
        for by, rows in draw_both(options, sample).items():
            taken[by].append(taken_share(rows, lost_R))
    results.add(f"far_rows/lost/{domain}", "nats", lost, tokens=tokens)
    for name, values in correlations.items():
        results.add(f"far_rows/{name}/{domain}", "correlation", values, tokens=tokens)
    for by, values in taken.items():
        results.add(f"far_rows/taken/{by}/{domain}", "share", values, tokens=tokens)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every domain and length, and writes Records."""
    options = read_options(arguments)
    results = Results(options)
    if options.model is None:
        for tokens in options.tokens:
            for domain in options.domains.split(","):
                measure_places(options, results, domain, tokens)
        return 0
    config = ModelConfig(path=str(options.model), dtype=options.dtype)
    model = load_model(config, window_tokens=max(options.tokens), device=torch.device(options.device)).eval()
    for tokens in options.tokens:
        for domain in options.domains.split(","):
            measure_losses(options, results, domain, tokens, lambda sample: lost_nats(model, options, sample))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
