"""The comparison of an exported file with the model, on images, before anybody relies on it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..protocol import Detector
from ..scoring.result import ScoreResult
from ..scoring.score import score_features, score_images
from .formats import Run
from .graph import Plan

IMAGES = 4  # that are drawn where none are given
TOLERANCES = {  # of scores, as a part of them or of the threshold; of maps, as a part of their largest value
    "fp32": (2e-5, 1e-4),
    "fp16": (2e-2, 5e-2),
}


def drawn_images(size: tuple[int, int], count: int = IMAGES) -> Tensor:
    """Return images (count, 3, H, W) in [0, 1], drawn with a fixed seed: noise of all scales.

    Coarse scales are the strongest, as in photographs.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(count, 3, *size)
    cells, strength = 1, 1.0
    while cells <= max(size):
        coarse = torch.randn(count, 3, *(min(cells + 1, side) for side in size), generator=generator)
        images += strength * F.interpolate(coarse, size, mode="bilinear", align_corners=True)
        cells, strength = 2 * cells, 0.6 * strength
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return (images - low) / (high - low).clamp(min=1e-6)


def drawn_features(model: Detector, plan: Plan, count: int = IMAGES) -> list[Tensor]:
    """Return features (count, C, h, w) of each level, drawn with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(count, channels, *size, generator=generator)
        for channels, size in zip(model.feature_dims, plan.sizes, strict=True)
    ]


def compared(model: Detector, plan: Plan, run: Run, inputs: Sequence[Tensor], precision: str) -> dict[str, Any]:
    """Return how far what a file gives is from what the model gives, as the sidecar has it.

    Args:
        model: the model, in float32 on the CPU.
        plan: what the file was made for.
        run: runs the file.
        inputs: n images, or their features of each level; the file gets them one by one, and the first three together.
        precision: of the file's weights, on which tolerances depend.

    Raises:
        ValueError: scores, maps, classes or verdicts differ by more than the tolerance; it names the figures.
    """
    count = len(inputs[0])
    groups = torch.arange(count) % len(model.groups) if plan.class_input else None
    given = [*inputs, *([] if groups is None else [groups])]
    ids = groups if plan.group is None else torch.full((count,), plan.group)
    expected = _scored(model, plan, inputs, ids)
    singles = [run([x[i : i + 1] for x in given]) for i in range(count)]
    outputs = dict(zip(plan.outputs, map(torch.cat, zip(*singles, strict=True)), strict=True))
    together = dict(zip(plan.outputs, run([x[:3] for x in given]), strict=True))
    of_score, of_map = TOLERANCES[precision]
    scale = expected.image_score.double().abs()
    scale = torch.maximum(scale, expected.threshold.nan_to_num(0).abs()).clamp(min=1e-12)
    figures: dict[str, Any] = {"images": count}
    wrong = []

    def note(name: str, difference: float, tolerance: float) -> None:
        figures[name] = float(f"{difference:.2g}")
        if not difference <= tolerance:
            wrong.append(f"{name} by {difference:.2g} (allowed: {tolerance:g})")

    if "score" in outputs:
        note("score", float(((outputs["score"] - expected.image_score).abs() / scale).max()), of_score)
        batched = (together["score"] - outputs["score"][:3]).abs() / scale[:3]
        note("score in a batch", float(batched.max()), of_score)
    if "anomaly_map" in outputs:
        maps = expected.anomaly_map
        assert isinstance(maps, Tensor)
        largest = maps.abs().amax((1, 2)).clamp(min=1e-12)
        note("map", float(((outputs["anomaly_map"] - maps).abs().amax((1, 2)) / largest).max()), of_map)
    if "class_id" in outputs:
        note("class", float((outputs["class_id"] != expected.class_id).sum()), 0)
    if "is_anomalous" in outputs:
        tied = (expected.image_score - expected.threshold).abs() <= of_score * scale  # either verdict is right
        note("verdict", float(((outputs["is_anomalous"] != expected.is_anomalous) & ~tied).sum()), 0)
    if wrong:
        raise ValueError(
            f"what the file gives for {count} images differs from what the model gives: {'; '.join(wrong)}. It was not "
            "written; report this, or write it all the same: check=False (--no-check)"
        )
    return figures | {"tolerance of score": of_score, "tolerance of map": of_map}


def reference_model(model: Detector) -> Detector:
    """Return the model, or a copy of it, on the CPU and computing in float32."""
    exact: Detector = model.in_float32()
    if exact.device.type == "cpu":
        return exact
    copied: Any = copy.deepcopy(exact)
    return copied.to("cpu")


def _scored(model: Detector, plan: Plan, inputs: Sequence[Tensor], group_ids: Tensor | None) -> ScoreResult:
    """Return what the model gives for images, or features."""
    if plan.size is None:
        return score_features(model, inputs, group_ids, map_size=plan.map_size)
    return score_images(model, inputs[0], group_ids, map_size=plan.map_size or "seen", img_size=plan.img_size)
