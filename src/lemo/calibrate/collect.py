"""Collect: one layer's statistics over every calibration window, on whatever stream the earlier layers made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lemo.calibrate.windows import Window
from lemo.config import CalibrationConfig
from lemo.core.bypass import BypassFit, rms_normalise
from lemo.core.layout import Layout
from lemo.core.plan import LayerPlan, Plan
from lemo.core.policy import select
from lemo.core.predictor import PatternPredictor
from lemo.core.score import ScoreInputs, mlp_scores
from lemo.core.target import LOG_FLOOR, TargetScores, target_scores
from lemo.errors import ConfigError
from lemo.runtime.stream import LayerStream, LayerTrace

EDGE_WEIGHT = 0.1  # weight of rows that the oracle keeps in the bypass fit: a predictor will skip some of them


class HiddenStore:
    """Residual streams of all windows at one layer, on the host within a limit, the rest in files of a folder.

    Two generations: `put` writes the next layer's input, `advance` makes it the current one.

    Args:
        limit_bytes: most host memory for tensors.
        folder: where the rest goes; None refuses to exceed the limit.
    """

    def __init__(self, limit_bytes: float, folder: Path | None) -> None:
        """Starts empty."""
        self.limit_bytes, self.folder = limit_bytes, folder
        self.held_bytes = 0
        self._current: dict[int, Tensor | Path] = {}
        self._next: dict[int, Tensor | Path] = {}
        self._generation = 0

    def put(self, index: int, x_BTM: Tensor) -> None:
        """Keeps a stream for the next generation.

        Raises:
            ConfigError: over the limit without a folder.
        """
        x_BTM = x_BTM.detach().to("cpu").contiguous()
        size = x_BTM.numel() * x_BTM.element_size()
        if self.held_bytes + size <= self.limit_bytes:
            self.held_bytes += size
            self._next[index] = x_BTM
            return
        if self.folder is None:
            raise ConfigError(
                f"calibration statistics exceed memory_limit_gib ({self.limit_bytes / 2**30:.2f}); raise it, "
                "give an output folder for the rest, or use fewer or shorter windows"
            )
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"stream-{self._generation % 2}-{index}.safetensors"
        save_file({"x": x_BTM}, path)
        self._next[index] = path

    def get(self, index: int, device: torch.device) -> Tensor:
        """Stream of the current generation on a device."""
        held = self._current[index]
        if isinstance(held, Path):
            from safetensors.torch import load_file

            held = load_file(held)["x"]
        return held.to(device)

    def drop(self, index: int) -> None:
        """Forgets a stream of the current generation early."""
        held = self._current.pop(index)
        if isinstance(held, Path):
            held.unlink()
        else:
            self.held_bytes -= held.numel() * held.element_size()

    def close(self) -> None:
        """Forgets everything and removes its files."""
        self.advance()
        self.advance()

    def advance(self) -> None:
        """The next generation becomes the current one."""
        for index in list(self._current):
            self.drop(index)
        self._current, self._next = self._next, {}
        self._generation += 1


class ProjectionFit:
    """Which directions of a normalised row tell its informativeness: sums for a ridge regression, in fp64.

    A direction per head predicts the logarithm of that head's row score. Directions are fitted on rows, which are
    plentiful where blocks are few; principal components beside them only taught the nets the calibration windows.
    """

    def __init__(self, width: int, outputs: int, device: torch.device) -> None:
        """Starts empty for rows of `width` and `outputs` row scores."""
        self.second_MM = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.cross_MH = torch.zeros(width, outputs, dtype=torch.float64, device=device)
        self.sum_M = torch.zeros(width, dtype=torch.float64, device=device)
        self.sum_H = torch.zeros(outputs, dtype=torch.float64, device=device)
        self.rows = 0

    def add(self, x_NM: Tensor, score_NH: Tensor) -> None:
        """Adds rows and their scores."""
        for x, score in zip(x_NM.split(BypassFit.SLICE_ROWS), score_NH.split(BypassFit.SLICE_ROWS), strict=True):
            normed = rms_normalise(x)
            self.second_MM += (normed.T @ normed).double()
            self.cross_MH += (normed.T @ score.to(normed)).double()
            self.sum_M += normed.sum(0).double()
            self.sum_H += score.sum(0).double()
        self.rows += len(x_NM)

    def solve(self, features: int, ridge: float = 1e-2) -> Tensor:
        """(M, F) fp32, F = min(features, H): a direction per head, or the F that explain most when heads are more.

        Directions keep the unit of the log score, so that log-mean-exp over a block pools them as scores add up.
        """
        mean_M = self.sum_M / self.rows
        covariance = self.second_MM / self.rows - torch.outer(mean_M, mean_M)
        cross = self.cross_MH / self.rows - torch.outer(mean_M, self.sum_H / self.rows)
        eye = torch.eye(len(mean_M), dtype=torch.float64, device=mean_M.device)
        directions = torch.linalg.solve(covariance + ridge * covariance.diagonal().mean() * eye, cross)
        if directions.shape[1] > features:
            fitted = cross.T @ directions
            _, vectors = torch.linalg.eigh((fitted + fitted.T) / 2)
            directions = directions @ vectors[:, -features:].flip(-1)
        return directions.float()


@dataclass
class PartStatistics:
    """What a predictor and a bypass of one part of a layer (attention rows, or own MLP rows) are fitted on.

    Attributes:
        projection_MF: directions of the predictor.
        features: (K, inputs) fp32 per window, before standardisation.
        targets: (K,) fp32 per window, score of blocks.
        moments: of the rows to be skipped; None when no row is skipped.
    """

    projection_MF: Tensor
    targets: list[Tensor]
    moments: BypassFit | None
    features: list[Tensor] = field(default_factory=list)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for a shard."""
        state = {"projection": self.projection_MF}
        for name in ("features", "targets"):
            state |= {f"{name}.{i}": value for i, value in enumerate(getattr(self, name))}
        if self.moments is not None:
            state |= {f"moments.{key}": value for key, value in self.moments.state_dict().items()}
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], device: torch.device) -> PartStatistics:
        """Inverse of `state_dict`."""
        moments = {k.removeprefix("moments."): v.to(device) for k, v in state.items() if k.startswith("moments.")}
        lists = {
            name: [state[f"{name}.{i}"].to(device) for i in range(sum(k.startswith(f"{name}.") for k in state))]
            for name in ("features", "targets")
        }
        return cls(
            state["projection"].to(device),
            lists["targets"],
            BypassFit.from_state_dict(moments) if moments else None,
            lists["features"],
        )


