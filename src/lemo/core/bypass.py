"""Bypass: the low-rank update of rows that skip a layer, in closed form from its own input and update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lemo.errors import ConfigError

RMS_EPS = 1e-6


def rms_normalise(x_NM: Tensor, eps: float = RMS_EPS) -> Tensor:
    """RMS norm of rows: x / sqrt(mean(x²) + eps), without a weight, in fp32 (fp64 stays fp64). Shape as `x_NM`."""
    x_NM = x_NM if x_NM.dtype == torch.float64 else x_NM.float()
    return x_NM * torch.rsqrt(x_NM.square().mean(-1, keepdim=True) + eps)


@dataclass(frozen=True)
class Bypass:
    """update(x) = rmsnorm(x) · down · up, added to the residual stream of rows that skip a layer.

    Attributes:
        down_MR: (M, R) floating.
        up_RM: (R, M) floating, same dtype and device.
    """

    down_MR: Tensor
    up_RM: Tensor

    @property
    def rank(self) -> int:
        """R."""
        return self.down_MR.shape[1]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Bypass:
        """The same map on another device or in another dtype."""
        return Bypass(self.down_MR.to(device=device, dtype=dtype), self.up_RM.to(device=device, dtype=dtype))

    def on(self, device: torch.device, dtype: torch.dtype) -> Bypass:
        """As `to`, but copied once: every step asks for the same copy."""
        copies: dict[tuple[torch.device, torch.dtype], Bypass] = self.__dict__.setdefault("_copies", {})
        if (device, dtype) not in copies:
            copies[device, dtype] = self.to(device, dtype)
        return copies[device, dtype]

    def update(self, x_NM: Tensor) -> Tensor:
        """Update of rows in the dtype of `x_NM`: (N, M). The norm runs in fp32, the maps in their own dtype.

        *Cost*: 4·M·R FLOPs a row. *Numerics*: plain differentiable torch, exact gradient.
        """
        normed_NM = rms_normalise(x_NM).to(self.down_MR.dtype)
        return (normed_NM @ self.down_MR @ self.up_RM).to(x_NM.dtype)


class BypassFit:
    """Second moments of a layer's normalised input and its update; sums, so fits of several batches merge.

    Holds G = Σ w·n nᵀ, C = Σ w·n uᵀ and E = Σ w·|u|² in fp64, with n = rmsnorm(x). Products of one batch are formed in
    fp32 slices (fp64 for fp64 input) and added up in fp64. *Cost*: 4·M² FLOPs a row, 16·M² bytes.

    Args:
        width: M.
        device: where the sums live.
    """

    SLICE_ROWS = 8192

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        """Starts empty."""
        self.gram_MM = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.cross_MM = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.energy = torch.zeros((), dtype=torch.float64, device=device)
        self.weight = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def width(self) -> int:
        """M."""
        return self.gram_MM.shape[0]

    def add(self, x_NM: Tensor, update_NM: Tensor, weight_N: Tensor | None = None) -> None:
        """Adds rows.

        Args:
            x_NM: (N, M) input of the layer.
            update_NM: (N, M) output minus input of the layer.
            weight_N: (N,) weights >= 0; None weighs all rows alike. Rows of weight 0 are left out.
        """
        if weight_N is not None:
            rows = weight_N.nonzero().squeeze(-1)
            x_NM, update_NM, weight_N = x_NM[rows], update_NM[rows], weight_N[rows]
        for start in range(0, x_NM.shape[0], self.SLICE_ROWS):
            part = slice(start, start + self.SLICE_ROWS)
            normed = rms_normalise(x_NM[part].detach())
            update = update_NM[part].detach().to(normed.dtype)
            weight = normed.new_ones(normed.shape[0]) if weight_N is None else weight_N[part].to(normed.dtype)
            weighted = normed * weight[:, None]
            self.gram_MM += (weighted.T @ normed).to(self.gram_MM)
            self.cross_MM += (weighted.T @ update).to(self.gram_MM)
            self.energy += (weight * update.square().sum(-1)).sum().to(self.gram_MM)
            self.weight += weight.sum().to(self.gram_MM)

    def merge(self, other: BypassFit) -> BypassFit:
        """A new fit over the rows of both."""
        merged = BypassFit(self.width, self.gram_MM.device)
        for name in ("gram_MM", "cross_MM", "energy", "weight"):
            setattr(merged, name, getattr(self, name) + getattr(other, name).to(self.gram_MM.device))
        return merged

    def solve(self, rank: int | None, ridge: float = 1e-3, prior: Bypass | None = None) -> Bypass:
        """The map of rank `rank` with the least Σ w·|u − n·W|² + λ·|W − P|², λ = ridge · mean diagonal of G.

        Closed form: W = (G + λI)⁻¹ (C + λP) solves the problem without the rank limit; its best rank-R version in the
        metric of G + λI is W·V·Vᵀ, V the leading R eigenvectors of Wᵀ(G + λI)W = (C + λP)ᵀW.

        Args:
            rank: R; None for the full-rank map (down = W, up = identity), for study.
            ridge: strength of the ridge, relative; 0 needs a G of full rank.
            prior: P, the map that few rows leave nearly as it is; None for zero.

        Returns:
            Bypass in fp32 on the device of the sums.

        Raises:
            ConfigError: no rows were added, or the rank is not in [1, M].
        """
        width = self.width
        if float(self.weight) <= 0:
            raise ConfigError("a bypass needs rows to be fitted on, none were added")
        if rank is not None and not 1 <= rank <= width:
            raise ConfigError(f"bypass rank must lie in [1, {width}], got {rank}")
        eye = torch.eye(width, dtype=torch.float64, device=self.gram_MM.device)
        strength = ridge * self.gram_MM.diagonal().mean()
        cross_MM = self.cross_MM
        if prior is not None:
            cross_MM = cross_MM + strength * (prior.down_MR.to(cross_MM) @ prior.up_RM.to(cross_MM))
        map_MM = torch.linalg.solve(self.gram_MM + strength * eye, cross_MM)
        if rank is None:
            return Bypass(map_MM.float(), eye.float())
        fitted = cross_MM.T @ map_MM
        _, vectors = torch.linalg.eigh((fitted + fitted.T) / 2)
        leading_MR = vectors[:, -rank:].flip(-1)
        return Bypass((map_MM @ leading_MR).float().contiguous(), leading_MR.T.float().contiguous())

    def explained(self, bypass: Bypass) -> float:
        """Share of the update's energy that a bypass explains on these rows: 1 − Σ w·|u − n·A·B|² / Σ w·|u|²."""
        map_MM = bypass.down_MR.to(self.gram_MM) @ bypass.up_RM.to(self.gram_MM)
        cross = (map_MM * self.cross_MM).sum()
        fitted = (map_MM * (self.gram_MM @ map_MM)).sum()
        return float((2 * cross - fitted) / self.energy.clamp_min(torch.finfo(torch.float64).tiny))

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, for a shard."""
        return {"gram": self.gram_MM, "cross": self.cross_MM, "energy": self.energy, "weight": self.weight}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> BypassFit:
        """A fit from the sums of `state_dict`."""
        fit = cls(state["gram"].shape[0], state["gram"].device)
        fit.gram_MM, fit.cross_MM = state["gram"].double(), state["cross"].double()
        fit.energy, fit.weight = state["energy"].double(), state["weight"].double()
        return fit
