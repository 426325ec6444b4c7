"""Readable names for the methods of the training benchmark, whose own names are for its command line."""

from __future__ import annotations

_PEERS = {
    "hf_peft": "HF + PEFT",
    "liger": "Liger",
    "trl_chunked": "TRL, chunked loss",
    "longlora_s2": "LongLoRA's shifted groups",
    "jenga_rule": "the artifact's fixed rule",
    "random_ltd": "random-LTD's rule",
    "offload": "HF + PEFT, activations on the host",
    "unsloth": "Unsloth",
    "lemo_dense": "lemo, every row",
}


def name_method(method: str) -> str:
    """What a method is, in words.

    Args:
        method: as `NAME` or `NAME:KEY=VALUE,...`; keys without words of their own stay as they are.
    """
    name, _, text = method.partition(":")
    options = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    words = _lemo(options) if name == "lemo" else [_PEERS.get(name, name)]
    if name in ("hf_peft", "liger") and options.pop("adapter", None) != "model":
        words.append("fp32 adapters")
    level = options.pop("recompute", "none")
    if level != "none":
        words.append("recompute" if name != "lemo" else f"recompute {level}")
    if (moved := options.pop("offload", "0")) != "0":
        words.append("offload" if moved == "1" else f"offload of {moved} too")
    if bits := options.pop("bits", None):
        words.append(f"{bits}-bit base")
    if (engine := options.pop("engine", "fused")) != "fused":
        words.append(f"{engine} engine")
    if options.pop("last", None) == "all":
        words.append("last layer on all rows")
    return ", ".join([*words, *(f"{key}={value}" for key, value in options.items())])


def _lemo(options: dict[str, str]) -> list[str]:
    """The rows of a lemo method; takes the options that they are told by."""
    keep, kv = options.pop("keep", "0.5"), options.pop("kv", "kept")
    share = options.pop("share", None)
    if options.pop("forward", keep) == keep:
        # Where the share of loss rows is another than the benchmark's own, the table's last column says so.
        return [f"lemo, {_percent(keep)} of rows", f"kv {kv}"]
    for key, usual in (("gradient", "keys"), ("scorer", "recent"), ("dense", ""), ("span", "1024")):
        if options.get(key) == usual:
            del options[key]
    local, window = options.pop("local", "0"), options.pop("context", "")
    rows = f"{_percent(share or keep)} far"
    rows += f" + {_percent(local)} local loss rows" if float(local) else " loss rows"
    return [f"lemo, {rows}", *([f"window {int(window):,}"] if window else [])]


def _percent(share: str) -> str:
    return f"{100 * float(share):.0f} %"
