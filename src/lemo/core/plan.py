"""Plan: the frozen, saved result of calibration. It says what every layer of one model does with its rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lemo.core.bypass import Bypass
from lemo.core.policy import POLICIES, RATIOS_OF, check_ratios
from lemo.core.predictor import PatternPredictor
from lemo.core.score import SAME_IN_ALL_LAYERS, TRAINING_SCORERS
from lemo.errors import ConfigError, PlanError

FORMAT = 1
LOCAL_FORWARDS = ("near", "all")
_JSON, _TENSORS = "plan.json", "plan.safetensors"
_CHOICES = {
    "policy": POLICIES,
    "scorer": TRAINING_SCORERS,
    "kv": ("kept", "all"),
    "gradient": ("rows", "pairs", "keys"),
    "mlp": ("shared", "own"),
    "ratio_of": RATIOS_OF,
    "local_forward": LOCAL_FORWARDS,
}
# Choices that plans of earlier versions do not state.
_LATER = {"ratio_of": "all", "context_window": None, "far_share": 1.0, "local_forward": "near"}
_FIELDS = ("block_size", *_CHOICES, "seed", "fingerprint", "context_window", "far_share")


@dataclass(frozen=True)
class LayerPlan:
    """What one layer does. Ratios (1, 1) are a dense layer.

    Attributes:
        forward_ratio: share of blocks that run the layer.
        backward_ratio: share that also keeps activations and passes gradient.
        threshold: least score of a kept block, for the `threshold` policy.
        predictor: ranks blocks.
        bypass: low-rank update of rows that skip the layer.
        mlp_ratio: share of blocks that run the MLP, when it has rows of its own.
        mlp_predictor: ranks blocks for the MLP.
        mlp_bypass: low-rank update of rows that skip only the MLP, on the MLP's input.
    """

    forward_ratio: float = 1.0
    backward_ratio: float = 1.0
    threshold: float | None = None
    predictor: PatternPredictor | None = None
    bypass: Bypass | None = None
    mlp_ratio: float | None = None
    mlp_predictor: PatternPredictor | None = None
    mlp_bypass: Bypass | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for ratios that make no sense."""
        check_ratios(self.forward_ratio, self.backward_ratio)
        if self.mlp_ratio is not None:
            check_ratios(self.forward_ratio, self.mlp_ratio)

    @property
    def is_dense(self) -> bool:
        """Whether every row runs forward and backward."""
        return self.forward_ratio == 1 and self.backward_ratio == 1

    @property
    def is_exact(self) -> bool:
        """Whether rows run the layer that pass no gradient through it."""
        return self.backward_ratio < self.forward_ratio


