"""Linear modules as the fused engine takes them: an `nn.Linear`, one of 4 bits, or PEFT's LoRA around one."""

from __future__ import annotations

from torch import Tensor, nn

from lemo.runtime.fused.linear import LinearMap, Packed, why_not_packed


class TensorList:
    """The tensors that a layer's autograd function takes, those that require grad, each once, with their places."""

    def __init__(self) -> None:
        """Empty. `held`: tensors, frozen ones too, that backward reads as they are then, not as copies."""
        self.tensors: list[Tensor] = []
        self.held: list[Tensor] = []

    def place(self, tensor: Tensor | None) -> int | None:
        """Place of a tensor, which is added; None for one that needs no gradient."""
        if tensor is None or not tensor.requires_grad:
            return None
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def hold(self, *tensors: Tensor | None) -> None:
        """Adds to `held`; tensors of inference mode keep no version that could tell of a change."""
        self.held += [t for t in tensors if t is not None and not t.is_inference()]

    def linear(self, module: nn.Module) -> LinearMap:
        """The map of a module that `why_not_linear` lets pass."""
        base = module.base_layer if hasattr(module, "base_layer") else module
        a = b = None
        scale, p = 1.0, 0.0
        adapter = active_adapter(module)
        if adapter is not None:
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight  # type: ignore[union-attr, index]
            scale = float(module.scaling[adapter])  # type: ignore[index]
            dropout = lora_dropout(module)
            p = float(dropout.p) if dropout is not None and dropout.training else 0.0
        tensors = (base.weight, base.bias, a, b)
        self.hold(*tensors[:2])
        places = tuple(self.place(t) for t in tensors)  # type: ignore[arg-type]
        return LinearMap(*tensors, scale, p, places, Packed.of(base.weight))  # type: ignore[arg-type]


def active_adapter(module: nn.Module) -> str | None:
    """Name of the LoRA adapter in force on a linear map; None for none."""
    if not hasattr(module, "lora_A") or getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]  # type: ignore[union-attr, operator]
    return names[0] if names else None


def lora_dropout(module: nn.Module) -> nn.Dropout | None:
    """The dropout of the LoRA adapter in force on a linear map; None for none."""
    adapter = active_adapter(module)
    dropout = None if adapter is None else module.lora_dropout[adapter]  # type: ignore[index]
    return dropout if isinstance(dropout, nn.Dropout) else None


def why_not_linear(module: nn.Module) -> str | None:
    """Why a linear map cannot run in the fused engine; None when it can. Adapters are judged as they are now."""
    base = module.base_layer if hasattr(module, "base_layer") else module
    if type(base) is not nn.Linear and (reason := why_not_packed(base)) is not None:
        return reason
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
    if type(module.lora_dropout[names[0]]) not in (nn.Dropout, nn.Identity):  # type: ignore[index]
        return "an unknown dropout in the LoRA adapter"
    return None
