"""Linear maps with or without a LoRA adapter, forward and backward written out, several outputs from one input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Gradients:
    """Gradients of a layer's trainable tensors, added up while its backward runs."""

    def __init__(self, wanted: tuple[bool, ...]) -> None:
        """Args: wanted: which of the layer's tensors, by place, need a gradient."""
        self.wanted = wanted
        self.found: list[Tensor | None] = [None] * len(wanted)

    def add(self, place: int | None, gradient: Tensor) -> None:
        """Adds to the gradient of one tensor."""
        if place is None or not self.wanted[place]:
            return
        before = self.found[place]
        self.found[place] = gradient if before is None else before.add_(gradient)

    def wants(self, place: int | None) -> bool:
        """Whether the tensor at `place` needs a gradient."""
        return place is not None and self.wanted[place]


@dataclass(frozen=True)
class LinearMap:
    """x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ, and the places of its tensors among the layer's.

    Attributes:
        weight_OI: base weight (outputs, inputs).
        bias_O: base bias, or None.
        a_RI: first adapter factor, or None without adapter.
        b_OR: second adapter factor.
        scale: s.
        places: of weight, bias, A and B among the layer's trainable tensors; None for one that is not there.
    """

    weight_OI: Tensor
    bias_O: Tensor | None
    a_RI: Tensor | None
    b_OR: Tensor | None
    scale: float
    places: tuple[int | None, ...]

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Adapter factors in the compute dtype, the scale in the second; made once per forward of the layer."""
        assert self.a_RI is not None and self.b_OR is not None
        if "_factors" not in self.__dict__:
            made = self.a_RI.detach().to(dtype), (self.b_OR.detach() * self.scale).to(dtype)
            self.__dict__["_factors"] = made
        return self.__dict__["_factors"]


@dataclass(frozen=True)
class MapGroup:
    """Maps that share their input, cut into parts: queries, keys and values; gate and up.

    Attributes:
        maps: the linear maps.
        parts: for each part, its map and which of the map's outputs are its own.
    """

    maps: tuple[LinearMap, ...]
    parts: tuple[tuple[int, slice], ...]

    def forward(self, x_NI: Tensor, which: tuple[int, ...]) -> list[Tensor]:
        """Parts `which` of rows: (N, outputs) each.

        The adapter's product is written first and the base product accumulated onto it in fp32: one pass over the
        output instead of two.
        """
        low = self._low(x_NI, {self.parts[i][0] for i in which})
        outputs = []
        for i in which:
            number, cut = self.parts[i]
            item = self.maps[number]
            bias = None if item.bias_O is None else item.bias_O[cut]
            if number not in low:
                outputs.append(F.linear(x_NI, item.weight_OI[cut], bias))
                continue
            output = low[number] @ item.factors(x_NI.dtype)[1][cut].T
            output.addmm_(x_NI, item.weight_OI[cut].T)
            outputs.append(output if bias is None else output.add_(bias))
        return outputs

    def backward(
        self,
        x_NI: Tensor | None,
        grads: dict[int, Tensor],
        gradients: Gradients,
        into: Tensor | None = None,
        want_input: bool = True,
    ) -> Tensor | None:
        """Gradient of the input, (N, inputs), and those of the maps' tensors.

        Args:
            x_NI: the input; may be None when `needs_input` says no.
            grads: gradient of each part.
            gradients: takes the tensors' gradients.
            into: gradient to add to, in place.
            want_input: whether the input's gradient is needed.
        """
        numbers = {self.parts[i][0] for i in grads}
        low = self._low(x_NI, numbers) if x_NI is not None else {}
        for number in sorted(numbers):
            item = self.maps[number]
            parts = [(self.parts[i][1], grad) for i, grad in grads.items() if self.parts[i][0] == number]
            for cut, grad in parts:
                if want_input:
                    into = _accumulate(into, grad, item.weight_OI[cut])
                self._base_gradients(item, cut, grad, x_NI, gradients)
            if item.a_RI is not None:
                into = self._adapter_backward(item, parts, x_NI, low.get(number), gradients, into, want_input)
        return into

    def needs_input(self, gradients: Gradients) -> bool:
        """Whether a gradient of some tensor is made from the input."""
        return any(gradients.wants(place) for item in self.maps for place in (item.places[0], *item.places[2:]))

    def _low(self, x_NI: Tensor, numbers: set[int]) -> dict[int, Tensor]:
        """x·Aᵀ of the maps that have an adapter, all in one product: it is bound by reading x."""
        chosen = [n for n in sorted(numbers) if self.maps[n].a_RI is not None]
        if not chosen:
            return {}
        first = [self.maps[n].factors(x_NI.dtype)[0] for n in chosen]
        cached: dict[tuple[int, ...], Tensor] = self.__dict__.setdefault("_joint", {})
        if tuple(chosen) not in cached:
            cached[tuple(chosen)] = first[0] if len(first) == 1 else torch.cat(first)
        joint = x_NI @ cached[tuple(chosen)].T
        return dict(zip(chosen, joint.split([len(a) for a in first], dim=1), strict=True))

    def _base_gradients(
        self, item: LinearMap, cut: slice, grad: Tensor, x_NI: Tensor | None, gradients: Gradients
    ) -> None:
        weight, bias = item.places[:2]
        if gradients.wants(weight):
            assert x_NI is not None
            gradients.add(weight, _placed(_transposed_product(grad, x_NI), cut, item.weight_OI))
        if gradients.wants(bias):
            assert item.bias_O is not None
            gradients.add(bias, _placed(grad.sum(0, dtype=_wide(grad.dtype)), cut, item.bias_O))

    def _adapter_backward(
        self,
        item: LinearMap,
        parts: list[tuple[slice, Tensor]],
        x_NI: Tensor | None,
        low_NR: Tensor | None,
        gradients: Gradients,
        into: Tensor | None,
        want_input: bool,
    ) -> Tensor | None:
        dtype = parts[0][1].dtype
        a, b = item.factors(dtype)
        grad_low: Tensor | None = None
        for cut, grad in parts:
            grad_low = _accumulate(grad_low, grad, b[cut])
        assert grad_low is not None and item.a_RI is not None and item.b_OR is not None
        if gradients.wants(item.places[2]):
            assert x_NI is not None
            gradients.add(item.places[2], _transposed_product(grad_low, x_NI).to(item.a_RI.dtype))
        if gradients.wants(item.places[3]):
            assert low_NR is not None
            for cut, grad in parts:
                product = _transposed_product(grad, low_NR).mul_(item.scale)
                gradients.add(item.places[3], _placed(product, cut, item.b_OR))
        return _accumulate(into, grad_low, a) if want_input else into


def _accumulate(into: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return left @ right if into is None else into.addmm_(left, right)


def _transposed_product(left_NO: Tensor, right_NI: Tensor) -> Tensor:
    """leftᵀ·right, the sum over rows in at least fp32 where the device can return it."""
    if left_NO.is_cuda and left_NO.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left_NO.T, right_NI, out_dtype=torch.float32)
    return left_NO.T @ right_NI


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _placed(gradient: Tensor, cut: slice, like: Tensor) -> Tensor:
    """Gradient of a whole tensor from that of some of its rows, in the tensor's dtype."""
    if len(gradient) == len(like):
        return gradient.to(like.dtype)
    whole = like.new_zeros(like.shape)
    whole[cut] = gradient.to(like.dtype)
    return whole


