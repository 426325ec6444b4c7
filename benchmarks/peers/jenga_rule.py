"""The fixed rule of the paper's artifact, over Transformers' layers.

In the upper half of the layers but the last, attention runs on 40 % of the tokens: index, run, zeros, scatter. The MLP
runs on every token in every layer; its backward uses the fifth of the channels with the largest activations, so only
those are saved. What differs from the artifact: blocks are drawn at random where it ranks them by a predictor, and
channels are ranked by their mean over a sample of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peers.peer import Prepared, Setting, Unsupported, adapted, checkpoint_layers, numbers, plain_forward
from lemo.runtime.model import decoder_layers

OPTIONS = {"adapter": "model", "recompute": "none", "keep": "0.4", "channels": "0.2"}
SAMPLED_ROWS = 1024


class PrunedMlp(torch.autograd.Function):
    """Llama's MLP with frozen weights: forward exact, backward through a share of the channels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_FM: Tensor, up_FM: Tensor, down_MF: Tensor, share: float) -> Tensor:
        """Saves gate and up of the chosen channels."""
        gate, up = x @ gate_FM.T, x @ up_FM.T
        hidden = F.silu(gate) * up
        sample = hidden.flatten(0, -2)[:: max(1, hidden.shape[-2] // SAMPLED_ROWS)]
        chosen = sample.abs().mean(0).topk(max(1, round(share * hidden.shape[-1]))).indices
        ctx.save_for_backward(gate[..., chosen], up[..., chosen], chosen, gate_FM, up_FM, down_MF)
        return hidden @ down_MF.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Gradient of the input through the chosen channels; weights are frozen."""
        gate, up, chosen, gate_FM, up_FM, down_MF = ctx.saved_tensors
        grad_hidden = grad @ down_MF[:, chosen]
        sigmoid = torch.sigmoid(gate)
        grad_gate = grad_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
        grad_up = grad_hidden * gate * sigmoid
        return grad_gate @ gate_FM[chosen] + grad_up @ up_FM[chosen], None, None, None, None


def prune_mlp(mlp: nn.Module, share: float) -> None:
    """Replaces the forward of a gated MLP."""
    mlp.forward = lambda x: PrunedMlp.apply(x, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, share)


def drop_tokens(attention: nn.Module, keep: float, block: int) -> None:
    """Makes an attention module run on a share of the blocks of its input and give zeros for the others."""
    inner = attention.forward

    def forward(hidden_states: Tensor, *args: Any, position_embeddings: Any = None, **kwargs: Any) -> Any:
        tokens = hidden_states.shape[1]
        blocks = -(-tokens // block)
        drawn = torch.randperm(blocks, device=hidden_states.device)[: max(1, round(keep * blocks))].sort().values
        rows = (drawn[:, None] * block + torch.arange(block, device=hidden_states.device)).flatten()
        if tokens % block:
            rows = rows.clamp(max=tokens - 1).unique()
        cos, sin = (part.expand(hidden_states.shape[0], -1, -1)[:, rows] for part in position_embeddings)
        kwargs = {**kwargs, "attention_mask": None, "position_embeddings": (cos, sin)}
        out, weights = inner(hidden_states[:, rows], *args, **kwargs)
        return torch.zeros_like(hidden_states).index_copy(1, rows, out.to(hidden_states.dtype)), weights

    attention.forward = forward


def prepare(config: Any, setting: Setting, options: dict[str, str]) -> Prepared:
    keep, channels = numbers(options, "keep", "channels")
    if setting.lora != "qkvo":
        raise Unsupported("the artifact puts adapters on q, k, v and o only; its MLP's backward is written for that")
    model = adapted(config, setting, options["adapter"])
    layers = decoder_layers(model)
    if not all(hasattr(layer, "mlp") and hasattr(layer.mlp, "gate_proj") for layer in layers):
        raise Unsupported(f"written for Llama's layers, not for {config.get_text_config().model_type}")
    checkpoint_layers(model, options["recompute"])
    chosen = range(len(layers) // 2 - 1, len(layers) - 1)  # 15 to 30 of 32
    for index, layer in enumerate(layers):
        prune_mlp(layer.mlp, channels)
        if index in chosen:
            drop_tokens(layer.self_attn, keep, setting.block_size)
    return Prepared(model, plain_forward(model), lambda: {"sparse_layers": len(chosen)})
