"""The result of scoring, and the verdicts on image scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..protocol import Detector
from .calibration import required_calibration


@dataclass
class ScoreResult:
    """Anomaly maps, scores and verdicts of B images: on the model's device from `score_features`, else on the CPU.

    Attributes:
        anomaly_map: (B, h, w) float32, higher is more anomalous; a list of (h, w) where images differ in size.
        image_score: (B,) maximum of the map at `msk_size`, or the mean of its largest pixels (`Calibration.share`); of
            official maps, as published.
        class_id: (B,) int64, given or inferred: the class, or the group where the method forms groups of its own.
        p_value: (B,) float64, conformal p-value: the share of normal images, this one among them, that score at least
            as high, never below 1 / (n + 1) for n calibration images; NaN without any.
        is_anomalous: (B,) bool, whether image_score is above `threshold`, or, which is the same, p_value at most
            `false_alarm_rate`; False where there is no threshold.
        threshold: (B,) float64, image score above which an image (and map value above which a pixel) counts as
            anomalous; NaN without calibration images.
        false_alarm_rate: (B,) float64, the false-alarm rate that the threshold attains with its n calibration images:
            the largest k / (n + 1) that is no more than the target, or 1 / (n + 1), the lowest there is, where that is
            more than the target (`Calibration.attained_rate`); NaN where there is no threshold.
        logps: per level (B, h, w), log-density under the image's class divided by C, in nats per channel.
        neg_entropy: per level (B, h, w), negative entropy of the class posterior, in nats; empty where the method has
            no posterior.
        sizes: (H, W) of each image.
    """

    anomaly_map: Tensor | list[Tensor]
    image_score: Tensor
    class_id: Tensor
    p_value: Tensor
    is_anomalous: Tensor
    threshold: Tensor
    false_alarm_rate: Tensor
    logps: list[Tensor] | None = None
    neg_entropy: list[Tensor] | None = None
    sizes: list[tuple[int, int]] | None = None

    def cpu(self) -> ScoreResult:
        """Move the tensors (B,) to the CPU, in place, and return the result."""
        for name in ("image_score", "class_id", "p_value", "is_anomalous", "threshold", "false_alarm_rate"):
            setattr(self, name, getattr(self, name).cpu())
        return self


def judged(
    model: Detector,
    scores: Tensor,
    group_ids: Tensor,
    normalization: str,
    name: Callable[[int], str] = "image {}".format,
) -> ScoreResult:
    """Return the `ScoreResult` of image scores and groups, (B,) each; its maps are still to be filled in.

    Raises:
        ValueError: a score is NaN or infinite; `name` gives what it calls an image.
    """
    require_numbers(model, scores, group_ids, name)
    if normalization == "official":
        p_value, threshold, rate = torch.full((3, len(scores)), math.nan, dtype=torch.float64)
        is_anomalous = torch.zeros(len(scores), dtype=torch.bool)
    else:
        calibration = required_calibration(model)
        calibration.warn_of_silence(model.groups, group_ids)
        p_value, is_anomalous, threshold, rate = calibration.judge(scores, group_ids)
    return ScoreResult(
        anomaly_map=[],
        image_score=scores,
        class_id=group_ids.to(scores.device),
        p_value=p_value.to(scores.device),
        is_anomalous=is_anomalous.to(scores.device),
        threshold=threshold.to(scores.device),
        false_alarm_rate=rate.to(scores.device),
    )


def finite(value: float | Tensor) -> float | None:
    """Return a number that JSON can hold; None for a NaN or an infinity."""
    number = float(value)
    return number if math.isfinite(number) else None


def require_numbers(model: Detector, scores: Tensor, group_ids: Tensor, name: Callable[[int], str]) -> None:
    """Raise a ValueError that names the first image whose score, of scores (B,), is NaN or infinite."""
    if not scores.isfinite().all():
        i = int((~scores.isfinite()).nonzero()[0])
        raise ValueError(
            f"{name(i)} has no score: it is {float(scores[i])} under {model.groups[int(group_ids[i])]!r}. The model's "
            "weights or constants are broken, or features of the image overflow: load the model again, or train it anew"
        )
