"""The benchmark of the camera loop: its frames carry their numbers, and its figures are those of the run."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import small_detectors
import torch

from benchmarks import camera


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """A video of grey noise whose frames have every other number."""
    image = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    path = tmp_path / "video.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), camera.RATE, (camera.WIDTH, camera.HEIGHT))
    for number in range(12):
        writer.write(camera.frame_of(image, number))
    writer.release()
    return path


def test_numbers_outlast_the_compression(video: Path) -> None:
    capture = cv2.VideoCapture(str(video))
    assert [camera.number_in(capture.read()[1]) for _ in range(12)] == list(range(12))
    frame = camera.frame_of(np.zeros((9, 9, 3), np.uint8), (1 << camera.BITS) - 1)
    assert camera.number_in(frame) == (1 << camera.BITS) - 1


def test_figures_of_a_run(video: Path, tmp_path: Path) -> None:
    model = small_detectors.gaussian(size=(64, 85))  # 480 x 640 at a short side of 64
    model.save(tmp_path / "model.safetensors")
    figures = camera.run(tmp_path / "model.safetensors", video, tmp_path / "out", torch.get_num_threads(), [])
    assert figures["frames_scored"] == 12 and figures["frames_dropped"] == figures["without_score"] == 0
    assert figures["order_kept"] is True and figures["overlays"] == figures["alarms"]
    assert 0 < figures["scoring_ms"]["p50"] <= figures["latency_ms"]["p50"] <= figures["latency_ms"]["longest"]
    megabytes = figures["resident_megabytes"]
    assert 0 < megabytes["after_warm_up"] <= megabytes["peak"]
