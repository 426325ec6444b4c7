"""lemo with a plan of random predictors and a random bypass: everything that a calibrated plan costs is in the step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import lemo
from benchmarks.peers import liger
from benchmarks.peers.peer import Prepared, Setting, Unsupported, adapted, checkpoint_layers, numbers, plain_forward
from lemo.core.plan import Plan
from lemo.runtime.batch import BatchContext
from lemo.train.rehearsal import random_plan

BUSY_CYCLES = 600_000_000  # a third of a second

OPTIONS = {
    "adapter": "model",
    "bits": "16",  # of the base's linear maps; 4 by bitsandbytes
    "recompute": "none",
    "engine": "fused",  # not auto: a layer that it cannot run shall be seen
    "keep": "0.5",  # share of rows that run a layer and pass gradient
    "forward": "",  # share that runs a layer where it is another one; 1.0 for exact forward
    "kv": "kept",
    "gradient": "rows",  # of exact forward: `rows`, `pairs`, `keys`
    "context": "",  # window of rows that pass no gradient, of exact forward; empty for all keys
    "far": "1.0",  # share of the far keys that backward reads, of exact forward
    "local": "0",  # share of blocks that carry loss and attend within the context window, besides `share`
    "local_forward": "near",  # what those attend to in forward: near keys, or all
    "offload": "0",  # 1: what is saved for keys alone waits in host memory; keys: keys and values too
    "dense": "0/-1",  # layers that run densely, joined by /; empty for none
    "scorer": "predictor",
    "bypass": "64",  # its rank; 0 for none
    "last": "loss",  # rows of the last layer: those that carry `loss`, or `all` that are selected
    "base": "hf",  # `liger` puts Liger's kernels under the generic executor
    "attach": "",  # further keywords of lemo.attach, NAME/VALUE joined by +
}


def prepare(config: Any, setting: Setting, options: dict[str, str]) -> Prepared:
    if options["base"] == "liger":
        liger.patch(config)
    (keep,) = numbers(options, "keep")
    forward = float(options["forward"] or keep)
    model = adapted(config, setting, options["adapter"], bits=options["bits"])
    torch.manual_seed(setting.seed)
    plan = random_plan(
        config,
        forward_ratio=forward,
        backward_ratio=keep,
        kv=options["kv"],
        gradient=options["gradient"],
        dense_layers=tuple(int(index) for index in options["dense"].split("/") if index),
        block_size=setting.block_size,
        bypass_rank=int(options["bypass"]),
        scorer=options["scorer"],
        seed=setting.seed,
        context_window=int(options["context"]) if options["context"] else None,
        far_share=float(options["far"]),
        local_forward=options["local_forward"],
    )
    return attached(model, plan, options)


def attached(model: Any, plan: Plan, options: dict[str, str]) -> Prepared:
    """The model with a plan on it.

    Raises:
        LemoError: a layer that the fused engine cannot run, with the reason.
    """
    engine, recompute = options["engine"], options["recompute"]
    known = inspect.signature(lemo.attach).parameters
    keywords = _further(options.get("attach", ""), known)
    keeps_all = all(layer.is_dense for layer in plan.layers)
    if engine == "generic" or (engine == "auto" and keeps_all):  # then Transformers' own layers run
        checkpoint_layers(model, recompute)
    else:
        keywords["recompute"] = recompute
    moved = {"0": False, "1": True, "keys": "keys"}
    if options.get("offload", "0") not in moved:
        raise Unsupported(f"offload must be 0, 1 or keys, got {options['offload']!r}")
    if offload := moved[options.get("offload", "0")]:
        keywords["offload"] = offload
    unsafe = options.get("bypass") == "0"
    handle = lemo.attach(model, plan, engine=engine, self_test=False, unsafe_no_bypass=unsafe, **keywords)
    if options.get("last") == "all":
        handle._fused.defer = lambda context: None  # what attach offers no switch for
    return Prepared(model, plain_forward(model), lambda: _describe(handle, plan), _selection_time)


def _further(text: str, known: Any) -> dict[str, Any]:
    """Keywords of lemo.attach from NAME/VALUE+NAME/VALUE."""
    found: dict[str, Any] = {}
    for part in filter(None, text.split("+")):
        name, _, value = part.partition("/")
        if name not in known:
            raise Unsupported(f"lemo.attach has no keyword {name!r}")
        found[name] = {"true": True, "false": False}.get(value, value)
    return found


def _describe(handle: Any, plan: Plan) -> dict[str, Any]:
    """Rows and the engine of the last step."""
    layers = len(plan.layers)
    shares = handle.ratios() if handle.selections else {}
    forward = [shares.get(i, (1.0, 1.0))[0] for i in range(layers)]
    backward = [shares.get(i, (1.0, 1.0))[1] for i in range(layers)]
    found: dict[str, Any] = {
        "forward_share": sum(forward) / layers,
        "backward_share": sum(backward) / layers,
        "layers_that_skip": sum(share < 1 for share in backward),
        "sparse_batches": handle.sparse_batches,
        "dense_batches": handle.dense_batches,
        "notes": list(handle.notes),
    }
    return found


@contextmanager
def _selection_time() -> Iterator[dict[str, Any]]:
    """Seconds of GPU time between start and end of every layer's scoring and selection, as `selection_s`.

    The GPU is kept busy beforehand, so that the host runs ahead: else its waiting for the host would count.
    """
    found: dict[str, Any] = {}
    if not torch.cuda.is_available():
        yield found
        return
    marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    inner = BatchContext.select

    def timed(self: BatchContext, *args: Any, **kwargs: Any) -> Any:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        try:
            return inner(self, *args, **kwargs)
        finally:
            end.record()
            marks.append((start, end))

    BatchContext.select = timed
    torch.cuda._sleep(BUSY_CYCLES)
    try:
        yield found
    finally:
        BatchContext.select = inner
        torch.cuda.synchronize()
        found["selection_s"] = sum(start.elapsed_time(end) for start, end in marks) / 1e3
        found["selections"] = len(marks)
