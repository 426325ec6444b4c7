"""What benchmarks/training.py measures under which name, which bars that answers, and how long it will take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.peers.peer import Setting, parse_method
from lemo.measure.flops import DecoderShape, LayerWork, step_flops
from lemo.train.rehearsal import shape_config

LENGTHS = {"4k": 4096, "8k": 8192, "16k": 16384, "32k": 32768, "64k": 65536, "128k": 131072}
# Timed steps over both turns; in each turn as many of one batch as of the other, but for 128K, which has one batch.
STEPS = {"4k": 20, "8k": 20, "16k": 12, "32k": 8, "64k": 8, "128k": 3}
FAMILY = {"llama2-7b": "llama2", "llama3-8b": "llama3"}  # as in the ids of bars

HF = ("hf_peft", "hf_peft:adapter=model")
HF_LAYER = ("hf_peft:recompute=layer", "hf_peft:adapter=model,recompute=layer")
LIGER = ("liger", "liger:adapter=model")
LIGER_LAYER = ("liger:recompute=layer", "liger:adapter=model,recompute=layer")
# What of the model is recomputed: the fastest level that leaves room on one GPU for the two fixed shares, and for the
# default the level that its memory bar asks for.
RECOMPUTE = {
    "k50": {"8k": "none", "32k": "none", "64k": "mlp", "128k": "lin"},
    "k30": {"8k": "none", "32k": "none", "64k": "none", "128k": "mlp"},
    "default": {"8k": "none", "32k": "none", "64k": "lin", "128k": "lin"},
}
# The setting that the quality study recommends, by shape.
_EXACT = "keep=0.12,forward=1.0,gradient=keys,scorer=recent,kv=all,dense=,share=0.12,local=0.25,span=1024,context=1024"
DEFAULT = {"llama2-7b": _EXACT, "llama3-8b": _EXACT}
# What is saved for rows that only offer keys waits in host memory where a bar limits the memory: their inputs and what
# else is saved of them, or keys and values as well, which would be computed again.
OFFLOADS = {"llama2-7b": {"8k": "1", "64k": "keys", "128k": "keys"}, "llama3-8b": {"64k": "keys", "128k": "keys"}}
# FLOP/s that a step reaches, for estimates only.
SPEED = {"liger": 500e12, "lemo_dense": 500e12, "lemo": 450e12}
SPEED_ELSE, LAUNCH_S, START_S = 420e12, 0.06, 10.0


@dataclass(frozen=True)
class Comparison:
    """A ratio or a peak that is published.

    Attributes:
        candidate: method.
        baselines: methods; the strongest of those that ran counts. Empty for a peak by itself.
        what: `time`; `memory` (peak over peak); `gib` (the candidate's own peak); `paper_time` and `paper_memory`,
            which are averaged over all groups of the preset.
        bar: that it answers, without shape; None for none.
    """

    candidate: str
    baselines: tuple[str, ...]
    what: str
    bar: str | None = None


@dataclass(frozen=True)
class Group:
    """Methods that take turns on one setting.

    Attributes:
        setting: what they share.
        methods: in order of their turns.
        comparisons: what is published about them.
        steps: timed steps of each over all turns.
        warmup: steps before, in each turn.
        turns: of each method.
    """

    setting: Setting
    methods: tuple[str, ...]
    comparisons: tuple[Comparison, ...] = ()
    steps: int = 20
    warmup: int = 2
    turns: int = 2

    def steps_of(self, turn: int) -> int:
        """Timed steps of a method in one turn; the first turns take what does not divide."""
        return max(1, self.steps // self.turns + (turn < self.steps % self.turns))


def lemo_method(use: str, shape: str, length: str) -> str:
    """The method of `k50`, `k30` or `default` at a length."""
    chosen = {"k50": "keep=0.5,kv=kept", "k30": "keep=0.3,kv=kept,share=0.3"}.get(use)
    if chosen is None:
        offload = OFFLOADS[shape].get(length)
        chosen = DEFAULT[shape] + ("" if offload is None else f",offload={offload}")
    return f"lemo:{chosen},recompute={RECOMPUTE[use][length]}"


def _group(shape: str, length: str, lora: str, methods: tuple[str, ...], comparisons: Any = ()) -> Group:
    warmup = 1 if length == "128k" else 2
    unique = tuple(dict.fromkeys(methods))
    return Group(Setting(shape, LENGTHS[length], lora), unique, tuple(comparisons), STEPS[length], warmup)


def _main_group(shape: str, length: str, lora: str) -> Group:
    """Liger against lemo's fixed shares and its default."""
    # PEFT's fp32 adapters only add casts and copies, as both variants at 8K and 32K show; this one is the stronger.
    baselines = (LIGER if length == "8k" else LIGER_LAYER)[1:]
    default = lemo_method("default", shape, length)
    comparisons = [Comparison(default, baselines, "time", f"C.{length}_time")]
    if length != "32k" and not (length == "8k" and shape == "llama3-8b"):
        comparisons.append(Comparison(default, (), "gib", f"C.{length}_gib"))
    methods = (*baselines, default)
    if shape == "llama2-7b":
        fixed = {use: lemo_method(use, shape, length) for use in ("k50", "k30")}
        comparisons += [Comparison(fixed[use], baselines, "time", f"C.{length}_{use}") for use in fixed]
        methods = (*baselines, *fixed.values(), default)
        if lora == "qkvo" and length != "128k":
            dense = f"lemo_dense:recompute={'none' if length == '8k' else 'layer'}"
            comparisons.append(Comparison(dense, baselines, "time", "C.dense_parity"))
            methods = (*methods, dense)
        if length == "8k" and lora == "qkvo":
            # Without the last layer's saving, and the default with everything on the device.
            variants = (fixed["k50"] + ",last=all", default.replace(",offload=1", ""))
            methods = (*methods, *variants)
            comparisons += [Comparison(variant, baselines, "time") for variant in variants]
    return _group(shape, length, lora, methods, comparisons)


def _main(length: str) -> list[Group]:
    sets = [("llama2-7b", "qkvo"), ("llama3-8b", "qkvo")]
    if length in ("8k", "64k"):
        sets += [(shape, "all") for shape, _ in sets]
    return [_main_group(shape, length, lora) for shape, lora in sets]


def _engines() -> list[Group]:
    """Without recomputation the generic executor needs more than the 140 GiB of an H200 at 64K: that runs at 32K."""

    def method(engine: str, level: str) -> str:
        return f"lemo:keep=0.5,kv=kept,engine={engine},recompute={level}"

    def group(length: str, level: str, whats: dict[str, str | None]) -> Group:
        fused, generic = (method(engine, level) for engine in ("fused", "generic"))
        compared = [Comparison(fused, (generic,), what, bar) for what, bar in whats.items()]
        return _group("llama2-7b", length, "qkvo", (generic, fused), compared)

    return [
        group("32k", "none", {"time": "C.over_generic_time", "memory": None}),
        group("64k", "layer", {"time": "C.over_generic_time", "memory": "C.over_generic_gib"}),
    ]


def _paper() -> list[Group]:
    candidate = "lemo:keep=0.3,kv=kept,share=0.3"
    compared = [
        Comparison(candidate, HF, "paper_time", "C.paper_time"),
        Comparison(candidate, HF, "paper_memory", "C.paper_memory"),
    ]
    methods = (*HF, "longlora_s2", candidate)
    shapes = ("llama2-7b", "llama3-8b", "opt-6.7b", "opt-1.3b")
    return [_group(shape, length, "qkvo", methods, compared) for shape in shapes for length in ("4k", "8k")]


def _peers(length: str) -> list[Group]:
    level = "none" if length == "8k" else "layer"
    methods = (
        *(HF if level == "none" else HF_LAYER),
        *(LIGER if level == "none" else LIGER_LAYER),
        f"trl_chunked:recompute={level}",
        f"longlora_s2:recompute={level}",
        f"jenga_rule:recompute={level}",
        f"random_ltd:recompute={level}",
        "offload",
        "unsloth",
        f"lemo_dense:recompute={level}",
        lemo_method("k50", "llama2-7b", length),
    )
    return [_group("llama2-7b", length, "qkvo", methods)]


def _four_bits() -> list[Group]:
    """Base weights in 4 bits: what a card of 24 GiB could hold."""
    baseline = "liger:adapter=model,recompute=layer,bits=4"
    candidate = f"lemo:{DEFAULT['llama3-8b']},offload=1,recompute=lin,bits=4"
    compared = [Comparison(candidate, (baseline,), what) for what in ("time", "memory")]
    return [_group("llama3-8b", "64k", "all", (baseline, candidate), compared)]


def _smoke() -> list[Group]:
    methods = (
        "hf_peft",
        "hf_peft:adapter=model,recompute=layer",
        *LIGER,
        "liger:adapter=model,recompute=layer",
        "trl_chunked",
        "longlora_s2",
        "jenga_rule",
        "random_ltd",
        "offload",
        "unsloth",
        "lemo_dense",
        "lemo:engine=generic",
        "lemo",
        "lemo:recompute=layer",
        "lemo:kv=all,keep=0.3,share=0.3",
    )
    group = _group("llama2-7b", "4k", "qkvo", methods)
    return [replace(group, setting=replace(group.setting, layers=4), steps=3, warmup=1, turns=1)]


def presets() -> dict[str, list[Group]]:
    """All presets by name."""
    found = {
        "smoke": _smoke(),
        "baselines-8k": [_group("llama2-7b", "8k", "qkvo", (*HF, *LIGER, *HF_LAYER, *LIGER_LAYER, "trl_chunked"))],
        "engines": _engines(),
        "4bit-64k": _four_bits(),
        "paper": _paper(),
        "peers-8k": _peers("8k"),
        "peers-32k": _peers("32k"),
        "activations-16k": [
            _group("llama2-7b", "16k", "qkvo", (*HF, *LIGER, "longlora_s2", "lemo:keep=0.3,kv=kept,share=0.3"))
        ],
    }
    return found | {length: _main(length) for length in ("8k", "32k", "64k", "128k")}


def estimate_step_seconds(setting: Setting, method: str) -> float:
    """Rough time of a step on an H200, by counting FLOPs."""
    name, options = parse_method(method)
    shape = DecoderShape.from_config(shape_config(setting.shape, tokens=setting.tokens, layers=setting.layers))
    level: Any = options.get("recompute", "layer" if name in ("offload", "unsloth") else "none")
    keep = float(options.get("keep", 0.5)) if name == "lemo" else 1.0
    forward = float(options.get("forward") or keep) if name == "lemo" else keep
    choices: Any = {"kv": options.get("kv", "kept"), "gradient": options.get("gradient", "rows")}
    choices |= {"far_share": float(options.get("far", 1.0)), "local_ratio": float(options.get("local", 0))}
    choices |= {"local_forward": options.get("local_forward", "near")}
    window = int(options["context"]) if options.get("context") else None
    work = LayerWork(forward, keep, recompute=level, context_window=window, **choices)
    dense = LayerWork(recompute=level)
    ends = 0 if options.get("dense") == "" else min(2, shape.layers)
    flops = step_flops(shape, setting.tokens, [dense] * ends + [work] * (shape.layers - ends))
    return LAUNCH_S + flops.total / SPEED.get(name, SPEED_ELSE)


def estimate_turn_seconds(group: Group, method: str, turn: int = 0, step_seconds: float | None = None) -> float:
    """Rough time of one turn with start, warm-up and the first turn's probe. `step_seconds`: of an earlier turn."""
    step = estimate_step_seconds(group.setting, method) if step_seconds is None else step_seconds
    return START_S + step * (group.warmup + group.steps_of(turn) + (turn == 0))
