"""What the fused engine reads off a decoder layer: its maps, norms and numbers, as they are at this moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lemo.families.family import LayerNames
from lemo.runtime.fused.maps import LinearMap, MapGroup, TensorList, why_not_linear
from lemo.runtime.model import in_force

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


@dataclass(frozen=True)
class Norm:
    """A norm's tensors and places, epsilon and kind (`rms` or `layer`)."""

    weight_M: Tensor
    bias_M: Tensor | None
    eps: float
    kind: str
    places: tuple[int | None, int | None]


@dataclass(frozen=True)
class LayerParts:
    """One decoder layer: x + m·output(attention(inputs(norm(x)))), then x + m·down(act(gates(norm(x)))).

    Attributes:
        norms: before attention, before the MLP.
        inputs: parts 0, 1, 2 are queries, keys and values.
        output: linear map of the attention's output.
        head_norms: norms of queries and keys over a head; empty for none.
        gates: part 0 is the gate (or the only map), part 1 up.
        down: linear map out of the MLP.
        act: name of the activation.
        gated: whether the MLP has a gate.
        multiplier: m.
        head_dim: D.
        scaling: factor of the attention scores.
        window: sliding window in rows, or None.
        rope: whether queries and keys are rotated.
        tensors: every tensor of the above, in the order of their places.
    """

    norms: tuple[Norm, Norm]
    inputs: MapGroup
    output: MapGroup
    head_norms: tuple[Norm, ...]
    gates: MapGroup
    down: MapGroup
    act: str
    gated: bool
    multiplier: float
    head_dim: int
    scaling: float
    window: int | None
    rope: bool
    tensors: tuple[Tensor, ...]


class LayerReader:
    """Reads one layer's parts, with what does not change between batches looked up once.

    Weights, adapters and dropout are read anew each time: adapters come and go, and sharding swaps parameters.
    """

    def __init__(self, layer: nn.Module, names: LayerNames, attention: nn.Module, config: Any) -> None:
        """Looks up modules.

        Args:
            layer: the decoder layer.
            names: where its parts are.
            attention: its attention module.
            config: the model's text configuration.
        """
        self._names, self._attention, self._config = names, attention, config
        linear = (*names.inputs, names.output, *names.gates, names.down)
        norms = (*names.norms, *names.head_norms)
        self._modules = {name: layer.get_submodule(name) for name in (*linear, *norms)}
        self._linear, self._norm_names = linear, norms
        self._dropouts = _dropouts(layer)

    def is_stale(self, layer: nn.Module) -> bool:
        """Whether modules were put in the place of those that were looked up."""
        return any(layer.get_submodule(name) is not module for name, module in self._modules.items())

    def why_not(self, layer: nn.Module) -> str | None:
        """Why the layer must run in the generic executor now; None when the fused engine can run it."""
        for name in self._linear:
            reason = why_not_linear(in_force(self._modules[name]), layer.training)
            if reason is not None:
                return f"{name}: {reason}"
        weight = _base(in_force(self._modules[self._names.output])).weight
        for name in self._norm_names:
            norm = in_force(self._modules[name])
            if getattr(norm, "weight", None) is None:
                return f"{name}: not a plain norm"
            if norm.weight.dtype != weight.dtype:
                return f"{name}: {norm.weight.dtype} beside {weight.dtype} maps"
        if layer.training:
            for name, owner, attribute in self._dropouts:
                if getattr(owner, attribute) > 0:
                    return f"dropout is active ({name})"
        device = weight.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != weight.dtype:
            return f"autocast over {weight.dtype} weights"
        return None

    def read(self, layer: nn.Module) -> LayerParts:
        """The layer's parts as they are now."""
        names, attention, config = self._names, self._attention, self._config
        modules = {name: in_force(module) for name, module in self._modules.items()}
        found = TensorList()
        norms = tuple(_norm(found, modules[name], names.norm) for name in names.norms)
        head_norms = tuple(_norm(found, modules[name], "rms") for name in names.head_norms)
        head_dim = int(attention.head_dim)  # type: ignore[arg-type]
        inputs = tuple(found.linear(modules[name]) for name in names.inputs)
        gates = tuple(found.linear(modules[name]) for name in names.gates)
        return LayerParts(
            norms=norms,  # type: ignore[arg-type]
            inputs=MapGroup(inputs, _input_parts(inputs, config.num_attention_heads * head_dim)),
            output=_single(found.linear(modules[names.output])),
            head_norms=head_norms,
            gates=MapGroup(gates, _gate_parts(gates, names.gated)),
            down=_single(found.linear(modules[names.down])),
            act=ACTIVATIONS[_activation(config)],
            gated=names.gated,
            multiplier=1.0 if names.multiplier is None else float(getattr(layer, names.multiplier)),
            head_dim=head_dim,
            scaling=float(attention.scaling),  # type: ignore[arg-type]
            window=_window(attention, config),
            rope=bool(getattr(attention, "use_rope", True)),
            tensors=tuple(found.tensors),
        )


