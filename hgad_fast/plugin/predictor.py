"""Images and batches of anomalib -> scores and maps in multiples of the threshold of their class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from ..data.images import ImageError, read_header
from ..features.preprocess import Seeing, seen_shape
from ..files import printable
from ..models.detector import Detector
from ..scoring.rates import NO_THRESHOLDS
from ..scoring.result import ScoreResult
from .batch import MultiClassBatch
from .processing import checked
from .scale import multiples

NATIVE_SIZES = (
    "tiles are not made here, as maps of images at their full size need none: choose settings={'img_size': 'native'}, "
    "or score by the library, model.detector.score(image, img_size='native')"
)


class Predictor(nn.Module):
    """Images -> scores and maps in multiples of the threshold of their class.

    Attributes:
        detector: a model of the library; None before it is made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.detector: Detector | None = None

    def forward(self, images: Tensor) -> InferenceBatch:
        """Return `pred_score` (B,) and `anomaly_map` (B, 1, H, W) of images (B, 3, H, W) in [0, 1]."""
        return self.in_multiples(self.score(images))

    def score(self, images: Tensor) -> ScoreResult:
        """Return the result of images (B, 3, H, W) in [0, 1], with maps of their size.

        Raises:
            ValueError: there are no thresholds, or these are no images in [0, 1].
        """
        detector = self.calibrated
        sound = [checked(image.as_subclass(Tensor), f"image {i} of a batch") for i, image in enumerate(images)]
        return detector.score(torch.stack(sound), throughput=detector.device.type != "cpu")

    @property
    def calibrated(self) -> Detector:
        """The detector.

        Raises:
            ValueError: it has no thresholds.
        """
        detector = self.detector
        if detector is None or detector.calibration is None:
            raise ValueError("the model is not trained: Engine.fit(model, datamodule) first, or load a checkpoint")
        return detector

    def in_multiples(self, result: ScoreResult) -> InferenceBatch:
        """Return scores and maps in multiples of the thresholds, on the detector's device.

        Raises:
            ValueError: a group has no threshold.
        """
        detector = self.calibrated
        if not result.threshold.isfinite().all():
            group = detector.groups[int(result.class_id[int((~result.threshold.isfinite()).nonzero()[0])])]
            raise ValueError(f"{NO_THRESHOLDS.format('no image')} (group {group!r})")
        maps, threshold = torch.as_tensor(result.anomaly_map), result.threshold.float()
        of_maps, from_zero = threshold.to(maps.device)[:, None, None], detector.scores_from_zero
        scores = multiples(result.image_score, threshold, result.is_anomalous, from_zero)
        pixels = multiples(maps, of_maps, maps > of_maps, from_zero)
        return InferenceBatch(pred_score=scores.to(detector.device), anomaly_map=pixels[:, None].to(detector.device))

    @property
    def tiler(self) -> None:
        """None: there are no tiles."""
        return None

    @tiler.setter
    def tiler(self, tiler: Any) -> None:
        raise ValueError(NATIVE_SIZES)


def paths_of(batch: Any) -> list[str]:
    """Return the paths of the images of a batch.

    Raises:
        ValueError: it has none.
    """
    if not batch.image_path:
        raise ValueError("a batch has no image_path, by which a model of hgad_fast finds the features of its images")
    return [os.fspath(path) for path in batch.image_path]


def joined(results: Sequence[ScoreResult]) -> ScoreResult:
    """Return the results of single images as that of a batch."""
    names = [field.name for field in fields(ScoreResult) if isinstance(getattr(results[0], field.name), Tensor)]
    tensors: dict[str, Any] = {name: torch.cat([getattr(result, name) for result in results]) for name in names}
    return ScoreResult(**tensors)


def require_proportions(batch: Any, config: Seeing) -> None:
    """Raise a ValueError where a batch was made of images of several proportions.

    anomalib stretches them to the largest. A `MultiClassFolder` makes no such batches.
    """
    if isinstance(batch, MultiClassBatch) or len(batch.image_path or []) < 2:
        return
    try:
        seen = {path: seen_shape(read_header(path)[:2], config) for path in paths_of(batch)}
    except ImageError:  # an item need not be a file
        return
    size = (batch.image.shape[-2], batch.image.shape[-1])
    if size in seen.values() and len(set(seen.values())) > 1:
        path, (height, width) = next((path, each) for path, each in seen.items() if each != size)
        raise ValueError(
            f"{printable(path)} is seen at {height} x {width}, and was stretched to {size[0]} x {size[1]} to fit into "
            "a batch with others: take MultiClassFolder, or eval_batch_size=1"
        )
