"""Which part of the model the tensors belong to that a training step saves for backward, as Records.

    python -m benchmarks.saved_parts [--out FILE] [--tokens 256] [--layers 1] [--shape llama2-7b]

Totals at 16,384 tokens are measured on a GPU by `benchmarks.training --preset activations-16k`; here they are split.

- LoRA and LongLoRA: the real peer runs one forward of `--layers` layers and of one more, on a CPU, with a batch of
  `--tokens` tokens and of twice as many. Every storage that autograd saves is counted once, for the innermost module
  that saved it first; parameters and the batch itself are left out. The first layers are counted as they are (the
  first saves less: nothing behind it wants a gradient), each further one as the difference. Bytes of every part must
  be proportional to the tokens within 1 %; the longer batch is scaled.
- lemo: the closed form `saved_bytes` of every layer, which tests hold to be what autograd saves, byte for byte, and the
  rows and gradients that its loss keeps.

Parts, and what of lemo's is put where, so that the same tensors are compared:

- norms: inputs of the two norms of a layer, with their statistics (lemo: frame, middle, rstd, mean). Transformers' norm
  saves its input in fp32, lemo the rows in the model's dtype.
- projections: what q, k, v and o with their adapters save: their inputs, fp32 copies of them where PEFT makes any, and
  low-rank rows. lemo computes these again. An input that attention saved before, its output, is attention's.
- attention: rotated queries and keys, values, output, log-sum-exp (lemo: query, key, value, output, lse).
- mlp: lemo: gate and up. Transformers saves the activated gate as well.
- residual: the rest of a layer (lemo: statistics of the rows that take the bypass, and the numbers of its rows, which
  are held beside the graph).
- head: embedding, last norm, head and loss.

Versions on the CPU may differ from those on the GPU. The setting of each Record has the bytes that were held on the GPU
and the share of them that the parts of the method add up to.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.peer import Prepared, Setting, load_method
from benchmarks.training_cell import make_batches
from lemo.errors import DataError
from lemo.measure.fused_memory import index_bytes, saved_bytes
from lemo.measure.record import Record, read_records
from lemo.measure.sizes import ModelSizes, read_sizes
from lemo.measure.step_memory import INDEX, WIDE, StepSetting, layer_rows
from lemo.train.rehearsal import shape_config

SCRIPT = "benchmarks/saved_parts.py"
RESULTS = Path(__file__).resolve().parent / "results"
SHAPE, TOKENS = "llama2-7b", 16384
PEERS = ("hf_peft", "hf_peft:adapter=model", "longlora_s2")
LEMO = "lemo:keep=0.3,kv=kept,share=0.3"
PARTS = {
    "norms": "norms",
    "projections": "projections and adapters",
    "attention": "attention",
    "mlp": "MLP",
    "residual": "residual and other",
    "head": "embedding, head, loss",
}
LEMO_PARTS = {
    **dict.fromkeys(("frame", "middle", "rstd", "mean"), "norms"),
    **dict.fromkeys(("query", "key", "value", "output", "lse"), "attention"),
    **dict.fromkeys(("gate", "up"), "mlp"),
    "bypass_rstd": "residual",
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
WITHIN = 0.01
_LAYER = re.compile(r"(?:^|\.)layers\.\d+(?:\.|$)(?P<inside>.*)")


def part_of(module: str) -> str:
    """Part that a module belongs to, by its name in the model."""
    if (match := _LAYER.search(module)) is None:
        return "head"
    inside = match["inside"]
    if "norm" in inside:
        return "norms"
    if inside.startswith("self_attn"):
        return "projections" if "_proj" in inside else "attention"
    return "mlp" if inside.startswith("mlp") else "residual"


@contextmanager
def innermost_module(model: torch.nn.Module) -> Iterator[Callable[[], str]]:
    """Yields a function that names the innermost module whose forward runs now."""
    stack: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: stack.append(name)

    def leave(*_: Any) -> None:
        stack.pop()

    hooks = []
    for name, module in model.named_modules():
        hooks += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        yield lambda: stack[-1] if stack else ""
    finally:
        for hook in hooks:
            hook.remove()


def count_saved(prepared: Prepared, batch: Mapping[str, torch.Tensor]) -> Counter[str]:
    """Bytes that autograd saves in one forward, by part; each storage once, parameters and the batch left out."""
    known = [*prepared.model.parameters(), *prepared.model.buffers(), *batch.values()]
    own = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: dict[int, tuple[torch.UntypedStorage, str]] = {}  # storages are kept, or an address could come again
    with innermost_module(prepared.model) as current:

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved.setdefault(storage.data_ptr(), (storage, part_of(current())))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = prepared.forward(dict(batch))
    found = Counter(dict.fromkeys(PARTS, 0))
    for storage, part in saved.values():
        found[part] += storage.nbytes()
    del loss  # the graph has to live until all is counted
    return found


def run_lengths(setting: Setting, method: str, lengths: Sequence[int]) -> list[Counter[str]]:
    """Saved bytes by part of one model at several lengths."""
    peer, options = load_method(method)
    config = shape_config(setting.shape, tokens=max(lengths), layers=setting.layers)
    prepared = peer.prepare(config, replace(setting, tokens=min(lengths)), options)
    vocabulary = config.get_text_config().vocab_size
    return [count_saved(prepared, next(make_batches(replace(setting, tokens=n), vocabulary, 1))) for n in lengths]


def extend_layers(fewer: Mapping[str, int], more: Mapping[str, int], further: int) -> dict[str, int]:
    """Bytes with so many layers further, from those of two models that differ by one layer."""
    return {part: fewer[part] + further * (more[part] - fewer[part]) for part in PARTS}


def check_proportional(short: Mapping[str, int], long: Mapping[str, int], times: float) -> None:
    """Every part of the longer batch must be `times` that of the shorter one.

    Raises:
        DataError: a part is more than 1 % off.
    """
    for part in PARTS:
        if abs(long[part] - times * short[part]) > WITHIN * times * short[part]:
            raise DataError(f"{part}: {short[part]} bytes, and {long[part]} in {times:g} times the tokens")


def peer_parts(setting: Setting, method: str, tokens: int) -> dict[str, list[float]]:
    """Bytes of the whole model at `tokens` tokens by part, from a batch of the setting's length and one twice as long.

    Args:
        setting: with the length of the shorter batch and the layers of the smaller model.
        method: of PEERS.
        tokens: to scale to.

    Raises:
        DataError: bytes are not proportional to tokens.
    """
    assert setting.layers is not None
    lengths = (setting.tokens, 2 * setting.tokens)
    fewer = run_lengths(setting, method, lengths)
    more = run_lengths(replace(setting, layers=setting.layers + 1), method, lengths)
    layers = shape_config(setting.shape, tokens=tokens).get_text_config().num_hidden_layers
    whole = [extend_layers(a, b, layers - setting.layers) for a, b in zip(fewer, more, strict=True)]
    check_proportional(whole[0], whole[1], 2.0)
    return {part: [found[part] * tokens / n for found, n in zip(whole, lengths, strict=True)] for part in PARTS}


def lemo_parts(sizes: ModelSizes, setting: StepSetting) -> dict[str, list[float]]:
    """Bytes of a step of the fused engine by part, in closed form."""
    found = dict.fromkeys(PARTS, 0.0)
    for rows in layer_rows(sizes, setting):
        for name, size in saved_bytes(sizes, rows, setting.recompute).items():
            found[LEMO_PARTS[name]] += size
        found["residual"] += index_bytes(rows)
    # The last norm's rows with statistics and numbers, and the loss's gradient of what the norm returned.
    found["head"] = setting.loss_rows * (2 * sizes.shape.width * sizes.element_bytes + WIDE + INDEX)
    return {part: [size] for part, size in found.items()}


def lemo_step(method: str, tokens: int) -> StepSetting:
    """The step of a lemo method without exact forward, nothing recomputed."""
    _, options = load_method(method)
    keep = float(options["keep"])
    return StepSetting(
        tokens,
        float(options["share"]),
        forward_ratio=keep,
        backward_ratio=keep,
        kv=options["kv"],
        dense_layers=len(options["dense"].split("/")),
        recompute=options["recompute"],
        bypass_rank=int(options["bypass"]),
    )


def held_record(records: Sequence[Record], setting: Setting, method: str) -> Record | None:
    """Newest Record of what the method held between forward and backward on a GPU."""
    name = f"training/{setting.label}/{setting.tokens}/{setting.lora}/{method}/held_bytes"
    return max((r for r in records if r.name == name), key=lambda r: r.time, default=None)


def write_parts(
    out: Path, setting: Setting, method: str, parts: Mapping[str, Sequence[float]], how: Mapping[str, Any]
) -> None:
    """A Record of each part, and the sum beside what was held on a GPU.

    Args:
        out: JSON-lines file.
        setting: of the step, with all its layers.
        method: as `benchmarks.training` takes it.
        parts: bytes by part, the last of each list being the published one.
        how: they were found.
    """
    total = sum(samples[-1] for samples in parts.values())
    held = held_record(read_records(RESULTS / "training.jsonl"), setting, method)
    against: dict[str, Any] = {"parts_sum_bytes": total}
    if held is not None:
        against |= {"held_bytes": held.value, "held_on": held.device, "held_time": held.time}
        against |= {"held_versions": dict(held.versions), "share_of_held": total / held.value}
    for part, samples in parts.items():
        described = {**setting.described(), "method": method, "part": part, **how, **against, "statistic": "last"}
        name = f"saved/{setting.label}/{setting.tokens}/{method}/{part}"
        Record.measure(name, "bytes", list(samples), described, script=SCRIPT, seeds=(setting.seed,)).append(out)
    print(f"{method}: " + ", ".join(f"{part} {samples[-1] / 2**30:.2f}" for part, samples in parts.items()), end="")
    print(f"; {total / 2**30:.2f} GiB", end="")
    print("" if held is None else f", {total / held.value:.1%} of the {held.value / 2**30:.2f} held on {held.device}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "saved.jsonl")
    parser.add_argument("--tokens", type=int, default=256, help="of the shorter batch; the other has twice as many")
    parser.add_argument("--layers", type=int, default=1, help="of the smaller model; the other has one more")
    parser.add_argument("--shape", default=SHAPE, help="name or folder of a Llama")
    options = parser.parse_args(arguments)
    small = Setting(options.shape, options.tokens, layers=options.layers, device="cpu")
    whole = replace(small, tokens=TOKENS, layers=None)
    how = {"found": "saved tensors", "measured_tokens": [small.tokens, 2 * small.tokens]}
    how |= {"measured_layers": [options.layers, options.layers + 1]}
    for method in PEERS:
        write_parts(options.out, whole, method, peer_parts(small, method, TOKENS), how)
    step = lemo_step(LEMO, TOKENS)
    sizes = read_sizes(shape_config(options.shape, tokens=TOKENS), rank=small.rank, targets=TARGETS)
    own = replace(whole, supervised_share=step.loss_share)
    write_parts(options.out, own, LEMO, lemo_parts(sizes, step), {"found": "closed form"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
