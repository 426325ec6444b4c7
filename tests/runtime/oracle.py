"""The executor's oracle: the dense model with dropped keys masked and dropped rows put back, by plain hooks."""

from __future__ import annotations

import inspect
from contextlib import ExitStack, contextmanager

import torch
from transformers import AutoModelForCausalLM

from lemo.core.layout import Layout
from lemo.core.plan import Plan
from lemo.families import all_families
from lemo.ops.scatter_rows.reference import bypass_reference
from lemo.runtime.attention import attention_module
from lemo.runtime.model import causal_model, decoder_layers, window_of

FAMILIES = sorted(all_families())


def tiny_model(family: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides):
    """A random model of a family, in training mode, with weights large enough that every path matters."""
    torch.manual_seed(seed)
    entry = all_families()[family]
    options = {"attn_implementation": entry.attention}
    if dtype == torch.float64 and hasattr(torch, "_grouped_mm"):
        options["experts_implementation"] = "eager"  # grouped products of experts take no fp64
    model = AutoModelForCausalLM.from_config(entry.tiny_config(**overrides), **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            elif "norm" in name and "weight" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).train()


def fill_adapters(model) -> None:
    """Draws the second factors of all LoRA adapters, which PEFT makes zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)


def batch(tokens: int = 64, rows: int = 1, *, supervised_from: int = 40, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random tokens whose tail is supervised."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (rows, tokens), generator=generator)
    labels = ids.clone()
    labels[:, :supervised_from] = -100
    return {"input_ids": ids, "labels": labels}


@contextmanager
def masked_oracle(model, plan: Plan, rows: dict[int, torch.Tensor], layout: Layout):
    """Inside, `model` (eager attention) runs densely with the rows of `rows` alone taking part in each layer.

    rows: {layer: kept flat rows}; layers that are missing run untouched.
    """
    base = causal_model(model)
    batch_size, tokens = layout.batch, layout.tokens
    document = layout.document_of_row_N.view(batch_size, tokens)
    position = layout.position_of_row_N.view(batch_size, tokens)
    same = (document[:, :, None] == document[:, None, :]) & (document[:, :, None] >= 0)
    distance = position[:, :, None] - position[:, None, :]
    with ExitStack() as stack:
        for index, layer in enumerate(decoder_layers(base)):
            if index not in rows:
                continue
            kept = torch.zeros(batch_size * tokens, dtype=torch.bool)
            kept[rows[index]] = True
            kept = kept.view(batch_size, tokens)
            window = window_of(attention_module(layer))
            seen = same & (distance >= 0)
            if window is not None:
                seen &= distance < window
            if plan.kv == "kept":
                seen &= kept[:, None, :]
            seen |= torch.eye(tokens, dtype=torch.bool)
            _hook(stack, layer, seen, kept, document >= 0, plan.layers[index].bypass)
        yield


def _hook(stack: ExitStack, layer, seen, kept, real, bypass) -> None:
    inputs = []

    def before(module, args, kwargs):
        x, names = args[0], list(inspect.signature(type(layer).forward).parameters)[2:]
        kwargs = dict(zip(names, args[1:], strict=False)) | kwargs
        inputs.append(x)
        mask = torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)[:, None]
        return (x,), kwargs | {"attention_mask": mask}

    def after(module, args, kwargs, output):
        x = inputs.pop()
        hidden = output[0] if isinstance(output, tuple) else output
        skipped = x
        if bypass is not None:
            update = bypass_reference(x.reshape(-1, x.shape[-1]), bypass.down_MR.to(x), bypass.up_RM.to(x), 1e-6)
            skipped = torch.where(real[..., None], update.view_as(x), x)
        y = torch.where(kept[..., None], hidden, skipped)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(layer.register_forward_hook(after, with_kwargs=True).remove)


def gradients(model) -> dict[str, torch.Tensor]:
    """Gradients of all parameters that have one."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖ in fp64."""
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))
