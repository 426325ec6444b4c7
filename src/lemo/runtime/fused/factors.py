"""Adapter factors in the compute dtype, made once a forward for more and more layers at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lemo.ops.backend import ALIGNMENT_BYTES
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

    def __init__(self, readable: Callable[[], Iterable[LayerParts]] = list) -> None:
        """Empty.

        Args:
            readable: the parts of all layers that can be read before their call, in the order of these. Asked for when
                a second layer runs, and read as far as is needed: the first layer's factors are made alone, and then
                for twice as many layers each time, while the device works on what it was given before.
        """
        self._readable = readable
        self._left: Iterator[LayerParts] | None = None
        self._share = 1
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
        """The parts of a layer with their factors: made for it alone if it is the first, else with the next ones."""
        if id(parts) not in self._bound:
            self.prepare((parts, *self._next_others(parts)))
        bound = self._bound[id(parts)][1]
        return self._keyed(bound, index) if bound.drops else bound

    def _next_others(self, parts: LayerParts) -> list[LayerParts]:
        """Layers whose factors are made with those of `parts`: none at first, then 1, 3, 7, ..."""
        if not self._bound:
            return []
        self._left = iter(self._readable()) if self._left is None else self._left
        self._share *= 2
        new = (x for x in self._left if x is not parts and id(x) not in self._bound)
        return list(islice(new, self._share - 1))

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
    adapted = [[item for item in group.maps if item.a_RI is not None] for group in groups]
    if not groups:
        return []
    likes = [group.maps[0].like for group in groups]
    joint = _blank([(x, (sum(g.ranks), g.maps[0].inputs)) for g, x in zip(groups, likes, strict=True)])
    seconds = _blank([(x, item.b_OR.shape) for x, items in zip(likes, adapted, strict=True) for item in items])
    firsts: list[Tensor] = []
    for items, whole in zip(adapted, joint, strict=True):
        firsts += whole.split([item.a_RI.shape[0] for item in items]) if len(items) > 1 else [whole]
    flat = [item for items in adapted for item in items]
    torch._foreach_copy_(firsts, [item.a_RI for item in flat])
    scales = [item.scale for item in flat]
    # One factor for all takes fewer launches than a list.
    scale = scales[0] if len(set(scales)) == 1 else scales
    torch._foreach_copy_(seconds, torch._foreach_mul([item.b_OR for item in flat], scale))
    bound, left = [], iter(seconds)
    for group, first in zip(groups, joint, strict=True):
        of_map = [next(left) if rank else None for rank in group.ranks]
        cuts = ((of_map[part.number], part.cut) for part in group.parts)
        bound.append(group.bound(first, tuple(b if b is None or cut is None else b[cut] for b, cut in cuts)))
    return bound


def _blank(wanted: list[tuple[Tensor, tuple[int, ...]]]) -> list[Tensor]:
    """Tensors of these sizes, like the one given with each, in one piece of memory for each dtype and device."""
    numbers: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for number, (like, _) in enumerate(wanted):
        numbers.setdefault((like.dtype, like.device), []).append(number)
    made: list[Any] = [None] * len(wanted)
    for chosen in numbers.values():
        like = wanted[chosen[0]][0]
        step = max(1, ALIGNMENT_BYTES // like.itemsize)
        sizes = [math.prod(wanted[number][1]) for number in chosen]
        padded = [-(-size // step) * step for size in sizes]
        pieces = like.new_empty(sum(padded)).split(padded)
        for number, size, whole, piece in zip(chosen, sizes, padded, pieces, strict=True):
            made[number] = (piece if size == whole else piece[:size]).view(wanted[number][1])
    return made
