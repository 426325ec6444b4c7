"""What the fused engine reads off a decoder layer: its maps, norms and numbers, as they are at this moment."""

from __future__ import annotations

from dataclasses import dataclass
from operator import is_
from typing import Any

from torch import Tensor, nn

from lemo.families.family import LayerNames
from lemo.runtime.fused.hooks import GLOBAL, called_modules, forward_slot, hook_tables, is_shown, why_layer_hooked
from lemo.runtime.fused.linear import LinearMap, weight_like
from lemo.runtime.fused.maps import MapGroup
from lemo.runtime.fused.modules import TensorList, active_adapter, lora_dropout, why_not_linear
from lemo.runtime.fused.watch import Slot, Watch, autocast_of
from lemo.runtime.model import in_force, window_of

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
        tensors: every tensor of the above that needs a gradient, in the order of their places.
        held: tensors that backward reads again.
        shown: hooks of the layer see the stream before and behind it, and may keep gradients of both.
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
    held: tuple[Tensor, ...]
    shown: bool

    def versions(self) -> list[int]:
        """How often each of the tensors that backward reads again was written in place."""
        return [t._version for t in self.held]

    def check_versions(self, versions: list[int]) -> None:
        """Raises RuntimeError, as autograd does for what it saves, when they are not those of the forward."""
        for tensor, before in zip(self.held, versions, strict=True):
            if tensor._version != before:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"a weight of shape {tuple(tensor.shape)} of a layer in lemo's fused engine is at version "
                    f"{tensor._version}, its forward saw version {before}"
                )

    @property
    def drops(self) -> bool:
        """Whether an adapter drops elements of its input."""
        return any([item.dropout > 0 for group in self.groups for item in group.maps])

    @property
    def groups(self) -> tuple[MapGroup, ...]:
        """All linear maps."""
        return self.inputs, self.output, self.gates, self.down

    def with_groups(self, groups: tuple[MapGroup, ...]) -> LayerParts:
        """The same layer with other `groups`."""
        made = LayerParts.__new__(LayerParts)
        made.__dict__.update(self.__dict__)
        made.__dict__.update(zip(("inputs", "output", "gates", "down"), groups, strict=True))
        return made


class LayerReader:
    """Reads one layer's parts. What was found is kept until something else lies in its place.

    Adapters come and go, and sharding swaps parameters: every forward looks whether the modules are those that were
    found (`is_stale`), and every call of the layer whether the tensors are.
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
        asked = {name: layer.get_submodule(name) for name in (*linear, *norms)}
        self._modules = {name: in_force(module) for name, module in asked.items()}
        self._norms = [(name, self._modules[name]) for name in norms]
        self._output = _base(self._modules[names.output])
        self._dropouts = _dropouts(layer)
        called = called_modules(layer)
        modules = [module for _, module in called]
        self._watch = Watch(
            [slot for name in asked for slot in _path(layer, name)] + [forward_slot(m) for m in modules],
            [m for m in asked.values() if hasattr(m, "active_adapters")],
            [table for m in (layer, *modules) for table in hook_tables(m)] + [*GLOBAL.values()],
        )
        self._factors = [slot for name in linear for slot in _factor_slots(self._modules[name])]
        self._reason = self._why_never(linear) or why_layer_hooked(layer, called)
        self._parts: LayerParts | None = None
        self._tensors: list[Slot] = []
        self._found: list[Any] = []
        self._leaves: list[Tensor] = []
        self._trained: list[bool] = []

    def is_stale(self) -> bool:
        """Whether modules were put in the place of those that were looked up, or other adapters are in force."""
        return not self._watch.holds()

    def watch(self, layer: nn.Module) -> Watch:
        """All that `is_stale` and `why_not` look at: while it holds, so do their answers."""
        moment = [(vars(layer), "training"), *((vars(owner), attribute) for _, owner, attribute in self._dropouts)]
        weights = [slot for m in (self._output, *(norm for _, norm in self._norms)) for slot in _kept(m, "weight")]
        return Watch.of_all([self._watch, Watch(moment, tensors=weights)])

    def _why_never(self, linear: tuple[str, ...]) -> str | None:
        """Why the layer cannot run in the fused engine with these modules."""
        for name in linear:
            reason = why_not_linear(self._modules[name])
            if reason is not None:
                return f"{name}: {reason}"
        found = ((name, why_no_norm(m)) for name, m in self._norms)
        return next((f"{name}: {reason}" for name, reason in found if reason is not None), None)

    def why_not(self, layer: nn.Module) -> str | None:
        """Why the layer must run in the generic executor now; None when the fused engine can run it."""
        if self._reason is not None:
            return self._reason
        weight = weight_like(self._output)
        for name, norm in self._norms:
            if norm.weight.dtype != weight.dtype:
                return f"{name}: {norm.weight.dtype} beside {weight.dtype} maps"
        if layer.training:
            for name, owner, attribute in self._dropouts:
                if getattr(owner, attribute) > 0:
                    return f"dropout is active ({name})"
        if autocast_of(weight.device.type) not in (None, weight.dtype):
            return f"autocast over {weight.dtype} weights"
        return None

    def is_whole(self) -> bool:
        """Whether the adapters' factors are there, not shards of them."""
        return all([type(t := keeper[key]) is nn.Parameter and t.ndim == 2 for keeper, key in self._factors])

    def read(self, layer: nn.Module) -> LayerParts:
        """The layer's parts as they are now; the same object while they are the same tensors."""
        found = [keeper.get(key) for keeper, key in self._tensors]
        if (
            self._parts is None
            or not all(map(is_, found, self._found))
            or [t.requires_grad for t in self._leaves] != self._trained
        ):
            self._tensors = [slot for module in self._modules.values() for slot in _tensor_slots(module)]
            self._found = [keeper.get(key) for keeper, key in self._tensors]
            self._leaves = [x for x in self._found if isinstance(x, Tensor)]
            self._trained = [t.requires_grad for t in self._leaves]
            self._parts = self._read(layer)
        return self._parts

    def _read(self, layer: nn.Module) -> LayerParts:
        names, modules, attention, config = self._names, self._modules, self._attention, self._config
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
            window=window_of(attention),
            rope=bool(getattr(attention, "use_rope", True)),
            tensors=tuple(found.tensors),
            held=tuple(found.held),
            shown=is_shown(layer),
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