def why_no_reader(names: LayerNames | None, attention: nn.Module | None, config: Any) -> str | None:
    """Why layers of this family must run in the generic executor; None when a `LayerReader` can look at them."""
    if names is None:
        return f"no family file names the parts of a {config.model_type} layer"
    if attention is None or not hasattr(attention, "scaling") or not hasattr(attention, "head_dim"):
        return "the attention module states no scaling or head dimension"
    if _activation(config) not in ACTIVATIONS:
        return f"activation {_activation(config)!r} has no kernel"
    if getattr(config, "do_layer_norm_before", True) is False:
        return "norms come after attention and MLP"
    return None


def _base(module: nn.Module) -> Any:
    return module.base_layer if hasattr(module, "base_layer") else module


def _dropouts(layer: nn.Module) -> list[tuple[str, Any, str]]:
    """Where a layer keeps dropout probabilities, as numbers or modules, adapters apart: name, owner, attribute."""
    found: list[tuple[str, Any, str]] = []
    for name, module in layer.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            found.append((name, module, "p"))
        found += [(f"{name}.{k}", module, k) for k, v in vars(module).items() if "dropout" in k and type(v) is float]
    return found


def read_norm(module: nn.Module, kind: str) -> Norm:
    """A norm outside a layer, as it is now."""
    return _norm(TensorList(), in_force(module), kind)


def _norm(found: TensorList, module: nn.Module, kind: str) -> Norm:
    bias = getattr(module, "bias", None)
    eps = getattr(module, "variance_epsilon", None)
    eps = float(module.eps if eps is None else eps)  # type: ignore[arg-type]
    places = found.place(module.weight), found.place(bias)  # type: ignore[arg-type]
    return Norm(module.weight, bias, eps, kind, places)  # type: ignore[arg-type]


def _single(item: LinearMap) -> MapGroup:
    return MapGroup((item,), ((0, slice(0, item.weight_OI.shape[0])),))


def _input_parts(maps: tuple[LinearMap, ...], query_width: int) -> tuple[tuple[int, slice], ...]:
    if len(maps) > 1:
        return tuple((i, slice(0, m.weight_OI.shape[0])) for i, m in enumerate(maps))
    total = maps[0].weight_OI.shape[0]
    width = (total - query_width) // 2
    return (0, slice(0, query_width)), (0, slice(query_width, query_width + width)), (0, slice(total - width, total))


def _gate_parts(maps: tuple[LinearMap, ...], gated: bool) -> tuple[tuple[int, slice], ...]:
    if len(maps) > 1 or not gated:
        return tuple((i, slice(0, m.weight_OI.shape[0])) for i, m in enumerate(maps))
    half = maps[0].weight_OI.shape[0] // 2
    return (0, slice(0, half)), (0, slice(half, 2 * half))


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_act", None) or getattr(config, "activation_function", None))


def _window(attention: nn.Module, config: Any) -> int | None:
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    return None if window is None else int(window)  # type: ignore[arg-type]
