"""What may stand in for a row that skips a layer: forms of the bypass side by side, on an untrained model.

    python benchmarks/bypass_forms.py --model MODEL --data DATA [--forms rank_64,nonlinear] [--keep 0.3] [--device cpu]

DATA holds pre-tokenised `<domain>-train.npz` and `<domain>-validation.npz` (benchmarks/prepare_data.py makes them).
`--keep` of the blocks run every layer but the first and the last: guards, rows with loss (a run of `--loss-rows` rows,
drawn in the second half of the window) and those before them (`recent`). Kept rows attend to the keys and values of all
rows (`kv: all`). Rows that skip get an update of the form's making, fitted layer by layer on train windows, on the
stream that the form itself makes, aimed at the dense stream.

Measured is the loss of the rows with loss on validation windows, over the dense forward's. Forms:

- `none`: rows pass unchanged.
- `rank_R`, `full`: the bypass, rmsnorm(x)·A·B in closed form, of rank R or of full rank.
- `halves`: one bypass in the place of the attention and one in that of the MLP, both of rank 64.
- `nonlinear`: the bypass of rank 64 and a net rmsnorm(x) -> 128 SiLU units -> update, trained on what it leaves.
- `representative`: the middle row of every skipped block runs the layer; the others take over its update, and a bypass
  of rank 64 mends what that leaves.
- `own_update`: the bypass of rank 64, aimed at the layer's own update instead of the dense stream.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from lemo.calibrate.collect import skip_weights
from lemo.config import DataConfig, ModelConfig
from lemo.core.bypass import BypassFit, rms_normalise
from lemo.core.score import Recent, ScoreInputs
from lemo.eval.perplexity import row_losses
from lemo.measure.record import Record, read_records
from lemo.measure.statistics import paired_standard_error
from lemo.runtime.model import causal_model, decoder_layers
from lemo.runtime.stream import LayerStream
from lemo.train.data import load_windows
from lemo.train.model import load_model

SCRIPT = "benchmarks/bypass_forms.py"
DOMAINS = "books,code,math,legal,instruct"
HIDDEN, STEPS, BATCH_ROWS, RATE = 128, 300, 4096, 2e-3  # of the nonlinear form


@dataclass
class Rows:
    """Rows of one window at one layer.

    Attributes:
        x_NM: (N, M) the stream, as earlier layers left it.
        own_NM: (N, M) update that the layer would make to these rows.
        aim_NM: (N, M) the way to the dense stream after the layer.
        middle_NM: (N, M) the way to the dense stream after the layer's attention.
        weight_N: (N,) in fits; 0 for rows that always run.
        block_N: (N,) int64 block of a row.
    """

    x_NM: Tensor
    own_NM: Tensor
    aim_NM: Tensor
    middle_NM: Tensor
    weight_N: Tensor
    block_N: Tensor


Update = Callable[[Rows], Tensor]


@dataclass
class Window:
    """One window on its way: its stream, the dense one, and which rows skip."""

    stream: LayerStream
    labels_N: Tensor
    loss_N: Tensor
    skipped_N: Tensor
    weight_N: Tensor
    domain: str
    dense: list[Tensor]
    middle: list[Tensor]


def linear(windows: Sequence[Rows], rank: int | None, aim: str = "aim_NM") -> Update:
    """A bypass in closed form."""
    fit = BypassFit(windows[0].x_NM.shape[1], windows[0].x_NM.device)
    for rows in windows:
        fit.add(rows.x_NM, getattr(rows, aim), rows.weight_N)
    bypass = fit.solve(None if rank is None else min(rank, fit.width))
    return lambda rows: bypass.update(rows.x_NM)


def halves(windows: Sequence[Rows]) -> Update:
    """Two bypasses, the second on the stream that the first one makes."""
    first = linear(windows, 64, "middle_NM")
    mended = [replace(r, x_NM=r.x_NM + first(r), aim_NM=r.aim_NM - first(r)) for r in windows]
    second = linear(mended, 64)
    return lambda rows: first(rows) + second(replace(rows, x_NM=rows.x_NM + first(rows)))


def nonlinear(windows: Sequence[Rows]) -> Update:
    """A bypass and a small net for what it leaves."""
    base = linear(windows, 64)
    chosen = [rows.weight_N > 0 for rows in windows]
    normed = torch.cat([rms_normalise(r.x_NM[c]) for r, c in zip(windows, chosen, strict=True)])
    left = torch.cat([(r.aim_NM - base(r))[c] for r, c in zip(windows, chosen, strict=True)])
    weight = torch.cat([r.weight_N[c] for r, c in zip(windows, chosen, strict=True)])
    width, scale = normed.shape[1], left.square().mean().sqrt()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, width)).to(normed.device)
    nn.init.zeros_(net[2].weight)
    nn.init.zeros_(net[2].bias)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    with torch.enable_grad():
        for _ in range(STEPS):
            drawn = torch.randint(0, len(normed), (min(BATCH_ROWS, len(normed)),), device=normed.device)
            error = (net(normed[drawn]) - left[drawn] / scale).square().mean(-1)
            loss = (error * weight[drawn]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.requires_grad_(False)
    return lambda rows: base(rows) + scale * net(rms_normalise(rows.x_NM))


def representative(windows: Sequence[Rows]) -> Update:
    """The middle row's own update for its whole block, and a bypass for what is left."""

    def shared(rows: Rows) -> Tensor:
        first_K = torch.searchsorted(rows.block_N, torch.arange(int(rows.block_N[-1]) + 1, device=rows.block_N.device))
        count_K = torch.bincount(rows.block_N)
        return rows.own_NM[(first_K + count_K // 2)[rows.block_N]]

    rest = linear([replace(rows, aim_NM=rows.aim_NM - shared(rows)) for rows in windows], 64)
    return lambda rows: shared(rows) + rest(rows)


FORMS: dict[str, Callable[[Sequence[Rows]], Update]] = {
    "none": lambda windows: lambda rows: torch.zeros_like(rows.x_NM),
    **{f"rank_{r}": lambda windows, r=r: linear(windows, r) for r in (16, 64, 256)},
    "full": lambda windows: linear(windows, None),
    "halves": halves,
    "nonlinear": nonlinear,
    "representative": representative,
    "own_update": lambda windows: linear(windows, 64, "own_NM"),
}


@torch.no_grad()
def open_windows(model: Any, options: argparse.Namespace, split: str, count: int) -> list[Window]:
    """Windows of every domain with their dense streams after each layer, and after its attention."""
    layers, found = decoder_layers(causal_model(model)), []
    generator = torch.Generator().manual_seed(7 if split == "train" else 8)
    for domain in options.domains.split(","):
        files = DataConfig(**{split: (str(options.data / f"{domain}-{split}.npz"),)}, window_tokens=options.window)
        dataset, _ = load_windows(files, None, split, limit=1_000_000)
        for place in range(count):
            ids_T = torch.as_tensor(dataset[int((place + 0.5) * len(dataset) / count)]["input_ids"])
            half, last = len(ids_T) // 2, len(ids_T) - options.loss_rows
            start = int(torch.randint(half, last, (), generator=generator)) // options.block * options.block
            loss_N = torch.zeros(len(ids_T), dtype=torch.bool)
            loss_N[start : start + options.loss_rows] = True
            loss_N[-1] = False
            stream = LayerStream.open(model, ids_T[None], supervised_BT=loss_N[None], block_size=options.block)
            layout = stream.layout
            scores_K = Recent().scores(ScoreInputs(layout)).to(layout.device)
            weight_N = skip_weights(layout, scores_K, options.keep)
            window = Window(stream, ids_T.roll(-1), loss_N, weight_N == 1, weight_N, domain, [], [])
            x_BTM = stream.hidden_BTM
            for index, layer in enumerate(layers):
                seen: list[Tensor] = []
                hook = layer.post_attention_layernorm.register_forward_pre_hook(
                    lambda _, a, seen=seen: seen.append(a[0])
                )
                x_BTM = stream.dense(index, x_BTM).output_BTM
                hook.remove()
                window.dense.append(x_BTM[0])
                window.middle.append(seen[-1].view_as(x_BTM)[0])
            found.append(window)
    return found


@torch.no_grad()
def losses(model: Any, form: str, fitted: Sequence[Window], held: Sequence[Window]) -> list[float]:
    """Loss of the rows with loss of every held-out window, where a form stands in for skipped rows."""
    windows = [*fitted, *held]
    streams = [w.stream.hidden_BTM[0] for w in windows]
    last = len(windows[0].dense) - 1
    for index in range(last + 1):
        after = [w.stream.dense(index, x[None]).output_BTM[0] for w, x in zip(windows, streams, strict=True)]
        if 0 < index < last:
            rows = [
                Rows(x, y - x, w.dense[index] - x, w.middle[index] - x, w.weight_N, w.stream.layout.block_of_row_N)
                for w, x, y in zip(windows, streams, after, strict=True)
            ]
            update = FORMS[form](rows[: len(fitted)])
            after = [
                torch.where(w.skipped_N[:, None], r.x_NM + update(r), y)
                for w, r, y in zip(windows, rows, after, strict=True)
            ]
        streams = after
    return [loss_of(model, w, x_NM) for w, x_NM in zip(held, streams[len(fitted) :], strict=True)]


@torch.no_grad()
def loss_of(model: Any, window: Window, x_NM: Tensor) -> float:
    """Loss of a window's rows with loss, from the stream after the last layer."""
    base, rows = causal_model(model), window.loss_N
    labels_S = window.labels_N[rows].to(x_NM.device)
    return float(row_losses(base, base.base_model.norm(x_NM[rows]), labels_S).double().mean())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures forms that the Records file lacks, in this setting; prints all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True)
    add("--data", type=Path, required=True)
    add("--out", type=Path, default=Path("benchmarks/results/bypass_forms.jsonl"))
    add("--forms", default=",".join(FORMS), help="separated by commas")
    add("--domains", default=DOMAINS)
    add("--window", type=int, default=2048)
    add("--block", type=int, default=64)
    add("--loss-rows", type=int, default=256)
    add("--keep", type=float, default=0.3)
    add("--fit-windows", type=int, default=3, help="of each domain")
    add("--held-out", type=int, default=3, help="of each domain")
    add("--device", default="cpu")
    options = parser.parse_args(arguments)
    names = ("domains", "window", "block", "loss_rows", "keep", "fit_windows", "held_out")
    setting = {name: getattr(options, name) for name in names} | {"model": options.model.name}
    model = load_model(
        ModelConfig(path=str(options.model), dtype="float32"),
        window_tokens=options.window,
        device=torch.device(options.device),
    ).eval()
    fitted = open_windows(model, options, "train", options.fit_windows)
    held = open_windows(model, options, "validation", options.held_out)
    dense = [loss_of(model, window, window.dense[-1]) for window in held]
    print(f"dense: {fmean(dense):.4f}", flush=True)
    known = read_records(options.out) if options.out.exists() else []
    for form in options.forms.split(","):
        name = f"bypass_forms/{form}"
        if any(r.name == name and all(r.setting.get(k) == v for k, v in setting.items()) for r in known):
            print(f"{form}: done before", flush=True)
            continue
        found = losses(model, form, fitted, held)
        over = [a - b for a, b in zip(found, dense, strict=True)]
        order = [w.domain for w in held]
        record = Record.measure(
            name, "nats", over, {**setting, "statistic": "mean", "window_order": order}, script=SCRIPT, seeds=[0]
        )
        record.append(options.out)
        error = paired_standard_error(found, dense)
        print(f"{form}: {record.value:+.4f} ± {error:.4f} over dense", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
