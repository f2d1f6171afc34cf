"""Scoring as a graph of plain operations of fixed size: images, or their features, -> anomaly map, score and verdict.

It computes what `scoring` does. What methods differ in comes from `Detector.density_graph`; how densities become
anomalies is traced through `protocol.Densities` itself.

Symbols: B images, any number; H x W pixels; h x w cells of a level; G groups (classes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..features.graph import LARGEST, constant
from ..protocol import Densities, Detector
from ..scoring.calibration import Calibration, required_calibration
from ..scoring.maps import blurred_axis, cells_on_map, map_grid

OUTPUTS = ("anomaly_map", "score", "class_id", "p_value", "threshold", "is_anomalous")
IMAGE, GIVEN_CLASS = "image", "given_class"  # names of inputs; features are "features_0", "features_1", ...

ROUNDING = 2e-5
"""Part of a score or threshold by which runtimes may differ: what ties with a calibration image ties in all of them."""

SLACK = 1e-3  # by which values of an image may lie outside of [0, 1], after arithmetic of less than float32


@dataclass(frozen=True)
class Plan:
    """What a graph is made for.

    Attributes:
        sizes: (h, w) of the features of each level.
        size: (H, W) of the images that go in; None: their features do.
        img_size: the `img_size` at which images are seen.
        outputs: names, some of `OUTPUTS`.
        group: the group of all images; None: inferred, or given with each image.
        class_input: whether the groups of images are an input, -1 where they are to be inferred.
        map_size: (H, W) of the anomaly map; None: that of the grid on which scores are computed.
    """

    sizes: tuple[tuple[int, int], ...]
    size: tuple[int, int] | None
    img_size: int | str
    outputs: tuple[str, ...] = OUTPUTS
    group: int | None = None
    class_input: bool = False
    map_size: tuple[int, int] | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs, in their order."""
        features = tuple(f"features_{level}" for level in range(len(self.sizes)))
        return (*((IMAGE,) if self.size else features), *((GIVEN_CLASS,) if self.class_input else ()))


