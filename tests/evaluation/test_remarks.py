"""What a person would act on is said, and nothing where all is as it should be."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hgad_fast.data.datasets import Dataset, Sample
from hgad_fast.evaluation.evaluate import Evaluation, Figures, ScoredImage
from hgad_fast.evaluation.remarks import remarks
from hgad_fast.scoring.calibration import Calibration

NAMES = ("nut", "bolt")


def model_of(images: int = 60, rate: float = 0.05) -> Any:
    """A detector as far as remarks look at it, with as many calibration images of each class."""
    scores = torch.linspace(0, 1, images).repeat(2)
    ids = torch.arange(2).repeat_interleave(images)
    calibration = Calibration(torch.zeros(2, 1), scores, ids, false_alarm_rate=rate)
    return SimpleNamespace(groups=NAMES, groups_are_classes=True, calibration=calibration)


def evaluation_of(auroc: float = 0.99, pixel: float = 0.97, alarms: int = 3, taken_right: int = 60) -> Evaluation:
    """Sixty normal images of a class, so many of which raise an alarm or are taken for what they are."""
    images = [
        ScoredImage(
            f"{name}/{i}.png", name, name if i < taken_right else NAMES[0], "good", False, 0.5, 0.5, 1.0, i < alarms
        )
        for name in NAMES
        for i in range(60)
    ]
    figures = {name: Figures(image_auroc=auroc, pixel_auroc=pixel) for name in NAMES}
    return Evaluation({"honest": figures}, {"honest": Figures()}, {"honest": images}, {"honest": "last"})


def test_nothing_is_said_where_all_is_well() -> None:
    assert remarks(model_of(), evaluation_of(), None) == []
    assert remarks(model_of(), evaluation_of(math.nan, math.nan), None) == []


@pytest.mark.parametrize(
    ("model", "evaluation", "words"),
    [
        (
            {},
            {"auroc": 0.51},
            "defective images are hardly told from normal ones, AUROC: nut 51.0%, bolt 51.0% (50% is",
        ),
        (
            {},
            {"pixel": 0.2},
            "defective pixels are hardly told from normal ones, AUROC: nut 20.0%, bolt 20.0% (below 50%",
        ),
        ({}, {"taken_right": 30}, "the class is recognised in 75.0% of the images only, e.g. bolt for nut (30)"),
        (
            {"images": 4},
            {},
            "the thresholds of 2 classes (nut, bolt) attain a false-alarm rate of 11.1% instead of 5.0%",
        ),
        ({"rate": 0.0001}, {"alarms": 0}, "instead of 0.01%, as they rest on 120 normal images"),
        (
            {},
            {"alarms": 12},
            "24 of 120 normal test images raise an alarm (20.0%), where the thresholds stand for 4.9%",
        ),
        ({"rate": 0.5}, {"alarms": 1}, "only 2 of 120 normal test images raise an alarm"),
    ],
)
def test_what_is_odd_is_said(model: dict[str, Any], evaluation: dict[str, Any], words: str) -> None:
    (remark,) = remarks(model_of(**model), evaluation_of(**evaluation), None)
    assert words in remark


def test_test_images_that_were_trained_on_are_named(tmp_path: Path) -> None:
    samples = {}
    for split, contents in {"train": ["a", "b", "cc"], "test": ["x", "b", "dd"]}.items():
        files = [tmp_path / split / f"{i}.png" for i in range(3)]
        for file, content in zip(files, contents, strict=True):
            file.parent.mkdir(exist_ok=True)
            file.write_text(content)
        samples[split] = tuple(Sample(file, 0) for file in files)
    (remark,) = remarks(model_of(), None, Dataset(tmp_path, NAMES, **samples))
    assert remark.startswith("test images that are the same files as training images, so that the figures flatter: 1, ")
    assert f"{tmp_path}/train/1.png and {tmp_path}/test/1.png" in remark
