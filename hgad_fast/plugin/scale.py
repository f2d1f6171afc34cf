"""The scale of scores in anomalib: 0 to 1, and 0.5 is the threshold, of every class.

Scores leave the model in multiples x of the threshold of their class, and become x / (1 + x), which keeps their order.
Those below 0, which distances from the expected one can be, become tiny numbers in the same order. Both steps keep the
verdict to the bit: a score is above 1, or 0.5, exactly where the image is anomalous. They consist of plain operations,
as graphs have them, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-37  # threshold that scores are divided by
LOWEST = 1e-32  # that a multiple of 0 counts as, with room for those below
ABOVE_ONE = 1 + 2.0**-23  # the smallest float32 above 1
ABOVE_HALF = 0.5 + 2.0**-24  # the smallest float32 above 0.5


def multiples(scores: Tensor, thresholds: Tensor, are_anomalous: Tensor) -> Tensor:
    """Return scores, or pixels of maps, in multiples of thresholds: float32, above 1 exactly where they are anomalous.

    Args:
        scores: any shape; infinite ones stay so.
        thresholds: of a shape that fits, and finite. With one of -t, a score s counts as 2 + s / t: 1, and how
            far it is above the threshold, in units of that.
        are_anomalous: bool, the verdicts.
    """
    thresholds = thresholds.float()
    quotients = scores.float() / thresholds.abs().clamp(min=SMALLEST) + torch.where(thresholds < 0, 2.0, 0.0)
    return torch.where(are_anomalous, quotients.clamp(min=ABOVE_ONE), quotients.clamp(max=1.0))


def to_unit(x: Tensor) -> Tensor:
    """Return multiples of a threshold on the scale from 0 to 1, above 0.5 exactly where they are above 1.

    What is not a number is 1, as anomalous as can be.
    """
    x = torch.where(x > LOWEST, x, LOWEST / (1 - x))
    below, above = x / (1 + x), 1 / (1 + 1 / x)
    unit = torch.where(x > 1, above.clamp(min=ABOVE_HALF), below.clamp(max=0.5))
    return torch.where(x >= 0, unit, 1.0)


def to_multiple(unit: float) -> float:
    """Return the multiple of a threshold that has this place from 0 to below 1 on the scale."""
    return unit / (1 - unit)
