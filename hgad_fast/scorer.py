"""A model kept warm for a camera loop: frame in, verdict out."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .model import HGADModel
from .regions import Region, find_regions
from .score import score_images


@dataclass(frozen=True)
class FrameScore:
    """What a `Scorer` says of a frame.

    Attributes:
        score, threshold, p_value, is_anomalous: as in `ScoreResult`, as plain numbers; NaN where there is no threshold.
        class_id, class_name: the class, given or inferred.
        anomaly_map: (h, w) float32 on the CPU, at the scorer's `map_size` or the frame's own size.
    """

    score: float
    threshold: float
    p_value: float
    is_anomalous: bool
    class_id: int
    class_name: str
    anomaly_map: Tensor

    def regions(self) -> list[Region]:
        """What is above the threshold, in pixels of the map, the worst first."""
        return find_regions(self.anomaly_map.numpy(), self.threshold)


class Scorer:
    """Scores one frame after the other with a model that stays loaded and warm.

    A frame is scored exactly as `model.score` scores it. Any thread may call; calls take turns.

    Args:
        model: an `HGADModel`, or the path of a model file.
        device: where it works, e.g. "cuda"; None: where the model is.
        class_id: id or name of what the camera shows; None: inferred for each frame.
        frame_size: (height, width) of the frames, to warm up with a grey one: kernels are built and memory is laid out
            before the first frame comes; None: the first frame pays for that.
        map_size: height and width of the maps (a number: both); None: the frame's own. Small ones save time.

    Raises:
        ValueError: the model file, the class, or the map's size cannot be used, or the model is not calibrated.
    """

    def __init__(
        self,
        model: HGADModel | str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        class_id: int | str | None = None,
        frame_size: tuple[int, int] | None = None,
        map_size: int | tuple[int, int] | None = None,
    ) -> None:
        if not isinstance(model, HGADModel):
            model = HGADModel.load(model)
        self.model = model.to(device) if device is not None else model
        self.class_id, self.map_size = class_id, map_size
        self._turn = threading.Lock()
        self(torch.full((3, *(frame_size or (64, 64))), 0.5))

    def __call__(self, frame: Any) -> FrameScore:
        """Score a frame: array (H, W, 3) or (H, W), unsigned integers or floats in [0, 1]; tensor (3, H, W); or PIL.

        Raises:
            ValueError: the frame has another shape or type, or values outside [0, 1].
        """
        with self._turn:
            found = score_images(self.model, frame, self.class_id, map_size=self.map_size)
        if len(found.image_score) != 1:
            raise ValueError(f"{len(found.image_score)} frames at once; a Scorer takes one, HGADModel.score several")
        k = int(found.class_id)
        return FrameScore(
            score=float(found.image_score),
            threshold=float(found.threshold),
            p_value=float(found.p_value),
            is_anomalous=bool(found.is_anomalous),
            class_id=k,
            class_name=self.model.class_names[k],
            anomaly_map=found.anomaly_map[0],
        )
