"""Linear maps with or without a LoRA adapter, forward and backward written out, several outputs from one input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lemo.ops import LowRank, dropout_rows
from lemo.runtime.fused.linear import LinearMap


class Gradients:
    """Gradients of a layer's trainable tensors, added up while its backward runs."""

    def __init__(self, wanted: tuple[bool, ...]) -> None:
        """Args: wanted: which of the layer's tensors, by place, need a gradient."""
        self.wanted = wanted
        self.found: list[Tensor | None] = [None] * len(wanted)
        self._last: dict[int, tuple[float, torch.dtype]] = {}

    def add(self, place: int | None, gradient: Tensor) -> None:
        """Adds to the gradient of one tensor."""
        if place is None or not self.wanted[place]:
            return
        before = self.found[place]
        self.found[place] = gradient if before is None else before.add_(gradient)

    def add_small(self, place: int, gradient: Tensor, scale: float, dtype: torch.dtype) -> None:
        """Adds to the gradient of an adapter's factor. `finish` scales and converts those of the whole layer at once.

        Args:
            place: of a tensor that needs a gradient.
            gradient: in the precision of its products, before the scale.
            scale: factor, the same in all calls for this place.
            dtype: of the tensor.
        """
        before = self.found[place]
        self.found[place] = gradient if before is None else before.add_(gradient)
        self._last[place] = (scale, dtype)

    def finish(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of `tensors`, complete; zeros where no row had a share, as of a batch without labels."""
        scaled = [(self.found[place], scale) for place, (scale, _) in self._last.items() if scale != 1.0]
        if scaled:
            torch._foreach_mul_([gradient for gradient, _ in scaled], [scale for _, scale in scaled])
        places = [place for place, (_, dtype) in self._last.items() if self.found[place].dtype != dtype]
        if places:
            made = [torch.empty_like(self.found[place], dtype=self._last[place][1]) for place in places]
            torch._foreach_copy_(made, [self.found[place] for place in places])
            for place, gradient in zip(places, made, strict=True):
                self.found[place] = gradient
        for place, tensor in enumerate(tensors):
            if self.wanted[place] and self.found[place] is None:
                self.found[place] = torch.zeros_like(tensor)
        return self.found

    def wants(self, place: int | None) -> bool:
        """Whether the tensor at `place` needs a gradient."""
        return place is not None and self.wanted[place]


NOTHING = Gradients(())
"""For a pass backward that is after the input's gradient alone."""


class Part(NamedTuple):
    """One output of a group: which rows of which map make it.

    Attributes:
        number: of its map.
        cut: its own outputs among the map's; None for all.
    """

    number: int
    cut: slice | None


class MapGroup:
    """Maps that share their input, cut into parts: queries, keys and values; gate and up.

    Attributes:
        maps: the linear maps.
        parts: for each part, its map and which of the map's outputs are its own.
        ranks: of each map's adapter, 0 for none.
        starts: where each map's first factor begins in the joint one.
        joint_JI: first factors of all adapters under each other, in the compute dtype; None before `bound`.
        seconds: second factor of each part, scaled, in the compute dtype; None for a part without adapter.
        keys: of each map's dropout; empty where nothing is dropped.
    """

    def __init__(self, maps: tuple[LinearMap, ...], parts: tuple[tuple[int, slice], ...]) -> None:
        """Args: maps: the linear maps; parts: map and outputs of each part."""
        self.maps = maps
        whole = [slice(0, item.outputs) for item in maps]
        self.parts = tuple(Part(number, None if cut == whole[number] else cut) for number, cut in parts)
        self.ranks = tuple(0 if item.a_RI is None else item.a_RI.shape[0] for item in maps)
        self.starts = tuple(sum(self.ranks[:number]) for number in range(len(maps)))
        self.joint_JI: Tensor | None = None
        self.seconds: tuple[Tensor | None, ...] = ()
        self.keys: tuple[tuple[int, int], ...] = ()
        self._from_input = [p for item in maps for p in (item.places[0], *item.places[2:]) if p is not None]
        self._spans: dict[tuple[int, ...], tuple[list[int], int, int]] = {}

    def bound(self, joint_JI: Tensor, seconds: tuple[Tensor | None, ...]) -> MapGroup:
        """The group with its adapters' factors as they are in one forward."""
        made = MapGroup.__new__(MapGroup)
        made.__dict__.update(self.__dict__)
        made.joint_JI, made.seconds = joint_JI, seconds
        return made

    def keyed(self, keys: tuple[tuple[int, int], ...]) -> MapGroup:
        """The group with its dropouts' keys in one forward."""
        made = MapGroup.__new__(MapGroup)
        made.__dict__.update(self.__dict__)
        made.keys = keys
        return made

    def forward(self, x_NI: Tensor, which: tuple[int, ...], rows_N: Tensor | None = None) -> list[Tensor]:
        """Parts `which` of rows: (N, outputs) each.

        Args:
            x_NI: the input.
            which: the parts; they lie side by side.
            rows_N: flat rows of the input, which dropout draws by; None for all, in order.

        The adapter's product is written first and the base product accumulated onto it in fp32: one pass over the
        output instead of two.
        """
        low = self.low(x_NI, which, rows_N)
        outputs = []
        for i in which:
            weight, bias = self._base(i)
            if self.ranks[self.parts[i].number] == 0:
                outputs.append(F.linear(x_NI, weight, bias))
                continue
            output = torch.mm(low[self.parts[i].number], self.seconds[i].T)  # type: ignore[union-attr]
            output.addmm_(x_NI, weight.T)
            outputs.append(output if bias is None else output.add_(bias))
        return outputs

    def bases(self, x_NI: Tensor) -> list[Tensor]:
        """What all parts give without their adapters, (N, outputs) each; x_NI as in `forward`."""
        return [F.linear(x_NI, *self._base(i)) for i in range(len(self.parts))]

    def adapters(self, x_NI: Tensor, rows_N: Tensor | None) -> list[LowRank | None]:
        """What adapters add to `bases`, as factors; arguments as in `forward`."""
        low = self.low(x_NI, tuple(range(len(self.parts))), rows_N)
        pairs = ((low.get(part.number), second) for part, second in zip(self.parts, self.seconds, strict=False))
        found = [None if first is None or second is None else LowRank(first, second) for first, second in pairs]
        return found or [None] * len(self.parts)

    def _base(self, i: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a part."""
        number, cut = self.parts[i]
        weight, bias = self.maps[number].weight(cut), self.maps[number].bias_O
        return weight, bias if cut is None or bias is None else bias[cut]

    def add(self, x_NI: Tensor, into_NO: Tensor, rows_N: Tensor | None, multiplier: float) -> Tensor:
        """The only part, times `multiplier`, added to `into_NO` in place.

        Args:
            x_NI: the input.
            into_NO: rows of the residual stream.
            rows_N: as in `forward`.
            multiplier: of the map's output.

        *Numerics*: a map without adapter and bias is accumulated onto `into_NO` in fp32 and rounded once. An adapter's
        product is not: rounded beside the residual stream, most of a small one would be lost (in bf16, five sixths of
        one of 0.3 % of the base product, where that is 10 % of the stream), so it meets the base product first.
        """
        item = self.maps[0]
        bare = item.a_RI is None and item.bias_O is None and multiplier == 1.0
        if bare and into_NO.dtype == item.like.dtype:
            return into_NO.addmm_(x_NI, item.weight().T)
        update = self.forward(x_NI, (0,), rows_N)[0]
        return into_NO.add_(update if multiplier == 1.0 else update.mul_(multiplier))

    def backward(
        self,
        x_NI: Tensor | None,
        grads: dict[int, Tensor],
        gradients: Gradients,
        into: Tensor | None = None,
        want_input: bool = True,
        rows_N: Tensor | None = None,
    ) -> Tensor | None:
        """Gradient of the input, (N, inputs), and those of the maps' tensors.

        Args:
            x_NI: the input; may be None when `needs_input` says no.
            grads: gradient of each part.
            gradients: takes the tensors' gradients; `NOTHING` for those of no tensor.
            into: gradient to add to, in place.
            want_input: whether the input's gradient is needed.
            rows_N: as in `forward`.
        """
        own = gradients is not NOTHING
        for i, grad in grads.items():
            number, cut = self.parts[i]
            item = self.maps[number]
            if want_input:
                into = _accumulate(into, grad, item.weight(cut))
            if own and item.places[0:2] != (None, None):
                _base_gradients(item, cut, grad, x_NI, gradients)
        numbers, start, stop = self._span(tuple(grads))
        if not numbers:
            return into
        assert self.joint_JI is not None
        grad_low = self._grad_low(grads, start, stop)
        if self.keys:
            return self._dropped_backward(x_NI, grads, grad_low, gradients, into if want_input else None, rows_N)
        if own:
            self._factor_gradients(grads, x_NI, grad_low, gradients)
        if not want_input:
            return into
        whole = stop - start == self.joint_JI.shape[0]
        return _accumulate(into, grad_low, self.joint_JI if whole else self.joint_JI[start:stop])

    def needs_input(self, gradients: Gradients) -> bool:
        """Whether a gradient of some tensor is made from the input."""
        return any([gradients.wanted[place] for place in self._from_input])

    def low(self, x_NI: Tensor, which: tuple[int, ...], rows_N: Tensor | None = None) -> dict[int, Tensor]:
        """x·Aᵀ of the maps of parts `which` that have an adapter, all in one product: it is bound by reading x."""
        numbers, start, stop = self._span(which)
        if not numbers:
            return {}
        assert self.joint_JI is not None
        if self.keys:
            return {n: torch.mm(self._dropped(x_NI, n, rows_N), self._first(n).T) for n in numbers}
        whole = stop - start == self.joint_JI.shape[0]
        joint = torch.mm(x_NI, (self.joint_JI if whole else self.joint_JI[start:stop]).T)
        if len(numbers) == 1:
            return {numbers[0]: joint}
        return dict(zip(numbers, joint.split([self.ranks[n] for n in numbers], dim=1), strict=True))

    def _span(self, which: tuple[int, ...]) -> tuple[list[int], int, int]:
        """Maps of parts `which` that have an adapter, and where their first factors lie in the joint one."""
        if which not in self._spans:
            chosen = {self.parts[i].number for i in which}
            numbers = [n for n in range(min(chosen), max(chosen) + 1) if self.ranks[n]]
            start = self.starts[min(chosen)]
            assert chosen.issuperset(numbers), "parts that are used together must lie side by side"
            self._spans[which] = numbers, start, start + sum(self.ranks[n] for n in numbers)
        return self._spans[which]

    def _dropped(self, x_NI: Tensor, number: int, rows_N: Tensor | None) -> Tensor:
        """The input as one map's adapter sees it."""
        p = self.maps[number].dropout
        return x_NI if p == 0 else dropout_rows(x_NI, p, self.keys[number], rows_N)

    def _first(self, number: int) -> Tensor:
        assert self.joint_JI is not None
        return self.joint_JI[self.starts[number] : self.starts[number] + self.ranks[number]]

    def _dropped_backward(
        self,
        x_NI: Tensor | None,
        grads: dict[int, Tensor],
        grad_low_NJ: Tensor,
        gradients: Gradients,
        into: Tensor | None,
        rows_N: Tensor | None,
    ) -> Tensor | None:
        """The adapters' share of `backward` under dropout: every map has its own input, which is made again."""
        numbers, start, _ = self._span(tuple(grads))
        for n in numbers:
            item, at = self.maps[n], self.starts[n] - start
            grad_low = grad_low_NJ[:, at : at + self.ranks[n]]
            wants_a, wants_b = (gradients is not NOTHING and gradients.wants(place) for place in item.places[2:])
            if wants_a or wants_b:
                assert x_NI is not None and item.a_RI is not None and item.b_OR is not None
                dropped = self._dropped(x_NI, n, rows_N)
                if wants_a:
                    gradients.add_small(item.places[2], _transposed_product(grad_low, dropped), 1.0, item.a_RI.dtype)
                low = torch.mm(dropped, self._first(n).T)
                for i in [i for i in grads if wants_b and self.parts[i].number == n]:
                    product = _placed(_transposed_product(grads[i], low), self.parts[i].cut, item.b_OR)
                    gradients.add_small(item.places[3], product, item.scale, item.b_OR.dtype)
            if into is not None and item.dropout == 0:
                into.addmm_(grad_low, self._first(n))
            elif into is not None:
                dropout_rows(torch.mm(grad_low, self._first(n)), item.dropout, self.keys[n], rows_N, into_nM=into)
        return into

    def _grad_low(self, grads: dict[int, Tensor], start: int, stop: int) -> Tensor:
        """Gradient of x·Aᵀ of all adapters side by side, (N, J): what is made from it then takes one product each."""
        first = next(iter(grads.values()))
        joint = first.new_empty(first.shape[0], stop - start)
        written = set()
        for i, grad in grads.items():
            number, second = self.parts[i].number, self.seconds[i]
            if second is None:
                continue
            at = self.starts[number] - start
            piece = joint[:, at : at + self.ranks[number]]
            if number in written:
                piece.addmm_(grad, second)
            else:
                torch.mm(grad, second, out=piece)
                written.add(number)
        return joint

    def _factor_gradients(
        self, grads: dict[int, Tensor], x_NI: Tensor | None, grad_low_NJ: Tensor, gradients: Gradients
    ) -> None:
        """Gradients of both factors of the adapters."""
        numbers, start, _ = self._span(tuple(grads))
        if any([gradients.wants(self.maps[n].places[2]) for n in numbers]):
            assert x_NI is not None
            joint = _transposed_product(grad_low_NJ, x_NI)
            for n in numbers:
                place, at = self.maps[n].places[2], self.starts[n] - start
                if gradients.wants(place):
                    gradients.add_small(place, joint[at : at + self.ranks[n]], 1.0, self.maps[n].a_RI.dtype)
        seconds = [i for i in grads if gradients.wants(self.maps[self.parts[i].number].places[3])]
        if not seconds:
            return
        assert x_NI is not None
        low = self.low(x_NI, tuple(grads))
        for i in seconds:
            number, cut = self.parts[i]
            item = self.maps[number]
            product = _placed(_transposed_product(grads[i], low[number]), cut, item.b_OR)
            gradients.add_small(item.places[3], product, item.scale, item.b_OR.dtype)


def _base_gradients(
    item: LinearMap, cut: slice | None, grad: Tensor, x_NI: Tensor | None, gradients: Gradients
) -> None:
    weight, bias = item.places[0], item.places[1]
    if gradients.wants(weight):
        assert x_NI is not None
        gradients.add(weight, _placed(_transposed_product(grad, x_NI).to(item.weight_OI.dtype), cut, item.weight_OI))
    if gradients.wants(bias):
        assert item.bias_O is not None
        found = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))
        gradients.add(bias, _placed(found.to(item.bias_O.dtype), cut, item.bias_O))


def _accumulate(into: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right) if into is None else into.addmm_(left, right)


def _transposed_product(left_NO: Tensor, right_NI: Tensor) -> Tensor:
    """leftᵀ·right, the sum over rows in at least fp32 where the device can return it."""
    if left_NO.is_cuda and left_NO.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left_NO.T, right_NI, out_dtype=torch.float32)
    return torch.mm(left_NO.T, right_NI)


def _placed(gradient: Tensor, cut: slice | None, like: Tensor) -> Tensor:
    """Gradient of a whole tensor from that of some of its rows."""
    if cut is None:
        return gradient
    whole = gradient.new_zeros(like.shape)
    whole[cut] = gradient
    return whole