@dataclass(frozen=True)
class Plan:
    """What every layer of one model does with its rows.

    Attributes:
        layers: one entry per decoder layer.
        block_size: rows per block.
        policy: `topk` or `threshold`; the other's numbers in `layers` are informative.
        scorer: `predictor`, `random`, `recent` or `words`.
        kv: whether rows that skip a layer still offer keys and values (`all`) or not (`kept`).
        gradient: gradient of exact forward, `rows`, `pairs` or `keys`.
        mlp: whether the MLP shares the layer's rows or has its `own`.
        seed: of the `random` scorer.
        fingerprint: of the base model that the plan was made for; None matches any model of as many layers.
        provenance: how the plan came about: configuration, data, report.
        ratio_of: what ratios are shares of: `all` blocks, or those of the `context`; supervised ones then come on top.
        context_window: under exact forward, rows that pass no gradient attend to the keys of their chunk of so many
            rows of the document, of the chunk before and of the document's first block; None for all keys.
        far_share: under exact forward, share of the stripes of far keys that attention's backward reads, drawn anew
            in every step; below 1 the gradients of a layer's queries, keys and values are estimates without bias.
        local_forward: with a context window, the keys that local loss rows attend to in forward: those `near` them,
            which are the ones that their gradient goes through, or `all`. With `all` the others are constants in
            backward: they count in softmax, but neither their scores nor their values pass gradient.
    """

    layers: tuple[LayerPlan, ...]
    block_size: int = 64
    policy: str = "topk"
    scorer: str = "predictor"
    kv: str = "all"
    gradient: str = "rows"
    mlp: str = "shared"
    seed: int = 0
    fingerprint: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    ratio_of: str = "all"
    context_window: int | None = None
    far_share: float = 1.0
    local_forward: str = "near"

    def __post_init__(self) -> None:
        """Raises ConfigError for an unknown choice, or sizes that are no positive integers or do not fit each other."""
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 1:
            raise ConfigError(f"block_size must be a positive integer, got {self.block_size!r}")
        check_context_window(self.context_window, self.block_size)
        check_far_share(self.far_share, self.gradient)
        if self.local_forward != "near" and self.context_window is None:
            raise ConfigError(
                f"local_forward {self.local_forward!r} needs a context_window: it says which keys pass gradient"
            )
        if self.mlp == "own" and any(x.is_exact for x in self.layers):
            raise ConfigError("mlp 'own' needs equal forward and backward ratios: exact forward runs every MLP row")

    @classmethod
    def uniform(
        cls,
        model: Any,
        *,
        forward_ratio: float = 1.0,
        backward_ratio: float = 0.5,
        dense_layers: Sequence[int] = (),
        **choices: Any,
    ) -> Plan:
        """The same ratios in every layer, blocks drawn at random: safe without calibration at forward_ratio 1.

        Defaults here and in Plan stay as they are, so that calls keep their meaning, and saved plans theirs. What
        training does by default is said in `config.SparsityConfig` alone; the README writes it out as a call.

        Args:
            model: a Transformers model, for its number of layers, or that number.
            forward_ratio: share of rows that run a layer.
            backward_ratio: share of rows that pass gradient.
            dense_layers: layers that run densely; negative numbers count from the end.
            **choices: further fields of Plan; `scorer` is `random` unless given.

        Raises:
            ConfigError: ratios outside 0 < backward <= forward <= 1, a dense layer or a field that does not exist, or
                a model that does not say how many decoder layers it has.
        """
        count = _count_layers(model)
        for index in dense_layers:
            if not -count <= index < count:
                raise ConfigError(f"dense_layers names layer {index}, but the model has {count} layers")
        dense = {index % count for index in dense_layers}
        sparse = LayerPlan(forward_ratio, backward_ratio)
        layers = tuple(LayerPlan() if i in dense else sparse for i in range(count))
        fields: dict[str, Any] = {"scorer": "random"} | choices
        known = [each.name for each in dataclasses.fields(cls) if each.name != "layers"]
        if unknown := [name for name in fields if name not in known]:
            raise ConfigError(f"Plan has no field {unknown[0]!r}; known are {', '.join(known)}")
        return cls(layers, **fields)

    def replace_layer(self, index: int, **changes: Any) -> Plan:
        """A plan in which one layer's fields differ."""
        layers = list(self.layers)
        layers[index] = replace(layers[index], **changes)
        return replace(self, layers=tuple(layers))

    @property
    def leaves_out(self) -> bool:
        """Whether a row that skips one layer skips all, and nothing reads it.

        The rows that are left are a text with gaps, at their places in the whole, as in positional skip-wise training
        (PoSE, arXiv 2309.10400). So it is where one ratio holds in every layer, what ranks blocks does not depend on
        the layer, and skipped rows offer no keys.
        """
        ratios = {x.forward_ratio for x in self.layers}
        ranked_once = self.scorer in SAME_IN_ALL_LAYERS and self.policy == "topk" and self.mlp == "shared"
        return ranked_once and self.kv == "kept" and len(ratios) == 1 and min(ratios) < 1

    @property
    def needs_bypass(self) -> bool:
        """Whether some layer skips rows that others read without a bypass, which ruins models."""
        return not self.leaves_out and any(x.forward_ratio < 1 and x.bypass is None for x in self.layers)

    def save(self, folder: str | Path) -> None:
        """Writes plan.json and plan.safetensors into `folder`, which is created.

        Raises:
            PlanError: it cannot be written there.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save

        folder = Path(folder)
        tensors: dict[str, Tensor] = {}
        layers = [_pack_layer(layer, f"layers.{i}", tensors) for i, layer in enumerate(self.layers)]
        fields = {name: getattr(self, name) for name in _FIELDS}
        text = json.dumps(
            {"format": FORMAT, **fields, "layers": layers, "provenance": dict(self.provenance)}, indent=1, default=str
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _TENSORS).write_bytes(save(tensors))  # save_file would shut out everybody but the owner
            (folder / _JSON).write_text(text + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
            raise PlanError(f"{folder}: the plan cannot be written there ({reason})") from error

    @classmethod
    def load(cls, folder: str | Path) -> Plan:
        """Reads what `save` wrote.

        Raises:
            PlanError: files that are missing, cannot be read, or come from a newer format.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            read = json.loads((folder / _JSON).read_text(encoding="utf-8"))
            tensors = load_file(folder / _TENSORS)
        except FileNotFoundError as error:
            raise PlanError(f"{folder} is not a plan: {Path(error.filename or folder).name} is missing") from error
        except Exception as error:
            raise PlanError(f"{folder} cannot be read as a plan: {error}") from error
        if read.get("format") != FORMAT:
            raise PlanError(f"{folder} has plan format {read.get('format')}; this lemo reads format {FORMAT}")
        try:
            layers = tuple(_unpack_layer(x, f"layers.{i}", tensors) for i, x in enumerate(read["layers"]))
            read = _LATER | read
            fields = {name: read[name] for name in _FIELDS}
        except KeyError as error:
            raise PlanError(f"{folder} cannot be read as a plan: {error} is missing") from error
        return cls(layers, **fields, provenance=read["provenance"])


