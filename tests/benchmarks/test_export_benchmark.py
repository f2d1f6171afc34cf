"""The benchmark of exported files, on a tiny model: every figure is there, and differences are those that it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import exported
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import export, verdict
from hgad_fast.export.check import TOLERANCES


def test_a_model_gets_the_figures_of_all_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in verdict.ONNX:
        pytest.importorskip(package)
    verdict.calibrated_model(**exported.ON_IMAGES).save(tmp_path / "small" / "model.safetensors")
    images = tmp_path / "images"
    images.mkdir()
    for i, width in enumerate((64, 64, 80)):
        noise = np.random.default_rng(i).integers(0, 256, (64, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(images / f"{i}.png")
    output = tmp_path / "figures.json"
    arguments = [str(tmp_path / "small" / "model.safetensors"), "--images", str(images), "--output", str(output)]
    monkeypatch.setattr(export, "FILES", (("onnx", "fp32"), ("torch", "fp16")))
    monkeypatch.setattr(sys, "argv", ["export", *arguments, "--rounds", "1"])
    threads = torch.get_num_threads()
    try:
        export.main()
    finally:
        torch.set_num_threads(threads)
    record = json.loads(output.read_text())
    (figures,) = record["models"]
    assert record["versions"]["torch"] == torch.__version__ and figures["model"] == "small"
    assert figures["images"] == {"64 x 64": 2, "64 x 80": 1}
    assert list(figures["files"]) == ["onnx fp32", "torch fp16"]
    for name, of_file in figures["files"].items():
        of_score, of_map = TOLERANCES[name.split()[1]]
        assert of_file["bytes"] > 0 and of_file["over parameters"] > 0
        compared = of_file["against the model"]
        assert compared["score"] <= of_score and compared["map"] <= of_map and compared["classes"] == 0
        batches = of_file["against single images"]
        assert set(batches) == {"of 7", "of 64"} and all(x["score"] <= of_score for x in batches.values())
        assert figures["over Scorer"][name] > 0


def test_differences_are_over_the_scale_and_the_largest_value() -> None:
    expected = {"score": np.array([1.0, 4.0]), "anomaly_map": np.array([[[1.0, 2.0]], [[4.0, 8.0]]])}
    outputs = {"score": np.array([1.5, 4.0]), "anomaly_map": np.array([[[1.0, 2.5]], [[5.0, 8.0]]])}
    figures = export.differences(outputs, expected, scale=np.array([2.0, 4.0]))
    assert figures == {"score": 0.25, "map": 0.25, "map, absolute": 1.0}


def test_counts_are_added_and_of_others_the_largest_is_kept() -> None:
    several = [{"classes": 1, "map": {"score": 0.5}}, {"classes": 2, "map": {"score": 0.25}}]
    assert export.merged(several) == {"classes": 3, "map": {"score": 0.5}}
    assert np.isnan(export.merged([float("nan"), 1.0]))


def test_images_of_a_folder_are_taken_at_even_distances(tmp_path: Path) -> None:
    for i in range(7):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    assert [path.name for path in export.chosen(tmp_path, 3)] == ["0.png", "2.png", "4.png"]
    assert len(export.chosen(tmp_path, 9)) == 7
