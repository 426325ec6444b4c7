"""What each method of the quality grids costs: FLOPs of a sequence, steps of equal cost, ideal gain at 64K."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.quality_methods import METHODS
from benchmarks.quality_specs import Method, PlanSpec
from lemo.measure.flops import DecoderShape, Flops, LayerWork, ideal_gain, layer_flops, step_flops

LLAMA_3_8B = DecoderShape(32, 4096, 14336, 32, 8, 128, 128256)
LLAMA_2_7B = DecoderShape(32, 4096, 11008, 32, 32, 128, 32000)


# Mean place of the far rows that repeats choose, mean of the five domains: benchmarks/far_rows.py.
FAR_PLACES = {16384: 0.629, 65536: 0.513}


def far_place(method: Method, tokens: int) -> float:
    """Mean place of a method's far rows in windows of so many tokens."""
    return 0.5 if method.far == "random" else FAR_PLACES[min(FAR_PLACES, key=lambda known: abs(known - tokens))]


def at_least(spec: PlanSpec, share: float) -> PlanSpec:
    """The spec with ratios of all rows, as keeping a share of forced rows leaves them."""
    if spec.ratio_of == "context":
        forward, backward = (share + (1 - share) * r for r in (spec.forward_ratio, spec.backward_ratio))
        return replace(spec, forward_ratio=forward, backward_ratio=backward, ratio_of="all")
    backward, forward = max(spec.backward_ratio, share), max(spec.forward_ratio, share)
    return replace(spec, backward_ratio=backward, forward_ratio=forward)


def sparse_work(
    spec: PlanSpec, lora_rank: int, recompute: str = "none", progress: float = 0.0, local_share: float = 0.0
) -> LayerWork:
    """Work of a layer that skips, with ratios risen by `progress` towards 1.

    `local_share`: of the rows that pass gradient, those which attend locally.
    """
    forward, backward = (r + (1 - r) * progress for r in (spec.forward_ratio, spec.backward_ratio))
    return LayerWork(
        forward_ratio=forward,
        backward_ratio=backward - local_share,
        local_ratio=local_share,
        kv="all" if spec.kv == "all" else "kept",
        gradient=spec.gradient,  # type: ignore[arg-type]
        recompute=recompute,  # type: ignore[arg-type]
        bypass_rank=0 if spec.strip_bypass else spec.bypass_rank,
        lora_rank=lora_rank,
        context_window=spec.context_window,
        block_size=spec.block_size,
        far_share=spec.far_share,
        local_forward=spec.local_forward,  # type: ignore[arg-type]
    )


def method_flops(method: Method, shape: DecoderShape, window: int, lora_rank: int, supervised: float = 0.0) -> Flops:
    """FLOPs of one sequence of the protocol's length, mean over a run; nothing is recomputed in either run.

    Counts predictors, bypass, offered keys and dense layers. Calibration is left out: it is paid once per plan. Ratios
    are at least the supervised share where loss rows are forced.

    Args:
        method: what trains.
        shape: the model.
        window: tokens of the protocol's sequence; shorter training windows share it.
        lora_rank: of the adapter.
        supervised: share of rows that carry loss when the data decides (instruction data).
    """
    window //= method.pieces
    share = supervised or method.loss_share + method.local_share
    local = method.local_share if method.marks_local and not supervised else 0.0
    dense = LayerWork(lora_rank=lora_rank)
    if method.rival == "shifted_groups":
        total = step_flops(shape, window, [dense] * shape.layers, share)
        # Groups of a quarter: a quarter of the attention.
        saved = 0.75 * 2.0 * shape.heads * shape.head_dim * window**2 * shape.layers
        return total + Flops(forward=-saved, backward=-2.5 * saved)
    if method.plan is None:
        return step_flops(shape, window, [dense] * shape.layers, share)
    spec = method.plan
    if method.forced:
        spec = at_least(spec, share)
    if method.rival == "attention_only":
        return _attention_only_flops(shape, window, spec, lora_rank, share)
    skipping = shape.layers - len(spec.dense_layers)
    rises = [0.0] if method.ramp is None else [method.ramp.progress(i, 100) for i in range(100)]
    if method.dense_every is not None:
        rises = [0.0] * (method.dense_every - 1) + [1.0]
    if method.corrected is not None:
        rises = [0.0] * method.corrected[0] + [1.0]
    found = []
    for progress in rises:
        work = sparse_work(spec, lora_rank, progress=progress, local_share=local)
        work = replace(work, far_place=far_place(method, window))
        works = [dense] * len(spec.dense_layers) + [dense if progress == 1 else work] * skipping
        found.append(step_flops(shape, window, works, share))
    predictor = 2.0 * shape.width * shape.heads * window * skipping if spec.scorer == "predictor" else 0.0
    steps = len(found) if method.corrected is None else method.corrected[0]
    return Flops(sum(f.forward for f in found) / steps + predictor, 0.0, sum(f.backward for f in found) / steps)


