"""The diagrams of docs/how-it-works.md, drawn from what lemo itself selects, counts and saves.

    python -m docs.figures.diagrams

`rows.svg` and `budgets.svg` show real selections of a small batch, with gains by `lemo.measure.flops`. `saved.svg` runs
a layer of Llama-2's proportions forward and counts what autograd holds for backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from lemo.cli.presets import PRESETS
from lemo.core.layout import Layout
from lemo.core.policy import select
from lemo.core.score import Random, Recent, ScoreInputs
from lemo.core.selection import RowSet, Selection
from lemo.measure.flops import DecoderShape, LayerWork, ideal_gain, step_flops

HERE = Path(__file__).parent
BLOCK = 64
RUNS, LOCAL, FORWARD, SKIPS, LOSS, INK = "#2563eb", "#14b8a6", "#a9c6fb", "#e5e7eb", "#d97706", "#1f2937"
FAR_PLACE = 0.513  # mean place of far rows in 64K tokens, benchmarks/far_rows.py
LLAMA_3_8B = DecoderShape(layers=32, width=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128, vocabulary=128256)


def small_layout(blocks: int, loss: Sequence[int]) -> Layout:
    """One document with loss on the rows of some blocks."""
    loss_BT = torch.isin(torch.arange(blocks), torch.tensor(loss)).repeat_interleave(BLOCK)[None]
    return Layout.build(torch.zeros(1, blocks * BLOCK, dtype=torch.int64), loss_BT, block_size=BLOCK)


def draw_selection(layout: Layout, layer: int, forward_ratio: float, backward_ratio: float) -> Selection:
    """What one layer runs when blocks are drawn at random."""
    return select_by(Random(seed=3), layout, layer, forward_ratio, backward_ratio)


def select_by(scorer: Any, layout: Layout, layer: int, forward_ratio: float, backward_ratio: float) -> Selection:
    """What one layer runs when a scorer ranks blocks."""
    scores_K = scorer.scores(ScoreInputs(layout, layer=layer))
    return select(layout, scores_K, forward_ratio=forward_ratio, backward_ratio=backward_ratio)


def chosen_blocks(layout: Layout, rows: RowSet | None) -> set[int]:
    """Blocks whose rows are in a set; None is all."""
    if rows is None:
        return set(range(len(layout.block_start_K)))
    return set(layout.block_of_row_N[rows.chosen()].tolist())


def new_figure(width: float, height: float) -> Figure:
    """A white figure, which dark pages keep readable."""
    return Figure(figsize=(width, height), facecolor="white", layout="constrained")


def save(figure: Figure, name: str, folder: Path) -> None:
    """Writes an SVG whose bytes do not depend on the day."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "lemo", "font.size": 9}):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def draw_strip(axes: Axes, y: float, colours: list[str], places: list[float], marks: set[int]) -> None:
    """Blocks of one stream as squares; those that carry loss have a mark."""
    for k, (place, colour) in enumerate(zip(places, colours, strict=True)):
        axes.add_patch(Rectangle((place, y), 0.9, 0.8, facecolor=colour, edgecolor="none", zorder=3))
        if k in marks:
            axes.plot(place + 0.45, y + 0.4, "o", color=LOSS, markersize=5, zorder=4)


def draw_rows(folder: Path = HERE) -> None:
    """y = x; y[rows] = layer(x[rows])."""
    blocks = 16
    layout = small_layout(blocks, range(11, 13))
    runs = sorted(chosen_blocks(layout, draw_selection(layout, 0, 0.5, 0.5).forward))
    loss = set(layout.supervised_K.nonzero().squeeze(-1).tolist())
    figure = new_figure(9, 3.7)
    axes = figure.add_subplot()
    everywhere = [float(k) for k in range(blocks)]
    compact = [3.9 + 1.02 * i for i in range(len(runs))]
    draw_strip(axes, 5, [RUNS if k in runs else SKIPS for k in range(blocks)], everywhere, loss)
    draw_strip(axes, 2.5, [RUNS] * len(runs), compact, {runs.index(k) for k in loss})
    draw_strip(axes, 0, [RUNS if k in runs else SKIPS for k in range(blocks)], everywhere, loss)
    box = Rectangle((3.6, 2.2), 1.02 * len(runs) + 0.5, 1.4, facecolor="white", edgecolor=INK, linewidth=1.2, zorder=2)
    axes.add_patch(box)
    for place, k in zip(compact, runs, strict=True):
        _arrow(axes, (k + 0.45, 4.95), (place + 0.45, 3.35), RUNS, 5)
        _arrow(axes, (place + 0.45, 2.45), (k + 0.45, 0.85), RUNS, 5)
    for k in set(range(blocks)) - set(runs):
        _arrow(axes, (k + 0.45, 4.95), (k + 0.45, 0.85), "#c4c8cf", 1)
    texts = {5.4: "x: the residual stream,\na square is 64 tokens", 0.4: "y: the same stream,\nbehind the layer"}
    texts[2.9] = "layer(x[rows]): attention\nand MLP of Transformers,\nat the rows' own positions"
    for y, text in texts.items():
        axes.text(16.5, y, text, va="center", fontsize=9, color=INK)
    note = "grey: skips the layer, and takes its low-rank bypass · blue: runs · dot: carries loss, never skips"
    axes.text(8, -0.7, note, ha="center", fontsize=9, color=INK)
    axes.set(xlim=(-0.2, 21.5), ylim=(-1.1, 6.1))
    axes.axis("off")
    save(figure, "rows", folder)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, order: int) -> None:
    options: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 7, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, color=colour, zorder=order, **options))


