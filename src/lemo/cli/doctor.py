"""`lemo doctor`."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib import metadata, util
from typing import Any, Literal

import typer

_NEEDED = {"torch": (2, 11), "transformers": (5, 17), "peft": (0, 18), "accelerate": (1, 10), "safetensors": (0, 6)}
# As the README installs: from a clone, in whose folder these lines are run.
_EXTRAS = {
    "triton": "the GPU kernels of lemo's ops",
    "datasets": "Hugging Face datasets folders as data: pip install -e '.[datasets]'",
    "trl": "TRL's trainers: pip install -e '.[trl]'",
    "gguf": "models from GGUF files, and the demo: pip install -e '.[demo]'",
    "bitsandbytes": "base weights in 4 bits (model.load_in_4bit): pip install -e '.[bitsandbytes]'",
    "trackio": "tracking of runs: pip install -e '.[tracking]'",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: its name.
        state: `ok`, `missing` (something optional does not work) or `error` (training does not work).
        text: what was found.
    """

    what: str
    state: Literal["ok", "missing", "error"]
    text: str


def doctor() -> None:
    """Say what this machine can run, what is missing, and what that rules out."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    found = examine()
    table = Table("", "", "found", show_header=False, box=None)
    for finding in found:
        mark = {"ok": "[green]ok[/]", "missing": "[yellow]--[/]", "error": "[red]!![/]"}[finding.state]
        table.add_row(mark, finding.what, escape(finding.text))
    console = Console(soft_wrap=True)
    console.print(table)
    broken = [finding for finding in found if finding.state == "error"]
    console.print(verdict(found), highlight=False)
    if broken:
        raise typer.Exit(1)


def verdict(found: list[Finding]) -> str:
    """One sentence."""
    broken = [finding.what for finding in found if finding.state == "error"]
    if broken:
        return f"This machine cannot train: {', '.join(broken)}."
    states = {finding.what: finding.state for finding in found}
    if states["GPU"] != "ok":
        return "This machine can train on its CPU: enough for small models, the demo and tests."
    if states["bf16"] != "ok":
        return "This machine can train on its GPU, in float16 or float32 only (model.dtype)."
    return "This machine can train on its GPU."


def examine() -> list[Finding]:
    """Everything that was found."""
    python = sys.version_info
    state: Literal["ok", "error"] = "ok" if python >= (3, 11) else "error"
    found = [Finding("Python", state, f"{platform.python_version()} (3.11 or newer is needed)")]
    found += [_needed(name, least) for name, least in _NEEDED.items()]
    if all(finding.state == "ok" for finding in found):
        found += _hardware()
    found += [_extra(name, purpose) for name, purpose in _EXTRAS.items()]
    return found


def _needed(name: str, least: tuple[int, ...]) -> Finding:
    """A package without which nothing works."""
    wanted = ".".join(map(str, least))
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "error", f"not installed ({wanted} or newer is needed)")
    digits = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if digits < least:
        return Finding(name, "error", f"{version} is too old ({wanted} or newer is needed)")
    return Finding(name, "ok", version)


def _extra(name: str, purpose: str) -> Finding:
    """An optional package."""
    if util.find_spec(name) is None:
        return Finding(name, "missing", f"not installed; it gives {purpose}")
    try:
        return Finding(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, "ok", "installed")


def _hardware() -> list[Finding]:
    """GPU, number formats and attention kernels."""
    import torch

    if not torch.cuda.is_available():
        reason = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no device"
        return [
            Finding("GPU", "missing", f"none ({reason}); {torch.get_num_threads()} CPU threads"),
            _try("bf16", _bf16_matmul, "runs on this CPU, as fast as the CPU allows"),
            Finding("varlen attention", "missing", "needs a GPU; attention of packed rows runs by SDPA"),
        ]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        label = "GPU" if index == 0 else f"GPU {index}"
        found.append(Finding(label, "ok", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    if torch.cuda.is_bf16_supported(including_emulation=False):
        found.append(Finding("bf16", "ok", "supported by the GPU"))
    else:
        found.append(Finding("bf16", "missing", "not supported by the GPU: use model.dtype=float16 or float32"))
    found.append(_try("varlen attention", _varlen, "torch's kernel for packed documents"))
    return found


def _try(what: str, check: Any, text: str) -> Finding:
    """Runs a check; its failure is the finding."""
    try:
        check()
    except Exception as error:  # whatever a backend raises is what the user wants to know
        return Finding(what, "missing", f"does not run: {str(error).splitlines()[0] if str(error) else error!r}")
    return Finding(what, "ok", text)


def _bf16_matmul() -> None:
    import torch

    x = torch.ones(8, 8, dtype=torch.bfloat16)
    if float((x @ x).sum()) != 512:
        raise RuntimeError("a bf16 product came out wrong")


def _varlen() -> None:
    from torch.nn.attention import varlen

    if not hasattr(varlen, "varlen_attn"):
        raise RuntimeError("torch.nn.attention.varlen has no varlen_attn")