def _attention_only_flops(shape: DecoderShape, window: int, spec: PlanSpec, rank: int, share: float) -> Flops:
    """Upper half: attention of the kept rows, MLP of all rows."""
    half = shape.layers // 2
    dense, kept = LayerWork(lora_rank=rank), replace(sparse_work(spec, rank), bypass_rank=0)
    total = step_flops(shape, window, [dense] * half + [kept] * (shape.layers - half), share)
    attention = replace(shape, ffn=1, gated=False)
    mlp = layer_flops(shape, window, dense), layer_flops(attention, window, dense)
    missing = (shape.layers - half) * (1 - spec.forward_ratio)
    forward, backward = mlp[0].forward - mlp[1].forward, mlp[0].backward - mlp[1].backward
    return total + Flops(missing * forward, 0.0, missing * backward)


def sequence_flops(method: Method, shape: DecoderShape, window: int, lora_rank: int, supervised: float = 0.0) -> float:
    """FLOPs per `window` tokens of training text."""
    return method_flops(method, shape, window, lora_rank, supervised).total * method.pieces


def equal_steps(method: Method, other: Method, steps: int, shape: DecoderShape, window: int, lora_rank: int) -> int:
    """Steps of `method` that cost what `steps` of `other` cost."""
    costs = [sequence_flops(m, shape, window, lora_rank) for m in (other, method)]
    return max(1, round(steps * costs[0] / costs[1]))


def _loss_shares(method: Method) -> tuple[float, float]:
    """Rows with loss, and those of them that attend locally."""
    prompts = 0.0 if method.prompt_rows is None else method.prompt_rows[0]
    local = (method.local_share if method.marks_local else 0.0) + (prompts if method.prompt_local else 0.0)
    return method.loss_share + method.local_share + prompts, local


def gain_at_64k(method: Method, recompute: str = "lin") -> dict[str, float]:
    """Ideal gain over dense + recompute with loss on all rows at 64K, for the two shapes that bars name.

    Empty for methods of others, for ramps, for dense ones, and where ratios follow from the data.
    """
    if method.plan is None or not method.forced or method.ramp is not None or method.plan.ratios_follow:
        return {}
    loss_share, local = _loss_shares(method)
    work = sparse_work(at_least(method.plan, loss_share), 16, recompute, local_share=local)
    work = replace(work, far_place=far_place(method, 65536))
    shapes = {"llama-3-8b": LLAMA_3_8B, "llama-2-7b": LLAMA_2_7B}
    found = {name: _full_gain(shape, work, len(method.plan.dense_layers), method) for name, shape in shapes.items()}
    every, sparse = method.dense_every, (method.dense_every or 1) - 1
    if method.corrected is not None:
        every = sparse = method.corrected[0]
    return found if every is None else {name: every / (sparse / gain + 1) for name, gain in found.items()}


def _full_gain(shape: DecoderShape, work: LayerWork, dense_layers: int, method: Method, tokens: int = 65536) -> float:
    """`ideal_gain` with loss rows in our head and predictors counted."""
    plain = ideal_gain(shape, tokens, work, dense_layers=dense_layers)
    baseline = step_flops(shape, tokens, [LayerWork(recompute="layer", lora_rank=work.lora_rank)] * shape.layers).total
    ours = baseline / plain
    ours -= (1 - _loss_shares(method)[0]) * 4.0 * shape.width * shape.vocabulary * tokens
    if method.plan is not None and method.plan.scorer == "predictor":
        ours += 2.0 * shape.width * shape.heads * tokens * (shape.layers - dense_layers)
    return baseline / ours


def describe(names: Sequence[str]) -> list[list[str]]:
    """Rows of a table: name, what it is, ideal gain at 64K for both shapes."""
    rows = []
    for name in names:
        gains = gain_at_64k(METHODS[name])
        cells = [f"{gains[s]:.2f}" if s in gains else "–" for s in ("llama-3-8b", "llama-2-7b")]
        rows.append([name, METHODS[name].about, *cells])
    return rows