class ScoringGraph(nn.Module):
    """Images or features of fixed size -> the `Plan.outputs` of each, as `HGADModel.score` gives them, to rounding.

    Inputs are images (B, 3, H, W) in [0, 1], or the features (B, C, h, w) of each level, and with `Plan.class_input`
    the groups (B,) int64, -1 where they are to be inferred. Outputs: anomaly_map (B, H, W), score (B,), class_id (B,)
    int64, p_value and threshold (B,), NaN where nothing is known of the group, and is_anomalous (B,) bool.

    An image with values beyond [0, 1] (NaN, 0 to 255, normalised already), or whose densities are no numbers, has an
    infinite score, whatever a runtime makes of a NaN on the way: no comparison calls it normal.

    Args:
        model: a calibrated model; the graph has copies of all that it needs.
        plan: what it is made for.
        encoder: of `features.graph`, which makes the features of images; None: features go in.

    Attributes:
        grid: H and W of the map that scores are computed on.
        groups: the numbers of those that images of these sizes can be of.

    Raises:
        ValueError: the method has no graph, or the model cannot score features of these sizes.
    """

    level_max: Tensor

    def __init__(self, model: Detector, plan: Plan, encoder: nn.Module | None) -> None:
        super().__init__()
        self.plan = plan
        calibration = required_calibration(model)
        self.encoder = encoder
        self.densities = model.density_graph(plan.sizes, plan.group)
        self.groups: list[int] = self.densities.get_buffer("groups").tolist()
        self.judge = Judge(calibration)
        self.register_buffer("level_max", constant(calibration.level_max))
        with torch.no_grad():
            channels = zip(model.feature_dims, plan.sizes, strict=True)
            example = self.densities([torch.zeros(1, c, *size) for c, size in channels], None)
        self.grid = map_grid(example, model.config.msk_size, cells_on_map(model, plan.img_size))
        self.map = self.scored = MapGraph(example, self.grid, calibration.weights)
        if calibration.scored_on != "map":
            self.scored = MapGraph(example, self.grid, calibration.score_weights, calibration.scored_on)
        self.share = calibration.share

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs, in the order of the plan."""
        plan = self.plan
        given = inputs[-1] if plan.class_input else None
        sources = inputs[: len(inputs) - plan.class_input]
        levels = list(sources) if self.encoder is None else self.encoder(sources[0])
        valid = _all([x.abs() <= LARGEST for x in levels])
        if self.encoder is not None:
            valid = valid & _all([(sources[0] >= -SLACK) & (sources[0] <= 1 + SLACK)])
        densities: Densities = self.densities(levels, given)
        scores, anomaly_map = self._scores(densities)
        scores = torch.where(valid & _all([logps < math.inf for logps in densities.logps]), scores, math.inf)
        results = {"anomaly_map": anomaly_map, "score": scores, "class_id": densities.group_ids}
        results |= self.judge(scores, densities.group_ids)
        return tuple(results[name] for name in plan.outputs)

    def _scores(self, densities: Densities) -> tuple[Tensor, Tensor]:
        """Return the scores (B,) and the anomaly maps."""
        maps = self.map(densities, self.level_max)
        scored = maps if self.scored is self.map else self.scored(densities, self.level_max)
        count = int(self.share * scored[0].numel() + 1e-9)
        scores = scored.flatten(1).topk(count).values.mean(1) if count > 1 else scored.amax((1, 2))
        if self.plan.map_size not in (None, tuple(maps.shape[1:])):
            maps = F.interpolate(maps[:, None], self.plan.map_size, mode="bilinear", align_corners=False)[:, 0]
        return scores, maps


class MapGraph(nn.Module):
    """Densities -> calibrated anomaly maps (B, H, W).

    Along each axis, resizing and blurring are one constant matrix.

    Args:
        example: densities of the sizes that will come.
        grid: H and W.
        weights: (G, parts) of the maps that are added; None: they are multiplied.
        scope: of `Densities.anomalies`.
    """

    weights: Tensor | None

    def __init__(self, example: Densities, grid: tuple[int, int], weights: Tensor | None, scope: str = "map") -> None:
        super().__init__()
        self.scope = scope
        self.register_buffer("weights", None if weights is None else constant(weights))
        for x in example.logps:
            for name, n, m in zip(("rows", "columns"), x.shape[1:], grid, strict=True):
                matrix = blurred_axis(n, m, torch.float32, torch.device("cpu"))
                self.register_buffer(f"{name}_{n}", matrix.clone() if name == "rows" else matrix.T.contiguous())

    def forward(self, densities: Densities, level_max: Tensor) -> Tensor:
        """Return the maps of densities under `level_max` (G, levels)."""
        maps = [self._map(levels) for levels in densities.anomalies(level_max, self.scope)]
        if self.weights is None:
            return math.prod(maps[1:], start=maps[0])
        weights: Tensor = self.weights.index_select(0, densities.group_ids)
        weighted = [weights[:, i, None, None] * part for i, part in enumerate(maps)]
        return sum(weighted[1:], start=weighted[0])

    def _map(self, levels: Sequence[Tensor]) -> Tensor:
        """Return the sum of levels (B, h, w), each resized to the grid and blurred."""
        maps = [getattr(self, f"rows_{x.shape[1]}") @ x @ getattr(self, f"columns_{x.shape[2]}") for x in levels]
        return sum(maps[1:], start=maps[0])


class Judge(nn.Module):
    """Image scores (B,) and groups (B,) -> p-values, thresholds and verdicts, as `Calibration.judge` has them.

    P-values are looked up in a table of the scores of the calibration images, of each group on its own scale.
    """

    references: Tensor
    counts: Tensor
    thresholds: Tensor

    def __init__(self, calibration: Calibration) -> None:
        super().__init__()
        groups = len(calibration.level_max)
        references = [calibration.reference(k) for k in range(groups)]
        table = torch.full((groups, max(max(map(len, references)), 1)), -math.inf)
        for row, scores in zip(table, references, strict=True):
            row[: len(scores)] = scores
        thresholds = torch.tensor([calibration.threshold(k) for k in range(groups)], dtype=torch.float64)
        scale = torch.maximum(table.nan_to_num(neginf=0).abs(), thresholds.float().abs().nan_to_num(0)[:, None])
        self.register_buffer("references", table + ROUNDING * scale)
        self.register_buffer("counts", torch.tensor([len(scores) for scores in references], dtype=torch.float32))
        self.register_buffer("thresholds", thresholds.float())

    def forward(self, scores: Tensor, group_ids: Tensor) -> dict[str, Tensor]:
        """Return p_value, threshold and is_anomalous by these names."""
        references, counts, threshold = (
            table.index_select(0, group_ids) for table in (self.references, self.counts, self.thresholds)
        )
        as_high = (references >= scores[:, None]).float().sum(1)
        p_value = torch.where(counts > 0, (1 + as_high) / (counts + 1), math.nan)
        within = scores <= threshold + ROUNDING * threshold.abs()
        is_anomalous = ~within & (threshold.abs() <= LARGEST)
        return {"p_value": p_value, "threshold": threshold, "is_anomalous": is_anomalous}


def _all(conditions: Sequence[Tensor]) -> Tensor:
    """Return for each image (B,) whether all conditions (B, ...) hold everywhere."""
    return torch.stack([condition.flatten(1).all(1) for condition in conditions]).all(0)