def _path(layer: nn.Module, name: str) -> list[Slot]:
    """Where the modules lie that lead from the layer to one of its maps or norms, and to what PEFT put inside it."""
    slots: list[Slot] = []
    module = layer
    for step in name.split("."):
        slots.append((module._modules, step))
        module = module.get_submodule(step)
    slots.append((module._modules, "base_layer"))
    slots.append((module._modules, "lora_A"))
    for keeper in ("lora_A", "lora_B", "lora_dropout", "modules_to_save"):
        inside = module._modules.get(keeper)
        if inside is not None:
            slots += [(inside._modules, adapter) for adapter in module.active_adapters]  # type: ignore[union-attr]
    return slots


def _factor_slots(module: nn.Module) -> list[Slot]:
    """Where the adapter in force on a linear map keeps its two factors."""
    adapter = active_adapter(module)
    if adapter is None:
        return []
    return [(factor[adapter]._parameters, "weight") for factor in (module.lora_A, module.lora_B)]  # type: ignore


def _tensor_slots(module: nn.Module) -> list[Slot]:
    """Where a map or norm keeps its tensors and its adapter's, and the adapter's scale and dropout."""
    slots = _factor_slots(module)
    if slots:
        slots.append((module.scaling, str(active_adapter(module))))  # type: ignore[arg-type]
        dropout = lora_dropout(module)
        slots += [] if dropout is None else [(vars(dropout), "p"), (vars(dropout), "training")]
    base = _base(module)
    return slots + [slot for name in ("weight", "bias") for slot in _kept(base, name)]


def _kept(module: nn.Module, name: str) -> list[Slot]:
    """Where a module keeps a tensor of that name, be it a parameter, a buffer or a plain attribute."""
    return [(keeper, name) for keeper in (module._parameters, module._buffers, vars(module)) if name in keeper]


def _dropouts(layer: nn.Module) -> list[tuple[str, Any, str]]:
    """Where a layer keeps dropout probabilities, as numbers or modules, adapters apart: name, owner, attribute."""
    found: list[tuple[str, Any, str]] = []
    for name, module in layer.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            found.append((name, module, "p"))
        found += [(f"{name}.{k}", module, k) for k, v in vars(module).items() if "dropout" in k and type(v) is float]
    return found


def why_no_norm(module: nn.Module) -> str | None:
    """Why a norm is not x/rms(x)·weight or LayerNorm; None when it may be. `module` is the one in force."""
    if hasattr(module, "base_layer"):
        return f"not a plain norm but {type(module).__name__} around one"
    return "not a plain norm" if getattr(module, "weight", None) is None else None


def read_norm(module: nn.Module, kind: str) -> Norm:
    """A norm outside a layer, as it is now."""
    return _norm(TensorList(), in_force(module), kind)


def _norm(found: TensorList, module: nn.Module, kind: str) -> Norm:
    bias = getattr(module, "bias", None)
    eps = getattr(module, "variance_epsilon", None)
    eps = float(module.eps if eps is None else eps)  # type: ignore[arg-type]
    places = found.place(module.weight), found.place(bias)  # type: ignore[arg-type]
    found.hold(module.weight, bias)  # type: ignore[arg-type]
    return Norm(module.weight, bias, eps, kind, places)  # type: ignore[arg-type]


def _single(item: LinearMap) -> MapGroup:
    return MapGroup((item,), ((0, slice(0, item.outputs)),))


def _input_parts(maps: tuple[LinearMap, ...], query_width: int) -> tuple[tuple[int, slice], ...]:
    if len(maps) > 1:
        return tuple((i, slice(0, m.outputs)) for i, m in enumerate(maps))
    total = maps[0].outputs
    width = (total - query_width) // 2
    return (0, slice(0, query_width)), (0, slice(query_width, query_width + width)), (0, slice(total - width, total))


def _gate_parts(maps: tuple[LinearMap, ...], gated: bool) -> tuple[tuple[int, slice], ...]:
    if len(maps) > 1 or not gated:
        return tuple((i, slice(0, m.outputs)) for i, m in enumerate(maps))
    half = maps[0].outputs // 2
    return (0, slice(0, half)), (0, slice(half, 2 * half))


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_act", None) or getattr(config, "activation_function", None))