@dataclass(frozen=True)
class Panel:
    """One setting of `budgets.svg`.

    Attributes:
        title: of the panel.
        ratios: forward and backward, as the title says them.
        work: of a layer that leaves something out.
        far: blocks with far loss rows.
        loss_share: share of rows with loss that the head is counted for.
        ends: dense layers, counted at both ends.
        scorer: of blocks without loss.
        local: blocks with local loss rows.
    """

    title: str
    ratios: str
    work: LayerWork
    far: Sequence[int]
    loss_share: float
    ends: int = 0
    scorer: Any = field(default_factory=Recent)
    local: Sequence[int] = ()

    @property
    def gain(self) -> float:
        """Operations of a dense step over those of this one."""
        return full_gain(self.work, self.ends, self.loss_share)


def panel_of(name: str, far: Sequence[int], local: Sequence[int]) -> Panel:
    """A preset, with blocks in about the shares that it draws."""
    preset = PRESETS[name]
    further = {"context_window": preset.context_window, "local_ratio": preset.local_share}
    forward, backward = (preset.sparsity[f"{way}_ratio"] for way in ("forward", "backward"))
    further |= {"far_place": FAR_PLACE, "lora_rank": 16}
    work = LayerWork(forward, backward, gradient=preset.sparsity["gradient"], kv="all", recompute="lin", **further)
    said = f"{forward:g}, {backward:g} + {preset.local_share:g}"
    loss_share = preset.loss_share + preset.local_share
    return Panel(f"{name}, a preset", said, work, far, loss_share, local=local)


def draw_budgets(folder: Path = HERE) -> None:
    """Budgets of one document, with the work they leave: dense, two presets, half of the rows."""
    blocks = 24
    dense, half = LayerWork(recompute="layer"), LayerWork(0.5, 0.5, kv="all", recompute="lin")
    some = range(18, 21)
    panels = [
        Panel("dense, layers recomputed", "1, 1", dense, range(blocks), 1.0),
        panel_of("balanced", some, [*range(4, 7), *range(12, 15)]),
        panel_of("fast", [18], range(9, 13)),
        Panel("half of the rows", "0.5, 0.5", half, some, len(some) / blocks, ends=2, scorer=Random(seed=3)),
    ]
    figure = new_figure(9, 4.4)
    for place, panel in enumerate(panels):
        draw_panel(figure.add_subplot(2, 2, place + 1), panel, blocks)
    note = (
        "deep blue and green: forward and backward · light blue: forward only · grey: skips\n"
        "▼ far loss rows: attend to all rows before them · ▲ local loss rows: attend to the text shortly before them"
    )
    figure.supxlabel(note, fontsize=9, color=INK)
    save(figure, "budgets", folder)


