"""A model kept loaded and warm for a camera loop: one frame in, its verdict out."""

from __future__ import annotations

import copy
import functools
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..environment import plain_torch
from ..features.preprocess import ImageSettings, memory_bytes, seeing
from ..files import printable
from ..methods import load
from ..protocol import Detector, ProportionsError
from ..terminal import warn_user
from .calibration import check_false_alarm_rate
from .inputs import checked_map_size
from .maps import laid
from .regions import Region, find_regions
from .result import finite
from .score import score_images


@dataclass(frozen=True)
class FrameScore:
    """The score, verdict and anomaly map of one frame.

    Attributes:
        score, threshold, p_value, is_anomalous, false_alarm_rate: as in `ScoreResult`, as plain numbers; threshold,
            p_value and false_alarm_rate (what the threshold attains) are NaN where there is no threshold.
        class_id, class_name: the class, given or inferred.
        size: (h, w) of `anomaly_map`: the scorer's `map_size`, or the frame's own.
        anomaly_map: (h, w) float32 on the CPU, to rounding what `model.score` gives. It is computed on first access:
            a loop that reads verdicts only does not wait for it.
    """

    score: float
    threshold: float
    p_value: float
    is_anomalous: bool
    false_alarm_rate: float
    class_id: int
    class_name: str
    size: tuple[int, int]
    _seen_map: Tensor = field(repr=False)  # the map that the score was computed on, on the CPU
    _frame_size: tuple[int, int] = field(repr=False)
    _config: ImageSettings = field(repr=False)

    @functools.cached_property
    @plain_torch()
    @torch.no_grad()
    def anomaly_map(self) -> Tensor:
        """The map (h, w), computed on first access."""
        return laid(self._seen_map, self._frame_size, self._config, self.size)

    def regions(self) -> list[Region]:
        """Return the regions above the threshold, in pixels of the map, the worst first."""
        return find_regions(self.anomaly_map.numpy(), self.threshold)

    def figures(self) -> dict[str, Any]:
        """Return class, score and verdict by the names of ``scores.csv``, as JSON holds them: None for a NaN.

        Without a threshold "anomalous" is None, too: there is no verdict.
        """
        p_value = finite(self.p_value)
        return {
            "class": printable(self.class_name),
            "score": self.score,
            "threshold": finite(self.threshold),
            "p_value": p_value,
            "anomalous": None if p_value is None else self.is_anomalous,
            "false_alarm_rate": finite(self.false_alarm_rate),
        }


class Scorer:
    """A model that stays loaded and warm, and scores one frame after the other.

    A frame is scored exactly as `model.score` scores it; frames may differ in size. Any thread may call; calls take
    turns. Frames are RGB: those of OpenCV are BGR, and take ``cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)`` first.

    Args:
        model: an `HGADModel` or a model of another method, or the path of a model file.
        device: the device to score on, e.g. "cuda"; None: where the model is.
        class_id: id or name of the class that the camera shows; None: inferred for each frame.
        frame_size: (height, width) of most frames, for a grey frame to warm up with: kernels are built and memory is
            allocated before the first frame comes; None: the first frame takes that time, as does the first of any
            other size.
        map_size: height and width of the maps (a number: both); None: the frame's own. Small maps save time.
        false_alarm_rate: target share of normal frames that may be called anomalous; None: the model's. The model
            itself keeps its own.
        img_size: short side at which frames are seen, or ``"native"``; None: the model's. See `score_images`.
        max_memory: bytes, or e.g. ``"1.5GB"``, that scoring a frame may take; None: 4 GB (`MAX_MEMORY` of
            `hgad_fast.features.preprocess`).

    Raises:
        ValueError: the model file or an argument cannot be used, a frame of `frame_size` needs more than `max_memory`,
            or the model is not calibrated.
    """

    @plain_torch()
    def __init__(
        self,
        model: Detector | str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        class_id: int | str | None = None,
        frame_size: tuple[int, int] | None = None,
        map_size: int | tuple[int, int] | None = None,
        false_alarm_rate: float | None = None,
        img_size: int | str | None = None,
        max_memory: int | str | None = None,
    ) -> None:
        detector: Any = load(model) if isinstance(model, (str, os.PathLike)) else model
        if device is not None:
            detector = detector.to(device)
        if false_alarm_rate is not None:
            check_false_alarm_rate(false_alarm_rate)
            calibration = detector.calibration
            detector = copy.copy(detector)  # shares the weights
            if calibration is not None:
                detector.calibration = replace(calibration, false_alarm_rate=false_alarm_rate)
                if len(calibration.scores) and (text := detector.calibration.shortcomings(detector.groups)):
                    warn_user(text)  # that there are no thresholds at all, the first score says
        self.model: Detector = detector
        self.class_id, self.map_size = class_id, checked_map_size(map_size)
        self._config = seeing(self.model, img_size).config
        self._options: dict[str, Any] = {"img_size": img_size, "max_memory": memory_bytes(max_memory)}
        self._turn = threading.Lock()
        self.model.make_ready()
        if frame_size is not None and not (
            isinstance(frame_size, Sequence)
            and len(frame_size) == 2
            and all(isinstance(side, int) and side > 0 for side in frame_size)
        ):
            raise ValueError(f"frame_size is {frame_size!r}; pass (height, width), whole numbers from 1 pixel")
        try:
            self(torch.full((3, *(frame_size or (64, 64))), 0.5))
        except ProportionsError:
            if frame_size is not None:
                raise

    def __call__(self, frame: Any, class_id: int | str | None = None) -> FrameScore:
        """Return the score of a frame.

        Args:
            frame: in RGB: array (H, W, 3) or (H, W), unsigned integers or floats in [0, 1]; tensor (3, H, W); or a PIL
                image. One of OpenCV, in BGR, first takes ``frame = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)``.
            class_id: id or name of the class that this frame shows; None: the scorer's own.

        Raises:
            ValueError: the frame has another shape or type, values outside [0, 1], or needs more than `max_memory`; the
                class is unknown; or the score is NaN or infinite, which is no verdict.
        """
        class_id = self.class_id if class_id is None else class_id
        with self._turn:
            result = score_images(self.model, frame, class_id, map_size="seen", **self._options)
        if len(result.image_score) != 1:
            raise ValueError(f"{len(result.image_score)} frames at once; a Scorer takes one, the model's score several")
        assert result.sizes is not None
        group, (frame_size,) = int(result.class_id), result.sizes
        return FrameScore(
            score=float(result.image_score),
            threshold=float(result.threshold),
            p_value=float(result.p_value),
            is_anomalous=bool(result.is_anomalous),
            false_alarm_rate=float(result.false_alarm_rate),
            class_id=group,
            class_name=self.model.groups[group],
            size=self.map_size or frame_size,
            _seen_map=result.anomaly_map[0],
            _frame_size=frame_size,
            _config=self._config,
        )
