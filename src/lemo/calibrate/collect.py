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
from lemo.core.score import ScoreInputs, mlp_scores, scorer_named
from lemo.core.target import LOG_FLOOR, TargetScores, target_scores
from lemo.errors import ConfigError
from lemo.runtime.batch import document_keys
from lemo.runtime.stream import LayerStream, LayerTrace

EDGE_WEIGHT = 0.1  # weight of rows that are kept in the bypass fit: a predictor, or another draw, will skip some


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
        projection_MF: directions of the predictor; None where none is fitted.
        features: (K, inputs) fp32 per window, before standardisation; none without a predictor.
        targets: (K,) fp32 per window, score of blocks.
        moments: of the rows to be skipped; None when no row is skipped.
    """

    projection_MF: Tensor | None
    targets: list[Tensor]
    moments: BypassFit | None
    features: list[Tensor] = field(default_factory=list)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for a shard."""
        state = {} if self.projection_MF is None else {"projection": self.projection_MF}
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
        projection_MF = state.get("projection")
        return cls(
            None if projection_MF is None else projection_MF.to(device),
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


def ranked(plan: Plan, layer: int, x_NM: Tensor, layout: Layout) -> Tensor:
    """(K,) fp32 scores that rank a layer's blocks under the plan; a draw of its own for `random`."""
    predictor = plan.layers[layer].predictor
    name = "random" if plan.scorer == "predictor" and predictor is None else plan.scorer
    keys = document_keys(layout) if name == "random" else None
    inputs = ScoreInputs(layout, x_NM=x_NM, layer=layer, document_keys_D=keys)
    return scorer_named(name, predictor=predictor, seed=plan.seed).scores(inputs).to(x_NM.device, torch.float32)


def skip_weights(layout: Layout, scores_K: Tensor, ratio: float, ratio_of: str = "all") -> Tensor:
    """Weight of rows in the bypass fit: 1 where these scores skip, little where they keep, 0 where rows always run."""
    competing_K = (~layout.forced_K).to(scores_K.device)
    weight_N = torch.where(layout.block_of_row_N >= 0, competing_K[layout.block_of_row_N.clamp_min(0)], False)
    weight_N = weight_N.float() * EDGE_WEIGHT
    chosen = select(layout, scores_K, forward_ratio=ratio, backward_ratio=ratio, ratio_of=ratio_of).forward
    if chosen is not None:
        weight_N[chosen.skipped_S] = 1.0
    return weight_N


class LayerCollector:
    """Runs one layer densely on every window and sums up what its fits need.

    Args:
        streams: one per window.
        windows: the windows; held-out ones give targets and features but are not fitted on.
        store: residual streams at the layer's input.
        plan: its ratios say how many rows the bypass is fitted on. Which, its scorer does, unless that is `predictor`;
            nothing is summed up for predictors then, and no attention is looked at.
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
        self.dense, self.predicts = dense, plan.scorer == "predictor"

    def collect(self, layer: int, *, keep_output: bool) -> dict[str, PartStatistics]:
        """Statistics of one layer: `rows`, and `mlp` when the plan gives MLPs rows of their own.

        Args:
            layer: index of the layer.
            keep_output: store the dense output as the next generation of streams.
        """
        looked_at = [*(["attention"] if self.predicts else []), *(["mlp"] if self.plan.mlp == "own" else [])]
        parts: dict[str, _Part] = {}
        for index, (stream, window) in enumerate(zip(self.streams, self.windows, strict=True)):
            x_BTM = self.store.get(index, stream.layout.device)
            reached_BTM = None if self.dense is None else self.dense.get(index, stream.layout.device)
            if looked_at or keep_output or reached_BTM is None:
                trace = stream.dense(layer, x_BTM, tuple(looked_at))
            else:
                trace = LayerTrace(reached_BTM)
            reached_BTM = trace.output_BTM if reached_BTM is None else reached_BTM
            update_NM = (reached_BTM.float() - x_BTM.float()).flatten(0, 1)
            self._add_rows(parts, layer, stream.layout, window, x_BTM.flatten(0, 1), trace, update_NM)
            if "mlp" in looked_at:
                self._add_mlp(parts, layer, stream.layout, window, x_BTM.flatten(0, 1), trace)
            if keep_output:
                self.store.put(index, trace.output_BTM)
            del trace
        done = {name: part.finish(self.config.pooled_features) for name, part in parts.items()}
        learned = [statistics for statistics in done.values() if statistics.projection_MF is not None]
        for index, stream in enumerate(self.streams if learned else []):
            x_NM = self.store.get(index, stream.layout.device).flatten(0, 1)
            for statistics in learned:
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
        """What ranks blocks, row scores that predictors learn, and the update that the bypass learns, of one window."""
        target = block_target(trace, layout, self.config) if self.predicts else None
        scores_K = ranked(self.plan, layer, x_NM, layout) if target is None else target.block_K
        part = parts.setdefault("rows", _Part(x_NM, target, self.plan.ratio_of))
        ratio = self.plan.layers[layer].forward_ratio
        part.add(layout, window, (scores_K, target), x_NM, (x_NM, update_NM) if ratio < 1 else None, ratio)

    def _add_mlp(
        self, parts: dict[str, _Part], layer: int, layout: Layout, window: Window, x_NM: Tensor, trace: LayerTrace
    ) -> None:
        """The same for the MLP: informativeness is the norm of the intermediate activation."""
        if trace.mlp_norm_N is None or trace.mlp_input_NM is None or trace.mlp_output_NM is None:
            raise ConfigError("mlp 'own' needs a family that names its MLP, so that its activation can be recorded")
        target_K = mlp_scores(trace.mlp_norm_N, layout)
        score_NH = torch.log(trace.mlp_norm_N.float() + LOG_FLOOR)[:, None]
        target = TargetScores(target_K, score_NH, layout.block_of_row_N >= 0) if self.predicts else None
        part = parts.setdefault("mlp", _Part(x_NM, target, self.plan.ratio_of))
        ratio = mlp_ratio_of(self.plan.layers[layer])
        pair = (trace.mlp_input_NM, trace.mlp_output_NM) if ratio < 1 else None
        part.add(layout, window, (target_K, target), x_NM, pair, ratio)


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

    def __init__(self, x_NM: Tensor, target: TargetScores | None, ratio_of: str) -> None:
        """Empty, for rows like these; what predictors need only with a target to learn."""
        width, device = x_NM.shape[1], x_NM.device
        self.ratio_of = ratio_of
        self.projection = None if target is None else ProjectionFit(width, target.row_NH.shape[1], device)
        self.moments = BypassFit(width, device)
        self.targets: list[Tensor] = []

    def add(
        self,
        layout: Layout,
        window: Window,
        ranks: tuple[Tensor, TargetScores | None],
        x_NM: Tensor,
        update: tuple[Tensor, Tensor] | None,
        ratio: float,
    ) -> None:
        """Adds one window, its blocks' ranks and what is learned of them; a held-out one leaves only the ranks."""
        scores_K, target = ranks
        self.targets.append(scores_K.float())
        if window.held_out:
            return
        if self.projection is not None and target is not None:
            known_rows = target.known_N.nonzero().squeeze(-1)
            self.projection.add(x_NM[known_rows], target.row_NH[known_rows])
        if update is not None:
            self.moments.add(*update, skip_weights(layout, scores_K, ratio, self.ratio_of))

    def finish(self, features: int) -> PartStatistics:
        """Statistics with their projection; features follow in a second pass over the streams."""
        moments = self.moments if float(self.moments.weight) > 0 else None
        projection_MF = None if self.projection is None else self.projection.solve(features)
        return PartStatistics(projection_MF, self.targets, moments)
