"""The anomaly maps that VQ-Flow was published with, from its log-densities: pure functions, image by image.

Every map is normalised by maxima over its own image. So its scores say where an image is least like the others of its
pixels, and not how anomalous the image is as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..protocol import Densities, OfficialMaps
from ..scoring.maps import image_scores, upsample

SCORED_SHARE = 0.03  # of the pixels, the largest ones, whose mean is the image score

_SCORE = f"score: mean of the largest {100 * SCORED_SHARE:.0f} % of its pixels"
DESCRIPTIONS = {
    "mul": f"map 'mul' (densities of the levels multiplied), {_SCORE}",
    "add": f"map 'add' (densities of the levels added), {_SCORE}",
}


def official_maps(logps: Sequence[Tensor], size: int) -> dict[str, OfficialMaps]:
    """Return the published maps (B, size, size) and scores (B,) of B images, by the names "mul" and "add".

    With the log-densities upsampled to `size` (bilinear, corners aligned), "mul" is 1 - exp(T - max T), where T is
    their sum over the levels. For "add", exp(x - max x) of each level is upsampled and added up to P: it is max P - P.
    All maxima are over the pixels of one image, and images are worked on one by one.

    Args:
        logps: per level (B, h, w), the log-density divided by C.
        size: side of the maps, pixels.
    """
    mul, add = (logps[0].new_empty(len(logps[0]), size, size) for _ in range(2))
    for i in range(len(mul)):
        levels = [level[i : i + 1] for level in logps]
        total = _sum([upsample(level, (size, size)) for level in levels])
        mul[i] = -torch.expm1(total - total.max())
        total = _sum([upsample(torch.exp(level - level.max()), (size, size)) for level in levels])
        add[i] = total.max() - total
    return {
        name: OfficialMaps(maps, image_scores(maps, SCORED_SHARE), DESCRIPTIONS[name])
        for name, maps in (("mul", mul), ("add", add))
    }


def official_maps_of(batches: Sequence[Densities], size: int) -> dict[str, OfficialMaps]:
    """Return the `official_maps` of all images of several batches."""
    of_batches = [official_maps(batch.logps, size) for batch in batches]
    return {
        name: OfficialMaps(
            torch.cat([of_batch[name].maps for of_batch in of_batches]),
            torch.cat([of_batch[name].scores for of_batch in of_batches]),
            description,
        )
        for name, description in DESCRIPTIONS.items()
    }


def _sum(levels: Sequence[Tensor]) -> Tensor:
    """Return the sum of the maps (1, h, w) of the levels, as one map (h, w)."""
    return torch.cat(list(levels)).sum(0)
