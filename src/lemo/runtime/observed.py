"""Who else may hold the residual stream: hooks on layers, inside them and on the embedding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any

from torch import nn

from lemo.runtime.fused.hooks import FORWARD, why_all_hooked, why_hooked, why_replaced
from lemo.runtime.model import in_force

# Libraries whose hooks hand tensors on and keep none; torch's tracker of modules notes their names.
_PASSING_ON = ("torch.distributed.", "torch.utils.module_tracker", "transformers.", "accelerate.", "deepspeed.")


class Insides:
    """The modules inside a model's layers, looked up again only where one was put in another's place."""

    def __init__(self) -> None:
        """Nothing is known."""
        self._layers: list[nn.Module] = []
        self._inside: list[list[nn.Module]] = []
        self._children: list[dict] = []
        self._found: list[Any] = []
        self._tables: list[dict] = []

    def observed(self, layers: Sequence[nn.Module]) -> frozenset[int]:
        """Layers inside which a module has a forward hook that may keep what it is given."""
        found = self._look()
        if len(layers) != len(self._layers) or not all(map(is_, layers, self._layers)) or not _same(found, self._found):
            self._layers = list(layers)
            self._inside = [[m for m in layer.modules() if m is not layer] for layer in layers]
            modules = [m for inside in self._inside for m in inside]
            self._children = [m._modules for m in (*layers, *modules)]
            self._tables = [getattr(m, table) for m in modules for table in FORWARD]
            self._found = self._look()
        if not any(self._tables):
            return frozenset()
        return frozenset(i for i, inside in enumerate(self._inside) if any(map(_observed, inside)))

    def _look(self) -> list[Any]:
        return [child for children in self._children for child in children.values()]


def held_layers(
    model: Any, layers: Sequence[nn.Module], arguments: Mapping[str, Any], inside: Iterable[int]
) -> frozenset[int]:
    """Layers that must not write into the stream they get, because somebody else may still read it.

    The first one's is the caller's own where `inputs_embeds` came; a forward hook on the embedding or on the layer
    before may have kept it, and one on the layer itself or inside it may keep it.

    Args:
        model: the causal language model.
        layers: its decoder layers.
        arguments: keywords of the call.
        inside: layers with an observed module inside.
    """
    embedding = model.get_input_embeddings()
    before = arguments.get("inputs_embeds") is not None
    before = before or any(_observed(m) or why_replaced(m) is not None for m in (embedding, in_force(embedding)))
    held = set(inside)
    for index, layer in enumerate(layers):
        own = _observed(layer)
        if before or own:
            held.add(index)
        before = own
    return frozenset(held)


def said_of_hooks(layers: Iterable[nn.Module], fused: frozenset[int]) -> Iterator[str]:
    """What to tell of forward hooks on layers that the generic engine runs on rows."""
    told = (
        "{} and {} in the generic engine: the hook is given the rows that run there, not the whole stream, and under "
        "exact forward a change that it makes has no effect on other layers"
    )
    everywhere = why_all_hooked(_PASSING_ON, FORWARD)
    if everywhere is not None:
        yield told.format(f"every module has {everywhere}", "layers run")
        return
    hooked: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        hook = None if index in fused else why_hooked(layer, _PASSING_ON, FORWARD)
        if hook is not None:
            hooked.setdefault(hook, []).append(index)
    for hook, indices in hooked.items():
        alone = len(indices) == 1
        which = f"layer {indices[0]} has" if alone else f"layers {', '.join(map(str, indices))} have"
        yield told.format(f"{which} {hook}", "runs" if alone else "run")


def _observed(module: nn.Module) -> bool:
    return why_hooked(module, _PASSING_ON, FORWARD) is not None


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(is_, one, other))
