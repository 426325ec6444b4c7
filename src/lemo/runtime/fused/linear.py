"""A linear map of a layer as the fused engine runs it: base weight, plain or of 4 bits, and LoRA factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class LinearMap:
    """x·Wᵀ + b + s·(drop(x)·Aᵀ)·Bᵀ, and the places of its tensors among the layer's.

    Attributes:
        weight_OI: base weight (outputs, inputs); or the 4-bit numbers of one, see `packed`.
        bias_O: base bias, or None.
        a_RI: first adapter factor, or None without adapter.
        b_OR: second adapter factor.
        scale: s.
        dropout: probability that an element of the adapter's input is dropped.
        places: of weight, bias, A and B among the layer's trainable tensors; None for one that is not there.
        packed: what 4-bit numbers stand for; None for a plain weight.
    """

    weight_OI: Tensor
    bias_O: Tensor | None
    a_RI: Tensor | None
    b_OR: Tensor | None
    scale: float
    dropout: float
    places: tuple[int | None, ...]
    packed: Packed | None = None

    @property
    def outputs(self) -> int:
        """O."""
        return (self.weight_OI if self.packed is None else self.packed).shape[0]

    @property
    def inputs(self) -> int:
        """I."""
        return (self.weight_OI if self.packed is None else self.packed).shape[1]

    @property
    def like(self) -> Tensor:
        """A tensor of the weight's dtype and device."""
        return self.weight_OI if self.packed is None else self.packed.like

    def weight(self, cut: slice | None = None) -> Tensor:
        """The base weight, or some of its outputs.

        *Cost*: 4-bit numbers are unpacked in every call, 2.5 bytes moved a number, nothing of it kept: a thousandth of
        a layer of 64K rows.
        """
        whole = self.weight_OI if self.packed is None else self.packed.unpack(self.weight_OI)
        return whole if cut is None else whole[cut]


@dataclass(frozen=True)
class Packed:
    """What the 4-bit numbers of bitsandbytes stand for.

    Attributes:
        shape: of the weight, (outputs, inputs).
        like: empty, of the dtype that it is unpacked to, where the numbers lie.
        state: how to unpack it.
    """

    shape: tuple[int, int]
    like: Tensor
    state: Any

    @classmethod
    def of(cls, weight: Tensor | None) -> Packed | None:
        """Of a parameter; None for a plain one, or none."""
        state = getattr(weight, "quant_state", None)
        if weight is None or state is None:
            return None
        return cls(tuple(state.shape), weight.data.new_empty(0, dtype=state.dtype), state)

    def unpack(self, numbers: Tensor) -> Tensor:
        """The weight, (outputs, inputs), as bitsandbytes has it in its own product."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(numbers.data.view(-1, 1), self.state)


def weight_like(module: nn.Module) -> Tensor:
    """A tensor of the dtype and device that the weight of a linear module has where it is used."""
    weight: Any = module.weight
    packed = Packed.of(weight)
    return weight if packed is None else packed.like


def why_not_packed(module: nn.Module) -> str | None:
    """Why a module that is no `nn.Linear` cannot be read as 4-bit numbers of bitsandbytes; None when it can."""
    weight: Any = getattr(module, "weight", None)
    state = getattr(weight, "quant_state", None)
    if type(module).__name__ != "Linear4bit" or state is None:
        return f"{type(module).__name__} is not a plain linear map"
    if getattr(state, "packing_format_for_cpu", False):
        return "4-bit weights that bitsandbytes packed anew for inference on this CPU"
    computed = getattr(module, "compute_dtype", None)
    if computed not in (None, state.dtype):
        return f"4-bit weights of {state.dtype} computed in {computed}"
    return None