def block_target(trace: LayerTrace, layout: Layout, config: CalibrationConfig) -> TargetScores:
    """What `config.target` says of a layer's blocks and rows."""
    inputs = ScoreInputs(
        layout,
        query_HND=trace.query_HND,
        key_GND=trace.key_GND,
        scaling=trace.scaling,
        value_GND=trace.value_GND,
    )
    return target_scores(config.target, inputs, config.query_stride)


def skip_weights(layout: Layout, target_K: Tensor, ratio: float, ratio_of: str = "all") -> Tensor:
    """Weight of rows in the bypass fit: 1 where the oracle skips, little where it keeps, 0 where rows always run."""
    competing_K = (~layout.forced_K).to(target_K.device)
    weight_N = torch.where(layout.block_of_row_N >= 0, competing_K[layout.block_of_row_N.clamp_min(0)], False)
    weight_N = weight_N.float() * EDGE_WEIGHT
    chosen = select(layout, target_K, forward_ratio=ratio, backward_ratio=ratio, ratio_of=ratio_of).forward
    if chosen is not None:
        weight_N[chosen.skipped_S] = 1.0
    return weight_N


class LayerCollector:
    """Runs one layer densely on every window and sums up what its fits need.

    Args:
        streams: one per window.
        windows: the windows; held-out ones give targets and features but are not fitted on.
        store: residual streams at the layer's input.
        plan: its ratios say which rows the bypass is fitted on.
        config: calibration options.
        dense: residual streams of a run without skipping, at the layer's output; the bypass then learns the way there.
    """

    def __init__(
        self,
        streams: Sequence[LayerStream],
        windows: Sequence[Window],
        store: HiddenStore,
        plan: Plan,
        config: CalibrationConfig,
        dense: HiddenStore | None = None,
    ) -> None:
        """Keeps what it is given."""
        self.streams, self.windows, self.store, self.plan, self.config = streams, windows, store, plan, config
        self.dense = dense

    def collect(self, layer: int, *, keep_output: bool) -> dict[str, PartStatistics]:
        """Statistics of one layer: `rows`, and `mlp` when the plan gives MLPs rows of their own.

        Args:
            layer: index of the layer.
            keep_output: store the dense output as the next generation of streams.
        """
        own_mlp = self.plan.mlp == "own"
        parts: dict[str, _Part] = {}
        for index, (stream, window) in enumerate(zip(self.streams, self.windows, strict=True)):
            x_BTM = self.store.get(index, stream.layout.device)
            trace = stream.dense(layer, x_BTM, ("attention", "mlp") if own_mlp else ("attention",))
            reached_BTM = trace.output_BTM if self.dense is None else self.dense.get(index, stream.layout.device)
            update_NM = (reached_BTM.float() - x_BTM.float()).flatten(0, 1)
            self._add_rows(parts, layer, stream.layout, window, x_BTM.flatten(0, 1), trace, update_NM)
            if own_mlp:
                self._add_mlp(parts, layer, stream.layout, window, x_BTM.flatten(0, 1), trace)
            if keep_output:
                self.store.put(index, trace.output_BTM)
            del trace
        done = {name: part.finish(self.config.pooled_features) for name, part in parts.items()}
        for index, stream in enumerate(self.streams):
            x_NM = self.store.get(index, stream.layout.device).flatten(0, 1)
            for statistics in done.values():
                shape = blank_predictor(statistics.projection_MF, self.config)
                statistics.features.append(shape.raw_features(x_NM, stream.layout))
        return done

    def _add_rows(
        self,
        parts: dict[str, _Part],
        layer: int,
        layout: Layout,
        window: Window,
        x_NM: Tensor,
        trace: LayerTrace,
        update_NM: Tensor,
    ) -> None:
        """Target, row scores and the update that the bypass learns, of one window."""
        target = block_target(trace, layout, self.config)
        part = parts.setdefault("rows", _Part(x_NM.shape[1], target.row_NH.shape[1], x_NM.device, self.plan.ratio_of))
        ratio = self.plan.layers[layer].forward_ratio
        part.add(layout, window, target, x_NM, (x_NM, update_NM) if ratio < 1 else None, ratio)

    def _add_mlp(
        self, parts: dict[str, _Part], layer: int, layout: Layout, window: Window, x_NM: Tensor, trace: LayerTrace
    ) -> None:
        """The same for the MLP: informativeness is the norm of the intermediate activation."""
        if trace.mlp_norm_N is None or trace.mlp_input_NM is None or trace.mlp_output_NM is None:
            raise ConfigError("mlp 'own' needs a family that names its MLP, so that its activation can be recorded")
        target_K = mlp_scores(trace.mlp_norm_N, layout)
        part = parts.setdefault("mlp", _Part(x_NM.shape[1], 1, x_NM.device, self.plan.ratio_of))
        score_NH = torch.log(trace.mlp_norm_N.float() + LOG_FLOOR)[:, None]
        target = TargetScores(target_K, score_NH, layout.block_of_row_N >= 0)
        ratio = mlp_ratio_of(self.plan.layers[layer])
        pair = (trace.mlp_input_NM, trace.mlp_output_NM) if ratio < 1 else None
        part.add(layout, window, target, x_NM, pair, ratio)


