"""A model kept warm for a camera loop: frame in, verdict out."""

from __future__ import annotations

import copy
import functools
import os
import threading
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .calibrate import check_false_alarm_rate
from .config import HGADConfig
from .model import HGADModel
from .regions import Region, find_regions
from .score import checked_map_size, laid, memory_bytes, score_images, seeing


@dataclass(frozen=True)
class FrameScore:
    """What a `Scorer` says of a frame.

    Attributes:
        score, threshold, p_value, is_anomalous: as in `ScoreResult`, as plain numbers; NaN where there is no threshold.
        class_id, class_name: the class, given or inferred.
        size: (h, w) of `anomaly_map`: the scorer's `map_size`, or the frame's own.
        anomaly_map: (h, w) float32 on the CPU, what `model.score` gives to rounding. It is made when it is first asked
            for: who reads the verdict alone does not wait for it.
    """

    score: float
    threshold: float
    p_value: float
    is_anomalous: bool
    class_id: int
    class_name: str
    size: tuple[int, int]
    _seen: Tensor = field(repr=False)  # the map as it was computed, on the CPU
    _frame: tuple[int, int] = field(repr=False)
    _config: HGADConfig = field(repr=False)

    @functools.cached_property
    def anomaly_map(self) -> Tensor:
        return laid(self._seen, self._frame, self._config, self.size)

    def regions(self) -> list[Region]:
        """What is above the threshold, in pixels of the map, the worst first."""
        return find_regions(self.anomaly_map.numpy(), self.threshold)


class Scorer:
    """Scores one frame after the other with a model that stays loaded and warm.

    A frame is scored exactly as `model.score` scores it, whatever its size: frames may differ in that. Any thread may
    call; calls take turns.

    Args:
        model: an `HGADModel`, or the path of a model file.
        device: where it works, e.g. "cuda"; None: where the model is.
        class_id: id or name of what the camera shows; None: inferred for each frame.
        frame_size: (height, width) of most frames, to warm up with a grey one: kernels are built and memory is laid out
            before the first frame comes; None: the first frame pays for that, as does the first of another size.
        map_size: height and width of the maps (a number: both); None: the frame's own. Small ones save time.
        false_alarm_rate: share of normal frames that may be called anomalous; None: the model's. The model keeps its
            own.
        img_size: short side at which frames are seen, or ``"native"``; None: the model's. See `score_images`.
        max_memory: bytes, or e.g. ``"1.5GB"``, that scoring a frame may take; None: `hgad_fast.score.MAX_MEMORY`.

    Raises:
        ValueError: the model file or an argument cannot be used, a frame of `frame_size` needs more than `max_memory`,
            or the model is not calibrated.
    """

    def __init__(
        self,
        model: HGADModel | str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        class_id: int | str | None = None,
        frame_size: tuple[int, int] | None = None,
        map_size: int | tuple[int, int] | None = None,
        false_alarm_rate: float | None = None,
        img_size: int | str | None = None,
        max_memory: int | str | None = None,
    ) -> None:
        if not isinstance(model, HGADModel):
            model = HGADModel.load(model)
        if device is not None:
            model = model.to(device)
        if false_alarm_rate is not None:
            check_false_alarm_rate(false_alarm_rate)
            model = _at_rate(model, false_alarm_rate)
        self.model, self.class_id, self.map_size = model, class_id, checked_map_size(map_size)
        self._config = seeing(model, img_size).config
        self._options: dict[str, Any] = {"img_size": img_size, "max_memory": memory_bytes(max_memory)}
        self._turn = threading.Lock()
        self(torch.full((3, *(frame_size or (64, 64))), 0.5))

    def __call__(self, frame: Any) -> FrameScore:
        """Score a frame: array (H, W, 3) or (H, W), unsigned integers or floats in [0, 1]; tensor (3, H, W); or PIL.

        Raises:
            ValueError: the frame has another shape or type, values outside [0, 1], or needs more than `max_memory`.
        """
        with self._turn:
            found = score_images(self.model, frame, self.class_id, map_size="seen", **self._options)
        if len(found.image_score) != 1:
            raise ValueError(f"{len(found.image_score)} frames at once; a Scorer takes one, HGADModel.score several")
        assert found.sizes is not None
        k, (size,) = int(found.class_id), found.sizes
        return FrameScore(
            score=float(found.image_score),
            threshold=float(found.threshold),
            p_value=float(found.p_value),
            is_anomalous=bool(found.is_anomalous),
            class_id=k,
            class_name=self.model.class_names[k],
            size=self.map_size or size,
            _seen=found.anomaly_map[0],
            _frame=size,
            _config=self._config,
        )


def _at_rate(model: HGADModel, false_alarm_rate: float) -> HGADModel:
    """The model, with its weights, and another false-alarm rate where it is calibrated."""
    other = copy.copy(model)
    if model.calibration is not None:
        other.calibration = replace(model.calibration, false_alarm_rate=false_alarm_rate)
    return other
