"""The comparison of an exported file with the model, on images, before anybody relies on it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..protocol import Detector
from ..scoring.calibration import required_calibration
from ..scoring.result import ScoreResult
from ..scoring.score import score_features, score_images
from .formats import Run
from .graph import Plan

IMAGES = 4  # that are drawn where none are given
TOGETHER = 3  # of them the file gets as a batch, too
TOLERANCES = {  # of scores, as a part of them or of the threshold; of maps, as a part of their largest value
    # Rounding of the backbone's features is amplified by a flow: measured are up to 2e-5 and 4e-5 (docs/deploy.md).
    "fp32": (5e-5, 1e-4),
    "fp16": (5e-2, 1e-1),
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


def compared(
    model: Detector, plan: Plan, groups: Sequence[int], run: Run, inputs: Sequence[Tensor], precision: str
) -> dict[str, Any]:
    """Return how far what a file gives is from what the model gives, as the sidecar has it.

    Args:
        model: the model, in float32 on the CPU.
        plan: what the file was made for.
        groups: those that images can be of.
        run: runs the file.
        inputs: n images, or their features of each level; the file gets them one by one, and the first ones together.
        precision: of the file's weights, on which tolerances depend.

    Raises:
        ValueError: an output differs by more than the tolerance; it names the figures.
    """
    count = len(inputs[0])
    given = _given_groups(plan, groups, count)
    expected = _expected(model, plan, inputs, given)
    arguments = [*inputs, *([given] if plan.class_input and given is not None else [])]
    results = [run([x[i : i + 1] for x in arguments]) for i in range(count)]
    results.append(run([x[:TOGETHER] for x in arguments]))
    rows = torch.cat([torch.arange(count), torch.arange(count)[:TOGETHER]])  # the images of the results
    outputs = dict(zip(plan.outputs, map(torch.cat, zip(*results, strict=True)), strict=True))
    tolerances = dict.fromkeys(plan.outputs, 0.0) | {"threshold": torch.finfo(torch.float32).eps}
    tolerances["score"], tolerances["anomaly_map"] = TOLERANCES[precision]
    differences = _differences(model, outputs, expected, rows, tolerances["score"])
    if wrong := [name for name, value in differences.items() if not value <= tolerances[name]]:
        listed = "; ".join(f"{name} by {differences[name]:.2g} (allowed: {tolerances[name]:.2g})" for name in wrong)
        raise ValueError(
            f"what the file gives for {count} images differs from what the model gives: {listed}. It was not written; "
            "report this, or write it all the same: check=False (--no-check)"
        )
    figures: dict[str, Any] = {"images": count} | {name: float(f"{x:.2g}") for name, x in differences.items()}
    return figures | {"tolerance": {name: tolerances[name] for name in ("score", "anomaly_map") if name in differences}}


def _given_groups(plan: Plan, groups: Sequence[int], count: int) -> Tensor | None:
    """Return the groups (count,) int64 that images are said to be of, every third one -1; None: nothing is said."""
    if plan.group is not None:
        return torch.full((count,), plan.group)
    if not plan.class_input:
        return None
    ids = torch.tensor([groups[i % len(groups)] for i in range(count)])
    return torch.where(torch.arange(count) % 3 == 2, -1, ids)


def _expected(model: Detector, plan: Plan, inputs: Sequence[Tensor], given: Tensor | None) -> ScoreResult:
    """Return what the model gives for images, or features, of the given groups."""
    if given is not None and (given < 0).any():
        given = torch.where(given < 0, _expected(model, plan, inputs, None).class_id, given)
    if plan.size is None:
        return score_features(model, inputs, given, map_size=plan.map_size)
    return score_images(model, inputs[0], given, map_size=plan.map_size or "seen", img_size=plan.img_size)


def _differences(
    model: Detector, outputs: dict[str, Tensor], expected: ScoreResult, rows: Tensor, tolerance: float
) -> dict[str, float]:
    """Return how far outputs of images `rows` are from what is expected, by their names.

    Scores are compared in units of themselves or of the threshold, maps in units of their largest value. Of classes,
    p-values and verdicts those are counted that differ; p-values and verdicts by more than the tolerance of scores
    explains.
    """
    scores, threshold, class_id = expected.image_score[rows], expected.threshold[rows], expected.class_id[rows]
    maps = expected.anomaly_map
    assert isinstance(maps, Tensor)
    known = threshold.nan_to_num(0).abs()
    scale = torch.maximum(scores.double().abs(), known).clamp(min=1e-12)
    calibration = required_calibration(model)
    least, most = (calibration.judge(scores + sign * 2 * tolerance * scale, class_id) for sign in (1, -1))
    rounding = torch.finfo(torch.float32).eps

    def difference(name: str, output: Tensor) -> Any:
        if name == "score":
            return ((output - scores).abs() / scale).max()
        if name == "anomaly_map":
            largest = maps.abs().amax((1, 2))[rows].clamp(min=1e-12)
            return ((output - maps[rows]).abs().amax((1, 2)) / largest).max()
        if name == "threshold":
            both_none = output.isnan() & threshold.isnan()
            return torch.where(both_none, 0, (output - threshold).abs() / known.clamp(min=1e-12)).max()
        if name == "class_id":
            return (output != class_id).sum()
        if name == "is_anomalous":
            return ((output != least[1]) & (output != most[1])).sum()
        within = (output >= least[0] - rounding) & (output <= most[0] + rounding)
        return (~within & ~(output.isnan() & least[0].isnan())).sum()

    return {name: float(difference(name, output)) for name, output in outputs.items()}


def reference_model(model: Detector) -> Detector:
    """Return the model, or a copy of it, on the CPU and computing in float32."""
    exact: Detector = model.in_float32()
    if exact.device.type == "cpu":
        return exact
    copied: Any = copy.deepcopy(exact)
    return copied.to("cpu")