def mlp_ratio_of(layer: LayerPlan) -> float:
    """Share of blocks that run the MLP."""
    return layer.forward_ratio if layer.mlp_ratio is None else layer.mlp_ratio


def blank_predictor(projection_MF: Tensor, config: CalibrationConfig) -> PatternPredictor:
    """A predictor of the configured sizes around a projection, nets not trained, on the projection's device."""
    hidden = (config.predictor_width, config.predictor_width)
    predictor = PatternPredictor(
        projection_MF.shape[0],
        pooled_features=projection_MF.shape[1],
        query_widths=hidden,
        key_widths=hidden,
        rank=config.predictor_rank,
        loss_distance=config.target == "mass_loss_rows",
    ).to(projection_MF.device)
    predictor.projection_MF.copy_(projection_MF)
    return predictor


class _Part:
    """Sums of one part of a layer while windows pass by."""

    def __init__(self, width: int, outputs: int, device: torch.device, ratio_of: str) -> None:
        self.ratio_of = ratio_of
        self.projection = ProjectionFit(width, outputs, device)
        self.moments = BypassFit(width, device)
        self.targets: list[Tensor] = []

    def add(
        self,
        layout: Layout,
        window: Window,
        target: TargetScores,
        x_NM: Tensor,
        update: tuple[Tensor, Tensor] | None,
        ratio: float,
    ) -> None:
        """Adds one window; a held-out one leaves only its target."""
        self.targets.append(target.block_K.float())
        if window.held_out:
            return
        known_rows = target.known_N.nonzero().squeeze(-1)
        self.projection.add(x_NM[known_rows], target.row_NH[known_rows])
        if update is not None:
            self.moments.add(*update, skip_weights(layout, target.block_K, ratio, self.ratio_of))

    def finish(self, features: int) -> PartStatistics:
        """Statistics with their projection; features follow in a second pass over the streams."""
        moments = self.moments if float(self.moments.weight) > 0 else None
        return PartStatistics(self.projection.solve(features), self.targets, moments)
