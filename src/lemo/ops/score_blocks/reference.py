"""Plain torch specification of score_blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Weight (out, in) and bias (out,) of each of three linear maps, in order.
Net = Sequence[Tensor]


def score_blocks_reference(
    features_KE: Tensor, standard: tuple[Tensor, Tensor], query_net: Net, key_net: Net, end_K: Tensor
) -> Tensor:
    """See `lemo.ops.score_blocks` for the contract; differentiable."""
    mean_E, scale_E = standard
    features_KE = (features_KE - mean_E) * scale_E
    query_KR = suffix_mean_reference(run_net(features_KE, query_net), end_K)
    return (query_KR * run_net(features_KE, key_net)).sum(-1) / query_KR.shape[1] ** 0.5


def run_net(features_KE: Tensor, net: Net) -> Tensor:
    """Three linear maps with ReLU between."""
    first, first_bias, second, second_bias, third, third_bias = net
    hidden = F.linear(features_KE, first, first_bias).relu()
    return F.linear(F.linear(hidden, second, second_bias).relu(), third, third_bias)


def suffix_mean_reference(value_KR: Tensor, end_K: Tensor) -> Tensor:
    """Mean of rows n, n+1, ..., end_K[n] - 1: (K, R). Sums run in fp64, so that documents stay apart."""
    before = torch.cumsum(value_KR.double(), 0)
    before = torch.cat([before.new_zeros(1, before.shape[1]), before])
    count_K = end_K - torch.arange(len(end_K), device=end_K.device)
    return ((before[end_K] - before[:-1]) / count_K[:, None]).to(value_KR.dtype)