class TensorList:
    """The tensors that a layer's autograd function takes, each once, with their places."""

    def __init__(self) -> None:
        """Empty."""
        self.tensors: list[Tensor] = []

    def place(self, tensor: Tensor | None) -> int | None:
        """Place of a tensor, which is added; None for None."""
        if tensor is None:
            return None
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def linear(self, module: nn.Module) -> LinearMap:
        """The map of an `nn.Linear`, or of PEFT's LoRA around one (see `why_not_linear`)."""
        base = module.base_layer if hasattr(module, "base_layer") else module
        a = b = None
        scale = 1.0
        adapter = active_adapter(module)
        if adapter is not None:
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight  # type: ignore[union-attr, index]
            scale = float(module.scaling[adapter])  # type: ignore[index]
        tensors = (base.weight, base.bias, a, b)
        return LinearMap(*tensors, scale, tuple(self.place(t) for t in tensors))  # type: ignore[arg-type]


def active_adapter(module: nn.Module) -> str | None:
    """Name of the LoRA adapter in force on a linear map; None for none."""
    if not hasattr(module, "lora_A") or getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]  # type: ignore[union-attr, operator]
    return names[0] if names else None


def why_not_linear(module: nn.Module, training: bool) -> str | None:
    """Why a linear map cannot run in the fused engine; None when it can. Adapters are judged as they are now."""
    base = module.base_layer if hasattr(module, "base_layer") else module
    if type(base) is not nn.Linear:
        return f"{type(base).__name__} is not a plain linear map"
    if base._forward_hooks or base._forward_pre_hooks or module._forward_hooks or module._forward_pre_hooks:
        return "hooks on a linear map"
    if base is module:
        return None
    if not hasattr(module, "lora_A"):
        return f"{type(module).__name__} is not LoRA"
    if getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]  # type: ignore[union-attr, operator]
    if len(names) > 1:
        return "several active adapters"
    if not names:
        return None
    if names[0] in getattr(module, "lora_variant", {}):
        return "a LoRA variant such as DoRA"
    if module.lora_B[names[0]].bias is not None:  # type: ignore[union-attr, index]
        return "a LoRA adapter with bias"
    dropout = module.lora_dropout[names[0]]  # type: ignore[index]
    if training and isinstance(dropout, nn.Dropout) and dropout.p > 0:
        return "dropout in the LoRA adapter"
    return None
