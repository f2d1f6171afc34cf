"""The scale of scores in anomalib: 0 to 1, and 0.5 is the threshold, of every class.

Scores s leave the model in multiples x of the threshold t of their class, and become x / (1 + x). Some methods have
scores below 0 (`Detector.scores_from_zero`): what is called a multiple of the threshold is 1 + (s - t) there where they
are above it, and 1 / (1 + (t - s)) below. All this keeps the order of the scores of a class, and the verdict to the
bit: a score is above 1, or 0.5, exactly where the image is anomalous. It consists of plain operations, as graphs have
them, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-37  # threshold that scores are divided by
ABOVE_ONE = 1 + 2.0**-23  # the smallest float32 above 1
ABOVE_HALF = 0.5 + 2.0**-24  # the smallest float32 above 0.5


def multiples(scores: Tensor, thresholds: Tensor, are_anomalous: Tensor, from_zero: bool = True) -> Tensor:
    """Return scores, or pixels of maps, in multiples of thresholds: float32, above 1 exactly where they are anomalous.

    Args:
        scores: any shape; infinite ones stay so.
        thresholds: of a shape that fits; finite.
        are_anomalous: bool, the verdicts.
        from_zero: whether neither is ever below 0.
    """
    if from_zero:
        quotients = scores.float() / thresholds.float().clamp(min=SMALLEST)
    else:
        above = scores.float() - thresholds.float()
        quotients = torch.where(above > 0, 1 + above, 1 / (1 + above.neg().clamp(min=0)))
    return torch.where(are_anomalous, quotients.clamp(min=ABOVE_ONE), quotients.clamp(max=1.0))


def to_unit(x: Tensor) -> Tensor:
    """Return multiples of a threshold on the scale from 0 to 1, above 0.5 exactly where they are above 1.

    What is not a number is 1, as anomalous as can be.
    """
    below, above = x / (1 + x), 1 / (1 + 1 / x)
    unit = torch.where(x > 1, above.clamp(min=ABOVE_HALF), below.clamp(max=0.5))
    return torch.where(x >= 0, unit, 1.0)


def to_multiple(unit: float) -> float:
    """Return the multiple of a threshold that has this place from 0 to below 1 on the scale."""
    return unit / (1 - unit)
