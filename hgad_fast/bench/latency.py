"""The case "latency" of `hgad-fast bench`: how long a camera waits for the verdict on a frame."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..features.preprocess import preprocess, seen_features
from ..models.config import HGADConfig
from ..models.hgad import HGADModel
from ..scoring.calibration import Calibration
from ..scoring.score import score_images
from ..scoring.scorer import Scorer

CLASSES = 15


@dataclass(frozen=True)
class Latency:
    """Times of one kind of call of a `Scorer`, frame by frame, and of its stages on the same frames, in turn with it.

    Attributes:
        case: "latency".
        size: (height, width) of the frames, 8-bit colour arrays.
        img_size: at which the backbone sees them.
        backbone: its name; its weights are random.
        device: its name.
        call: what is asked for.
        frames: how many were timed.
        p50, p95: seconds from frame to answer.
        preparation: median seconds of the checks and the resizing before the backbone.
        features: median seconds of the backbone.
        error: relative deviation of the scores from those of `HGADModel.score`.
    """

    case: str
    size: tuple[int, int]
    img_size: int
    backbone: str
    device: str
    call: str
    frames: int
    p50: float
    p95: float
    preparation: float
    features: float
    error: float

    @property
    def beyond_backbone(self) -> float:
        """Median seconds that are not the backbone's: preparation, flow, mixture, map, verdict."""
        return self.p50 - self.features


def measure(device: torch.device, device_name: str, quick: bool = False, seconds: float = 8) -> list[Latency]:
    """Time a `Scorer` on frames of a camera of 1.3 megapixels; `quick` tries the machinery on tiny ones.

    On a GPU the frames are also seen at 1024 pixels.
    """
    if quick:
        small = {"backbone_arch": "test_efficientnet", "out_indices": (1,), "coupling_layers": 2, "pos_embed_dim": 8}
        return of_model(model_for(64, device, **small), (96, 128), device_name, seconds=0)
    sides = (256, 1024) if device.type == "cuda" else (256,)
    return [each for side in sides for each in of_model(model_for(side, device), (1024, 1280), device_name, seconds)]


def model_for(img_size: int, device: torch.device, **settings: Any) -> HGADModel:
    """Return an untrained model with a made-up calibration: it takes as long as a trained one."""
    settings = {"backbone_arch": "tf_efficientnet_lite0"} | settings
    model = HGADModel(HGADConfig(n_classes=CLASSES, backbone_weights=None, img_size=img_size, **settings)).to(device)
    ids = torch.arange(30 * CLASSES) % CLASSES
    levels = torch.zeros(CLASSES, model.config.feature_levels)
    model.calibration = Calibration(levels, torch.linspace(0, 1, len(ids)), ids)
    return model


def of_model(model: HGADModel, size: tuple[int, int], device_name: str, seconds: float) -> list[Latency]:
    """Time a `Scorer` of a calibrated model on frames (height, width), for about so many seconds in all."""
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(3)]
    inferred, given = Scorer(model, frame_size=size), Scorer(model, frame_size=size, class_id=0)
    calls: dict[str, Callable[[np.ndarray], Any]] = {
        "verdict, class given": lambda frame: given(frame).score,
        "verdict, class inferred": lambda frame: inferred(frame).score,
        "verdict and map": lambda frame: inferred(frame).anomaly_map,
    }

    def prepared(frame: np.ndarray) -> torch.Tensor:
        return preprocess(torch.from_numpy(frame.transpose(2, 0, 1) / np.float32(255)), model.config)

    seen = {id(frame): prepared(frame) for frame in frames}
    stages: dict[str, Callable[[np.ndarray], Any]] = {
        "preparation": prepared,
        "features": lambda frame: seen_features(model, seen[id(frame)]),
    }
    times = _alternate(calls | stages, frames, model.device, seconds)
    errors = []
    for scorer, class_id in ((given, 0), (inferred, None), (inferred, None)):
        expected = float(score_images(model, frames[0], class_id).image_score)
        errors.append(abs(scorer(frames[0]).score - expected) / max(abs(expected), 1e-30))
    arch, side = model.config.backbone_arch, model.config.img_size
    assert arch is not None and isinstance(side, int)
    medians = {stage: float(np.median(times[stage])) for stage in stages}
    latencies = []
    for call, error in zip(calls, errors, strict=True):
        p50, p95 = map(float, np.percentile(times[call], [50, 95]))
        asked: dict[str, Any] = {"size": size, "img_size": side, "backbone": arch, "device": device_name, "call": call}
        timed: dict[str, Any] = {"frames": len(times[call]), "p50": p50, "p95": p95, **medians}
        latencies.append(Latency(case="latency", **asked, **timed, error=error))
    return latencies


def _alternate(
    works: dict[str, Callable[[np.ndarray], Any]], frames: list[np.ndarray], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Time all works in turn for about so many seconds: from 5 to 200 frames each, warm-up left out."""
    times: dict[str, list[float]] = {name: [] for name in works}
    deadline = None
    for turn in range(203):
        if turn == 3:
            deadline = time.perf_counter() + seconds
        if deadline is not None and turn >= 8 and time.perf_counter() > deadline:
            break
        for name, work in works.items():
            start = time.perf_counter()
            work(frames[turn % len(frames)])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if deadline is not None:
                times[name].append(time.perf_counter() - start)
    return times


def table(latencies: Iterable[Latency]) -> str:
    """Return the times as text, one block for each size of frames and of what the backbone sees."""
    lines: list[str] = []
    heading = ""
    for each in latencies:
        (h, w), before = each.size, heading
        heading = f"latency on {each.device}: frames of {h} x {w} seen at {each.img_size}, {each.backbone}"
        if heading != before:
            columns = ("p50 ms", "p95 ms", "preparation", "backbone", "beyond it", "frames")
            lines += ["", heading, f"  {'':<24}" + "".join(f"{column:>13}" for column in columns)]
        shown = (each.p50, each.p95, each.preparation, each.features, each.beyond_backbone)
        figures = "".join(f"{1e3 * value:>13.2f}" for value in shown)
        lines.append(f"  {each.call:<24}{figures}{each.frames:>13}")
    return "\n".join(lines[1:])