def _count_layers(model: Any) -> int:
    """Decoder layers of a Transformers model; the number itself where that is given."""
    count = model
    if not isinstance(model, int):
        settings = getattr(model, "config", None)
        text = settings.get_text_config() if hasattr(settings, "get_text_config") else None
        count = getattr(text, "num_hidden_layers", None)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        given = repr(model) if isinstance(model, int) else type(model).__name__
        raise ConfigError(f"a plan needs a Transformers model with decoder layers, or their number, got {given}")
    return count


def check_context_window(window: int | None, block_size: int) -> None:
    """Raises ConfigError unless the window is None or a positive multiple of the block size."""
    if window is not None and (type(window) is not int or window < 1 or window % block_size):
        raise ConfigError(f"context_window must be a positive multiple of block_size ({block_size}), got {window!r}")


def check_far_share(share: float, gradient: str) -> None:
    """Raises ConfigError unless the share lies in (0, 1], and is 1 where no far keys are read."""
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ConfigError(f"far_share must lie in (0, 1], got {share!r}")
    if share < 1 and gradient == "pairs":
        raise ConfigError("far_share is for the gradients `rows` and `keys`: `pairs` reads kept keys only")


_PLAIN = ("forward_ratio", "backward_ratio", "threshold", "mlp_ratio")


def _pack_layer(layer: LayerPlan, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """JSON of one layer; its tensors go into `tensors`."""
    packed: dict[str, Any] = {name: getattr(layer, name) for name in _PLAIN}
    for name in ("predictor", "mlp_predictor"):
        net = getattr(layer, name)
        packed[name] = None if net is None else net.config()
        for key, value in ({} if net is None else net.state_dict()).items():
            tensors[f"{prefix}.{name}.{key}"] = value.detach().cpu().clone().contiguous()
    for name in ("bypass", "mlp_bypass"):
        bypass = getattr(layer, name)
        packed[name] = bypass is not None
        if bypass is not None:
            tensors[f"{prefix}.{name}.down"] = bypass.down_MR.detach().cpu().clone().contiguous()
            tensors[f"{prefix}.{name}.up"] = bypass.up_RM.detach().cpu().clone().contiguous()
    return packed


def _unpack_layer(packed: dict[str, Any], prefix: str, tensors: dict[str, Tensor]) -> LayerPlan:
    """Inverse of `_pack_layer`."""
    fields: dict[str, Any] = {name: packed[name] for name in _PLAIN}
    for name in ("predictor", "mlp_predictor"):
        if packed[name] is not None:
            net = PatternPredictor(**packed[name])
            start = f"{prefix}.{name}."
            net.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
            fields[name] = net
    for name in ("bypass", "mlp_bypass"):
        if packed[name]:
            fields[name] = Bypass(tensors[f"{prefix}.{name}.down"], tensors[f"{prefix}.{name}.up"])
    return LayerPlan(**fields)


def fingerprint_tensors(described: Mapping[str, Any], tensors: Sequence[Tensor]) -> str:
    """Hash of a base model from its sizes and samples of its weights.

    Weights are sampled at 4,096 even places and rounded to bfloat16, so that the dtype a model is loaded in does not
    matter; adapters are not looked at.
    """
    import hashlib

    digest = hashlib.sha256(json.dumps(dict(described), sort_keys=True).encode())
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)].to(torch.bfloat16).cpu()
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]