def draw_panel(axes: Axes, panel: Panel, blocks: int, layers: int = 8) -> None:
    """Blocks of eight layers, coloured by what each layer does with them."""
    layout = small_layout(blocks, [*panel.far, *panel.local])
    for layer in range(layers):
        whole = panel.ends and layer in (0, layers - 1)
        ratios = (1.0, 1.0) if whole else (panel.work.forward_ratio, panel.work.backward_ratio)
        selection = select_by(panel.scorer, layout, layer, *ratios)
        runs, passes = chosen_blocks(layout, selection.forward), chosen_blocks(layout, selection.backward)
        for k in range(blocks):
            colour = LOCAL if k in panel.local else RUNS if k in passes else FORWARD if k in runs else SKIPS
            axes.add_patch(Rectangle((k, layer), 0.92, 0.88, facecolor=colour, edgecolor="none"))
    for where, mark in ((panel.far, "v"), (panel.local, "^")):
        axes.plot([k + 0.46 for k in where], [-0.45] * len(where), mark, color=LOSS, markersize=4)
    title = f"{panel.title} ({panel.ratios}): {panel.gain:.2f}x"
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set(xlim=(-0.3, blocks + 0.2), ylim=(layers + 0.1, -1))
    axes.set_ylabel("layer", fontsize=8)
    axes.set_yticks([])
    axes.set_xticks([])
    for side in axes.spines.values():
        side.set_visible(False)


def full_gain(work: LayerWork, dense_layers: int, loss_share: float, tokens: int = 65536) -> float:
    """Operations of a dense step that recomputes its layers over those of a step with the head on its loss rows."""
    baseline = step_flops(LLAMA_3_8B, tokens, [LayerWork(recompute="layer")] * LLAMA_3_8B.layers).total
    ours = baseline / ideal_gain(LLAMA_3_8B, tokens, work, dense_layers=dense_layers)
    return baseline / (ours - (1 - loss_share) * 4.0 * LLAMA_3_8B.width * LLAMA_3_8B.vocabulary * tokens)


def saved_widths() -> dict[str, float]:
    """What a layer holds for backward, in numbers per token of the sequence, divided by the model's width."""
    import lemo

    tokens, blocks = 1024, 16
    ids_BT = torch.randint(3, 90, (1, tokens), generator=torch.Generator().manual_seed(0))
    labels_BT = torch.full_like(ids_BT, -100)
    labels_BT[:, -tokens // blocks :] = ids_BT[:, -tokens // blocks :]
    found = {}
    for name, plan, options in (
        ("Transformers, nothing recomputed", None, {}),
        ("fused, nothing skips", (1.0, 1.0), {"recompute": "none"}),
        ("fused, half skips", (0.5, 0.5), {"recompute": "none"}),
        ("fused, half skips; mlp recomputed", (0.5, 0.5), {"recompute": "mlp"}),
        ("fused, half skips; lin recomputed", (0.5, 0.5), {"recompute": "lin"}),
        ("fused, half skips; layer recomputed", (0.5, 0.5), {"recompute": "layer"}),
        ("fused, as by default, 6 of 16 blocks backward", (1.0, 6 / 16), {"recompute": "none"}),
    ):
        held = []
        for layers in (2, 4):  # the difference leaves out embedding, head and loss
            model = _adapted(layers)
            if plan is None:
                held.append(_held(model, ids_BT, labels_BT))
                continue
            base = model.base_model.model
            how = {"kv": "all", "gradient": "keys"} if plan[0] == 1 > plan[1] else {"kv": "kept"}
            sparse = lemo.Plan.uniform(base, forward_ratio=plan[0], backward_ratio=plan[1], **how)
            attached = lemo.attach(model, sparse, engine="fused", unsafe_no_bypass=True, self_test=False, **options)
            with attached:
                held.append(_held(model, ids_BT, labels_BT))
        found[name] = (held[1] - held[0]) / 2 / tokens / model.config.hidden_size
    return found


def _adapted(layers: int) -> Any:
    """A small Llama with the proportions of Llama-2-7B and adapters on all its linear maps."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "num_hidden_layers": layers}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, max_position_embeddings=1024, **sizes))
    return get_peft_model(model, LoraConfig(r=1, target_modules="all-linear")).train()


def _held(model: Any, ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> int:
    """Numbers that autograd saves in one forward, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids_BT, labels=labels_BT)
    return sum(t.untyped_storage().nbytes() // t.element_size() for t in storages.values())


def draw_saved(folder: Path = HERE) -> None:
    """Bars of what a layer holds."""
    found = saved_widths()
    figure = new_figure(9, 2.9)
    axes = figure.add_subplot()
    colours = ["#6b7280" if name.startswith("Tr") else RUNS for name in found]
    bars = axes.barh(range(len(found)), list(found.values()), color=colours, height=0.62)
    axes.bar_label(bars, fmt="%.1f", padding=4, fontsize=9)
    axes.set_yticks(range(len(found)), list(found), fontsize=9)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.set_title("Held for backward, per token and layer, in widths of the model", loc="left", fontsize=10)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    save(figure, "saved", folder)


if __name__ == "__main__":
    draw_rows()
    draw_budgets()
    draw_saved()
