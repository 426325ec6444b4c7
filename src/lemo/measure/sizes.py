"""Sizes of a model and of its adapter, read from a configuration on the meta device: no weights, no memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lemo.families import find_family
from lemo.families.family import Family, LayerNames
from lemo.measure.flops import DecoderShape

# Bytes of a number in 4 bits: itself, a scale of 8 bits for 64 numbers, and one in fp32 for 256 scales.
PACKED_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)

# Names of maps where no family file says: of the models that only the generic executor runs.
_USUAL = LayerNames()


@dataclass(frozen=True)
class AdapterSizes:
    """A LoRA adapter.

    Attributes:
        inputs: ranks of the adapters on the maps to queries, keys and values; 0 for none. One number for a fused map.
        output: of the map behind attention.
        gates: of the maps into the MLP.
        down: of the map out of it.
        parameters: trainable numbers in all, modules that are trained whole included.
        element_bytes: of one of them.
        dora: adapters scale the rows of the weights beside.
    """

    inputs: tuple[int, ...] = (0, 0, 0)
    output: int = 0
    gates: tuple[int, ...] = (0, 0)
    down: int = 0
    parameters: int = 0
    element_bytes: int = 2
    dora: bool = False


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of the MLP: how many, and how many a token visits."""

    count: int
    chosen: int


@dataclass(frozen=True)
class ModelSizes:
    """What memory and time of a step follow from.

    Attributes:
        shape: sizes of the decoder; `ffn` is that of one expert in a mixture.
        parameters: numbers of the base model.
        adapter: what is trained.
        element_bytes: of a weight and of an activation.
        linear: numbers of the linear maps but the one before the logits.
        largest: numbers of the largest of these.
        packed: these maps are kept in 4 bits, and unpacked one at a time.
        wide_norm: the model's own norm computes in fp32 by steps, which autograd keeps (RMSNorm); else one fused op.
        head_norms: queries and keys are normed.
        fused: the fused engine knows the family and the adapter.
        defers_norm: the norm before the head may be left to the rows that carry loss.
        rope: positions are rotations.
        experts: a mixture of experts, or None.
        softcap: logits are capped.
        extra: parameter bytes of further trained modules, by name.
    """

    shape: DecoderShape
    parameters: int
    adapter: AdapterSizes
    element_bytes: int = 2
    linear: int = 0
    largest: int = 0
    packed: bool = False
    wide_norm: bool = True
    head_norms: bool = False
    fused: bool = True
    defers_norm: bool = True
    rope: bool = True
    experts: Experts | None = None
    softcap: bool = False
    extra: Mapping[str, int] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> float:
        """Of the base model; in 4 bits with one map unpacked."""
        if not self.packed:
            return self.parameters * self.element_bytes
        return (self.parameters - self.linear + self.largest) * self.element_bytes + self.linear * PACKED_BYTES

    @property
    def query(self) -> int:
        """Numbers of all query heads of a row."""
        return self.shape.heads * self.shape.head_dim

    @property
    def key(self) -> int:
        """Numbers of all key heads of a row."""
        return self.shape.kv_heads * self.shape.head_dim


def meta_model(config: Any) -> nn.Module:
    """The model without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def read_sizes(
    config: Any,
    *,
    rank: int = 16,
    targets: Sequence[str] = ("all-linear",),
    modules_to_save: Sequence[str] = (),
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype | None = None,
    load_in_4bit: bool = False,
    use_dora: bool = False,
) -> ModelSizes:
    """Sizes of a model with a LoRA adapter around it.

    Args:
        config: a Transformers configuration.
        rank: of the adapter.
        targets: names of linear maps, or `all-linear`, as PEFT takes them.
        modules_to_save: ends of names of modules that are trained whole.
        dtype: of the base model.
        adapter_dtype: of the adapter; the base's when None.
        load_in_4bit: linear maps but the one before the logits are kept in 4 bits.
        use_dora: the adapter is DoRA, which the fused engine does not run.

    Adapters on experts that share one weight are not counted; PEFT's own count has them.

    *Cost*: builds the modules once, about a second for a model of 32 layers.
    """
    model = meta_model(config)
    text = config.get_text_config()
    family = find_family(config)
    names = (family.names if family is not None else None) or _USUAL
    head = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if _is_linear(m) and m is not head}
    chosen = {n: m for n, m in linear.items() if tuple(targets) == ("all-linear",) or _ends_in(n, targets)}
    trained = sum(rank * sum(m.weight.shape) for m in chosen.values())
    if use_dora:
        trained += sum(m.weight.shape[0 if isinstance(m, nn.Linear) else 1] for m in chosen.values())
    saved = [m for n, m in model.named_modules() if n.endswith(tuple(modules_to_save))] if modules_to_save else []
    trained += sum(p.numel() for m in saved for p in m.parameters())

    numbers = [m.weight.numel() for m in linear.values()]
    known = any(_ends_in(n, (*names.inputs, names.output, *names.gates, names.down)) for n in linear)

    def ranks(*parts: str) -> tuple[int, ...]:
        # Maps of other names: where the adapters sit among them is unknown, so they are taken to be on all.
        return tuple(rank if any(_ends_in(n, (part,)) or not known for n in chosen) else 0 for part in parts)

    experts = _experts(text)
    modules = dict(model.named_modules())
    return ModelSizes(
        shape=_shape(text, experts),
        parameters=sum(p.numel() for p in model.parameters()),
        adapter=AdapterSizes(
            inputs=ranks(*names.inputs),
            output=ranks(names.output)[0],
            gates=ranks(*names.gates),
            down=ranks(names.down)[0],
            parameters=trained,
            element_bytes=(adapter_dtype or dtype).itemsize,
            dora=use_dora,
        ),
        element_bytes=dtype.itemsize,
        linear=sum(numbers),
        largest=max(numbers, default=0),
        packed=load_in_4bit,
        wide_norm=not any(isinstance(m, nn.LayerNorm | nn.RMSNorm) for m in modules.values()),
        head_norms=_norms_heads(family, modules),
        fused=family is not None and family.names is not None and not use_dora,
        defers_norm=family is not None and family.names is not None and family.names.final_norm is not None,
        rope=any("rotary" in n for n in modules),
        experts=experts,
        softcap=getattr(text, "final_logit_softcapping", None) is not None,
    )


def _is_linear(module: nn.Module) -> bool:
    """Whether LoRA on all linear maps takes it: `nn.Linear`, or GPT-2's transposed one."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _ends_in(name: str, parts: Sequence[str]) -> bool:
    return any(name == part or name.endswith("." + part) for part in parts)


def _norms_heads(family: Family | None, modules: Mapping[str, nn.Module]) -> bool:
    if family is not None and family.names is not None:
        return bool(family.names.head_norms)
    return any(name.endswith("q_norm") for name in modules)


def _experts(text: Any) -> Experts | None:
    count = next(
        (getattr(text, n) for n in ("num_local_experts", "num_experts", "n_routed_experts") if hasattr(text, n)), 0
    )
    return Experts(int(count), int(text.num_experts_per_tok)) if count else None


def _shape(text: Any, experts: Experts | None) -> DecoderShape:
    shape = DecoderShape.from_config(text)
    width = getattr(text, "moe_intermediate_size", None) if experts is not None else None
    if width is None:
        return shape
    return DecoderShape(**{**vars(shape), "ffn": int(width)})
