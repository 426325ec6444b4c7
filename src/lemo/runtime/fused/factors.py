"""Adapter factors in the compute dtype, made once a forward with a handful of launches for all layers but the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lemo.ops.dropout_rows.reference import Key
from lemo.runtime.fused.maps import MapGroup
from lemo.runtime.fused.parts import LayerParts

_MASK = (1 << 64) - 1


class AdapterFactors:
    """The factors of one forward. Its backward uses the same ones, whatever happens to the parameters meanwhile.

    Dropout: one number a forward comes from torch's generator on the host, so `torch.manual_seed` repeats a run and
    every micro-batch draws anew. A mask is a function of it, the layer, the map, the row's place in the batch and the
    column: backward makes it again, and rows drop alike wherever they are computed.
    """

    def __init__(self, readable: Callable[[], list[LayerParts]] = list) -> None:
        """Empty.

        Args:
            readable: the parts of all layers that can be read before their call. Asked for when a second layer runs:
                the host makes their factors while the device works on the first layer.
        """
        self._readable = readable
        self._bound: dict[int, tuple[LayerParts, LayerParts]] = {}
        self._seed: int | None = None

    def prepare(self, layers: Iterable[LayerParts]) -> None:
        """Makes the factors of several layers at once.

        *Cost*: one launch to scale and one to convert, per dtype; holds a copy of every adapter until backward.
        """
        layers = list(layers)
        groups = [group for parts in layers for group in parts.groups if any(group.ranks)]
        made = dict(zip(map(id, groups), _bind(groups), strict=True))
        for parts in layers:
            if any(id(group) in made for group in parts.groups):
                bound = parts.with_groups(tuple(made.get(id(group), group) for group in parts.groups))
                self._bound[id(parts)] = parts, bound
            else:
                self._bound[id(parts)] = parts, parts

    def bind(self, parts: LayerParts, index: int) -> LayerParts:
        """The parts of a layer with their factors: made for it alone if it is the first, else with all others."""
        if id(parts) not in self._bound:
            others: list[LayerParts] = []
            if self._bound:
                others, self._readable = self._readable(), list
            self.prepare((parts, *(x for x in others if x is not parts and id(x) not in self._bound)))
        bound = self._bound[id(parts)][1]
        return self._keyed(bound, index) if bound.drops else bound

    def _keyed(self, bound: LayerParts, index: int) -> LayerParts:
        if self._seed is None:
            self._seed = draw_seed()
        groups, first = [], 0
        for group in bound.groups:
            groups.append(group.keyed(tuple(dropout_key(self._seed, index, first + n) for n in range(len(group.maps)))))
            first += len(group.maps)
        return bound.with_groups(tuple(groups))


def draw_seed() -> int:
    """A number from torch's generator on the host."""
    return int(torch.randint(1 << 62, ()))


def dropout_key(seed: int, layer: int, projection: int) -> Key:
    """The key of one adapter's dropout in one forward; `projection` counts the layer's maps in the order of use."""
    state = seed
    for number in (layer, projection):
        state = (state + (number + 1) * 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 32, state & 0xFFFFFFFF


@torch.no_grad()
def _bind(groups: list[MapGroup]) -> list[MapGroup]:
    """The groups with their factors: first ones under each other in one tensor, second ones times their scale."""
    firsts: list[Tensor] = []
    seconds: list[Tensor] = []
    sources: list[Tensor] = []
    scales: list[float] = []
    for group in groups:
        weight = group.maps[0].weight_OI
        adapted = [item for item in group.maps if item.a_RI is not None]
        firsts.append(weight.new_empty(sum(group.ranks), weight.shape[1]))
        sources += [item.a_RI for item in adapted]  # type: ignore[misc]
        seconds += [weight.new_empty(item.b_OR.shape) for item in adapted]  # type: ignore[union-attr]
        scales += [item.scale for item in adapted]
    if not groups:
        return []
    rows = [part for g, first in zip(groups, firsts, strict=True) for part in first.split([r for r in g.ranks if r])]
    seconds_of = [item.b_OR for g in groups for item in g.maps if item.a_RI is not None]
    torch._foreach_copy_(rows, sources)
    torch._foreach_copy_(seconds, torch._foreach_mul(seconds_of, scales))
    bound, left = [], iter(seconds)
    for group, first in zip(groups, firsts, strict=True):
        of_map = [next(left) if rank else None for rank in group.ranks]
        cuts = ((of_map[part.number], part.cut) for part in group.parts)
        bound.append(group.bound(first, tuple(b if b is None or cut is None else b[cut] for b, cut in cuts)))
    return bound
