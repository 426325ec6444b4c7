"""Shards: what finished stages leave in the output folder, so that an interrupted calibration goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lemo.calibrate.collect import PartStatistics
from lemo.calibrate.windows import Window
from lemo.config import CalibrationConfig
from lemo.core.plan import LayerPlan, Plan
from lemo.errors import ConfigError, PlanError
from lemo.runtime.model import fingerprint

STATE = "calibration.json"


def fingerprint_run(model: nn.Module, windows: Sequence[Window], config: CalibrationConfig, plan: Plan) -> str:
    """Hash of everything that decides the result: model, adapter, tokens, masks, options, the skeleton's choices."""
    digest = hashlib.sha256()
    # Allocation is a stage of its own: what is fitted does not depend on it.
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("memory_limit_gib", "allocate")}
    ratios = [(x.forward_ratio, x.backward_ratio, x.mlp_ratio) for x in plan.layers]
    choices = (plan.block_size, plan.policy, plan.kv, plan.gradient, plan.mlp, plan.seed, plan.ratio_of)
    choices += () if plan.context_window is None else (plan.context_window,)
    digest.update(json.dumps([options, ratios, choices, fingerprint(model)], sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        if "lora_" in name or ".modules_to_save." in name:  # the model's own fingerprint leaves adapters out
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    for window in windows:
        digest.update(f"{window.domain}|{window.held_out}".encode())
        for tensor in (window.input_ids_BT, window.supervised_BT, window.attention_mask_BT, window.position_ids_BT):
            digest.update(b"-" if tensor is None else tensor.detach().cpu().to(torch.int64).numpy().tobytes())
    return digest.hexdigest()[:32]


class Shards:
    """The output folder of one calibration; without a folder nothing is kept and nothing is found.

    Args:
        folder: where shards go, created; None for nowhere.
        run: hash of the calibration.

    Raises:
        ConfigError: the folder holds another calibration.
    """

    def __init__(self, folder: Path | None, run: str) -> None:
        """Opens or starts the folder."""
        self.folder = folder
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        state = folder / STATE
        if state.exists():
            found = json.loads(state.read_text(encoding="utf-8")).get("run")
            if found != run:
                raise ConfigError(
                    f"{folder} holds a calibration with other options, data or model; choose another output folder "
                    "or remove it"
                )
        else:
            write_atomically(state, json.dumps({"run": run}) + "\n")

    def scratch(self) -> Path | None:
        """Folder for residual streams that exceed the memory limit."""
        return None if self.folder is None else self.folder / "streams"

    def save_statistics(self, layer: int, parts: Mapping[str, PartStatistics]) -> None:
        """Writes the dense statistics of one layer."""
        if self.folder is not None:
            tensors = {f"{name}/{k}": v for name, part in parts.items() for k, v in part.state_dict().items()}
            save_tensors(self.folder / "collect" / f"layer-{layer:03d}.safetensors", tensors)

    def load_statistics(self, layer: int, device: torch.device) -> dict[str, PartStatistics] | None:
        """Reads them back; None when they are not there."""
        path = None if self.folder is None else self.folder / "collect" / f"layer-{layer:03d}.safetensors"
        if path is None or not path.exists():
            return None
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in load_tensors(path).items():
            name, rest = key.split("/", 1)
            parts.setdefault(name, {})[rest] = value
        return {name: PartStatistics.from_state_dict(state, device) for name, state in parts.items()}

    def save_layer(self, stage: str, layer: int, fitted: LayerPlan, record: Mapping[str, Any]) -> None:
        """Writes one fitted layer and what the report says of it. Plan's own format, one folder a layer."""
        if self.folder is not None:
            final = self.folder / stage / f"layer-{layer:03d}"
            partial = final.with_name(final.name + ".partial")
            Plan((fitted,), provenance={"record": dict(record)}).save(partial)
            os.replace(partial, final)

    def load_layer(self, stage: str, layer: int) -> tuple[LayerPlan, dict[str, Any]] | None:
        """Reads them back; None when the layer is not finished."""
        path = None if self.folder is None else self.folder / stage / f"layer-{layer:03d}"
        if path is None or not path.exists():
            return None
        read = Plan.load(path)
        return read.layers[0], dict(read.provenance["record"])

    def save_json(self, name: str, value: Any) -> None:
        """Writes a finished stage's result."""
        if self.folder is not None:
            write_atomically(self.folder / f"{name}.json", json.dumps(value) + "\n")

    def load_json(self, name: str) -> Any | None:
        """Reads it back; None when the stage is not finished."""
        path = None if self.folder is None else self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else None


def write_atomically(path: Path, text: str) -> None:
    """Writes a whole file or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as one safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial)
    os.replace(partial, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads tensors.

    Raises:
        PlanError: the file cannot be read.
    """
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:
        raise PlanError(f"{path} cannot be read: {error}") from error
